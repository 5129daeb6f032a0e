"""Trainings that are interrupted by signals, in each phase: what is kept, what is said, and that they end alike."""

from __future__ import annotations

import os
import re
import signal
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.forked import Forked
from tests.tiny_models import save_model, tiny, tiny_tokenizer
from tokentree.train.keeping import whole

INT, TERM, KILL = signal.SIGINT, signal.SIGTERM, signal.SIGKILL
STATUS = {INT: 130, TERM: 143, KILL: -9}


class Trainings:
    """Runs the command in a process of its own each time."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        small = tiny("llama", vocab_size=300, num_hidden_layers=3, max_position_embeddings=96)  # its texts are short
        self.model = save_model(folder / "model", small, tiny_tokenizer())

    def run(
        self, kind: str, out: Path, *more: str, number: int | None = None, word: str = "", delay: float = 0.0
    ) -> tuple[int, str]:
        """The exit status and what was printed, of a training that gets a signal of this number so many seconds behind
        the first time that it prints ``word``."""
        args = ["train", *kind.split(), "--model", str(self.model), "--out", str(out), "--dtype", "float32"]
        args += ["--data", "self", "--tokens", "250", "--threads", "1", "--evaluate-every", "4", *more]
        file = self.folder / "said.txt"
        with file.open("w") as said:
            env = os.environ | {"OMP_NUM_THREADS": "1"}
            process = Forked([sys.executable, "-m", "tokentree", *args], stdout=said, stderr=said, env=env)
        while process.poll() is None:
            if number is not None and word in file.read_text():
                time.sleep(delay)
                process.send_signal(number)
                number = None
            time.sleep(0.003)
        return process.wait(), file.read_text()


@pytest.fixture(scope="module")
def command(tmp_path_factory: pytest.TempPathFactory) -> Trainings:
    return Trainings(tmp_path_factory.mktemp("interrupted"))


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


EAGLE = "eagle --unroll 2 --batch-size 1 --epochs 12"
MEDUSA = "medusa --heads 2 --batch-size 8 --epochs 12"


@pytest.mark.parametrize(
    ("kind", "times"),
    [
        (EAGLE, [(KILL, "writing texts", 0.05), (INT, "reading", 0.02), (TERM, "training", 0.1), (INT, "step 12/", 0)]),
        pytest.param(
            EAGLE,
            [
                (INT, "writing texts", 0.0), (KILL, "writing texts", 0.05), (TERM, "writing texts", 0.1),
                (INT, "reading", 0.02), (INT, "training", 0.1), (KILL, "step 8/", 0.02), (INT, "step 12/", 0.0),
                (KILL, "step 16/", 0.0),
            ],
            marks=pytest.mark.nightly,
        ),
        pytest.param(
            MEDUSA, [(INT, "training", 0.0), (KILL, "step 8/", 0.0), (INT, "step 16/", 0.0)], marks=pytest.mark.nightly,
        ),
    ],
    ids=["one of each", "eagle", "medusa"],
)  # fmt: skip
def test_a_training_that_is_interrupted_again_and_again_ends_with_the_same_heads(
    command: Trainings, tmp_path: Path, kind: str, times: list[tuple[signal.Signals, str, float]]
) -> None:  # fmt: skip
    assert command.run(kind, tmp_path / "whole")[0] == 0
    parts, interrupted = tmp_path / "parts", 0
    for number, word, delay in times:
        status, said = command.run(kind, parts, number=number, word=word, delay=delay)
        assert "Traceback" not in said
        assert status in (STATUS[number], 0), said
        interrupted += status != 0
        if status > 0:
            last = said.rstrip().splitlines()[-1]
            assert last.startswith("interrupted")
            if number is INT and word == "training":
                assert re.match(r"interrupted \(training: \d+ of \d+ steps\): ", last)
            assert last.endswith(
                f"what is done is kept in {str(parts / 'work')!r}; the same command goes on from there"
            )
        if status:
            assert "heads are in" not in said
    assert interrupted > len(times) // 2
    status, said = command.run(kind, parts)
    assert status == 0, said
    assert "training: going on from" in said
    assert "reading the texts: going on from" in said
    one, other = weights(tmp_path / "whole"), weights(parts)
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)
    left = [file.name for file in parts.rglob(".*") if file.name != ".lock" and not file.name.startswith(".model")]
    kills = sum(number == KILL for number, _, _ in times)
    assert len(left) <= kills  # what a killed process was writing


@pytest.mark.parametrize("number", [INT, TERM])
def test_an_interruption_waits_for_what_is_to_be_whole(number: signal.Signals) -> None:
    def interrupt(_: int, __: object) -> None:
        raise KeyboardInterrupt

    done = list[int]()

    def twice_whole(signals: int) -> None:
        with whole(), whole():
            for _ in range(signals):
                os.kill(os.getpid(), number)
            done.append(signals)

    before = signal.signal(number, interrupt)
    try:
        for signals in (1, 2):
            with pytest.raises(KeyboardInterrupt):
                twice_whole(signals)
            assert signal.getsignal(number) is interrupt
    finally:
        signal.signal(number, before)
    assert done == [1]  # a second one doesn't wait


def test_nothing_waits_where_a_program_handles_no_signals() -> None:
    before = signal.signal(TERM, signal.SIG_DFL)
    try:
        with whole():
            assert signal.getsignal(TERM) is signal.SIG_DFL
    finally:
        signal.signal(TERM, before)
