"""Heads trained by two processes, against one."""

from __future__ import annotations

import json
import os
import re
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.forked import Forked
from tests.tiny_models import save_model, tiny, tiny_tokenizer
from tests.train.commands import DONE
from tokentree import LLM, SamplingParams
from tokentree.cli import main as cli

# what `accelerate launch` tells each process where there are several GPUs: told to use CPUs, it starts one process
ENVIRONMENT = {
    "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1", "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2",
    "MASTER_ADDR": "127.0.0.1",
}  # fmt: skip
KINDS = {
    "medusa": ["--heads", "2", "--batch-size", "64"],
    "eagle": ["--unroll", "2", "--batch-size", "8"],
    "medusa --way full": ["--heads", "2", "--batch-size", "8"],
}


@pytest.mark.nightly
def test_two_processes_train_what_one_does(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    model = save_model(tmp_path / "model", tiny("llama", vocab_size=300, num_hidden_layers=8), tiny_tokenizer())
    data = tmp_path / "data.jsonl"
    texts = [
        " ".join(f"{word} {place}" for word in ("a tree", "an owl", "rain") * (2 + place % 3)) for place in range(48)
    ]
    data.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")

    def command(kind: str, processes: str) -> list[str]:
        return ["tokentree", "train", *kind.split(), "--model", str(model), "--data", str(data), "--epochs", "2",
                "--evaluate-every", "3", "--dtype", "float32", "--threads", "1", *KINDS[kind],
                "--out", str(tmp_path / processes / kind)]  # fmt: skip

    with socket.create_server(("127.0.0.1", 0)) as free:
        port = str(free.getsockname()[1])
    words = [sys.executable, "-m", "tests.train.commands", *(json.dumps(command(kind, "two")) for kind in KINDS)]
    two = [
        Forked(
            words, env=os.environ | ENVIRONMENT | {"MASTER_PORT": port, "RANK": rank, "LOCAL_RANK": rank},
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )
        for rank in ("0", "1")
    ]  # fmt: skip
    alone = list[tuple[str, str]]()
    for kind in KINDS:
        monkeypatch.setattr(sys, "argv", command(kind, "one"))
        with pytest.raises(SystemExit) as ended:
            cli.main()
        assert not ended.value.code
        told = capsys.readouterr()
        alone.append((told.out, told.err))
    (out, err), (more_out, more_err) = (process.communicate(timeout=300) for process in two)
    assert [process.returncode for process in two] == [0, 0], (err + more_err)[-9000:]
    assert "heads are in" not in more_out  # it is told once
    assert "step" not in more_err
    both = list(zip(out.split(DONE), err.split(DONE), strict=True))
    assert len(both) == len(KINDS) + 1  # and what comes behind the last
    for kind, one, other in zip(KINDS, alone, both[:-1], strict=True):
        same(kind, {"one": one, "two": other}, tmp_path, model)


def same(kind: str, said: dict[str, tuple[str, str]], folder: Path, model: Path) -> None:
    """Looks whether one process and two told the same and trained the same."""
    assert [out.count("heads are in") for out, _ in said.values()] == [1, 1], kind
    looks = {name: re.findall(r"step (\d+)/\d+: loss ([\d.]+)", err) for name, (_, err) in said.items()}
    assert len(looks["one"]) >= 3
    assert [step for step, _ in looks["one"]] == [step for step, _ in looks["two"]]  # told once
    # losses are told of the first process's half of a step, the weights are those of the whole
    for (_, alone), (_, shared) in zip(looks["one"], looks["two"], strict=True):
        assert float(shared) == pytest.approx(float(alone), rel=0.2)
    folders = [folder / name / kind / ("heads" if "--way" in kind else "") for name in said]
    base = folder / "one" / kind / "model" if "--way" in kind else model
    assert LLM(base, heads=folders[0]).generate("a tree", SamplingParams(max_tokens=8))[0].token_ids
    first, second = (_weights(folder) for folder in folders)
    assert first.keys() == second.keys()
    for name, weight in first.items():
        change = float((second[name] - weight).norm() / weight.norm().clamp(min=1e-6))
        assert change < 0.1, (kind, name, change)


def _weights(folder: Path) -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file

    return {
        name: weight.float()
        for file in sorted(folder.glob("*.safetensors"))
        for name, weight in load_file(file).items()
        if weight.is_floating_point()
    }
