"""Trainings that start from heads which an earlier one has made."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from typer.testing import CliRunner

from tests.conftest import by_night
from tests.tiny_models import save_model, tiny, tiny_tokenizer
from tests.train.test_eagle import llm
from tokentree import LLM
from tokentree.cli.main import app
from tokentree.engines.drafting import HasHiddenStates
from tokentree.errors import OptionError, PairingError
from tokentree.train.loop import CHECKPOINT, Recipe
from tokentree.train.run import Trained, train_medusa
from tokentree.train.run_block import train_block
from tokentree.train.run_eagle import train_eagle

KINDS: dict[str, tuple[Callable[..., Trained], dict[str, Any], dict[str, Any], str]] = {
    "eagle": (train_eagle, {"unroll": 2, "taps": [0, 1, 2]}, {"taps": [0, 1, 1]}, r"taps \(0, 1, 2\).*\(0, 1, 1\)"),
    "eagle 1": (train_eagle, {"version": 1}, {"version": 3, "taps": [0, 1, 2]}, "version 1, and this training 3"),
    "block": (
        train_block, {"kind": "dflash2", "block_size": 4, "markov_rank": 4, "num_layers": 1, "pace": 0.5},
        {"block_size": 5}, "block_size 5, and this training 6",  # with the anchor
    ),
    "medusa": (train_medusa, {"num_heads": 2}, {"num_heads": 3}, "num_heads 2, and this training 3"),
}  # fmt: skip


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("data") / "texts.jsonl"
    words = ("a tree", "an owl", "rain", "one two")
    file.write_text("".join(
        json.dumps({"text": f"{words[n % 4]} {n} and {words[n % 3]} {n} again", "kind": words[n % 2]}) + "\n"
        for n in range(48)
    ))  # fmt: skip
    return file


def recipe(kind: str, **changes: Any) -> Recipe:
    size = 32 if kind == "medusa" else 4
    return Recipe(
        **{"epochs": 2, "batch_size": size, "learning_rate": 3e-3, "evaluate_every": 4, "patience": 99} | changes
    )


def train(kind: str, out: Path, data: Path, changes: dict[str, Any] | None = None, **options: Any) -> Trained:
    function, own, _, _ = KINDS[kind]
    settings = {"known_tokens": 200, "work": out.parent / "work"} | own | options
    return function(llm(), "tiny", data, out, recipe(kind, **changes or {}), **settings)


@pytest.fixture(scope="module")
def made(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The folder of trained heads of a kind."""
    return functools.cache(lambda kind: train(kind, tmp_path_factory.mktemp(kind) / "heads", data).folder)


@pytest.mark.parametrize("kind", by_night(KINDS, but=[*KINDS][::2]))
def test_a_training_goes_on_from_heads_and_keeps_them_where_it_makes_them_worse(
    kind: str, made: Callable[[str], Path], data: Path, tmp_path: Path
) -> None:  # fmt: skip
    first = made(kind)
    better = train(kind, tmp_path / "better", data, start=first)
    begun = torch.load(tmp_path / "better" / "work" / CHECKPOINT, weights_only=True)
    before = torch.load(first / "work" / CHECKPOINT, weights_only=True)
    assert begun["least"] < before["least"]
    assert "start: " in (better.folder / "README.md").read_text()
    assert "| an owl |" in (better.folder / "README.md").read_text()
    # a step that is far too long
    worse = train(kind, tmp_path / "worse", data, {"learning_rate": 50.0, "warmup_steps": 0}, start=first)
    one, other = (load_file(folder / "model.safetensors") for folder in (first, worse.folder))
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_an_interrupted_one_goes_on_to_the_same_head(
    made: Callable[[str], Path], data: Path, tmp_path: Path
) -> None:  # fmt: skip
    start = made("eagle")
    whole = train("eagle", tmp_path / "whole", data, start=start)
    train("eagle", tmp_path / "parts", data, start=start, stop_after=5)
    again = train("eagle", tmp_path / "parts", data, start=start)
    assert again.figures == whole.figures
    one, other = (load_file(done.folder / "model.safetensors") for done in (whole, again))
    assert all(torch.equal(one[name], other[name]) for name in one)
    with pytest.raises(OptionError, match="a training with other settings: start "):
        train("eagle", tmp_path / "parts", data, start=again.folder)


def test_an_eagle_head_may_learn_other_tokens(data: Path, tmp_path: Path) -> None:
    start = train("eagle", tmp_path / "start", data, {"epochs": 1}, known_tokens=60).folder
    no_step = {"learning_rate": 1e-30, "warmup_steps": 0, "epochs": 1}
    more = train("eagle", tmp_path / "more", data, no_step, start=start, known_tokens=90).folder
    weights = [load_file(folder / "model.safetensors") for folder in (start, more)]
    known = [(one["d2t"] + torch.arange(len(one["d2t"]))).tolist() for one in weights]
    assert [len(tokens) for tokens in known] == [60, 90]
    assert {*known[0]} < {*known[1]}
    engine = llm().engine
    assert isinstance(engine, HasHiddenStates)
    output = engine.capture([]).output_weights(torch.tensor(known[1]))[0]
    for row, token in enumerate(known[1]):
        trained = weights[0]["lm_head.weight"][known[0].index(token)] if token in known[0] else output[row]
        assert torch.equal(weights[1]["lm_head.weight"][row], trained.to(weights[1]["lm_head.weight"].dtype))
    one, other = (
        {name: w for name, w in found.items() if name not in {"lm_head.weight", "d2t", "t2d"}} for found in weights
    )
    assert all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("kind", KINDS)
def test_heads_that_are_made_otherwise_are_no_start(
    kind: str, made: Callable[[str], Path], data: Path, tmp_path: Path
) -> None:  # fmt: skip
    start = made(kind)
    _, _, changes, message = KINDS[kind]
    with pytest.raises(OptionError, match=f"can't start from the heads in .*: they have .*{message}") as error:
        train(kind, tmp_path / "out", data, start=start, **changes)
    assert "\n" not in str(error.value)
    if not kind.startswith("eagle"):
        with pytest.raises(OptionError, match="200, and this training 100"):
            train(kind, tmp_path / "out", data, start=start, known_tokens=100)
    other = tiny("llama", vocab_size=300, num_hidden_layers=3)
    function, own, _, _ = KINDS[kind]
    another = LLM(other, tokenizer=tiny_tokenizer())
    with pytest.raises(PairingError, match="whose configuration is not this model's"):
        function(another, "tiny", data, tmp_path / "out", start=start, **own)


def test_the_command_starts_from_heads(tmp_path: Path, data: Path) -> None:
    base = save_model(tmp_path / "base", tiny("llama", vocab_size=300, num_hidden_layers=6), tiny_tokenizer())
    args = ["train", "medusa", "--model", str(base), "--data", str(data), "--epochs", "1", "--batch-size", "64"]
    args += ["--heads", "2", "--known-tokens", "200", "--work", str(tmp_path / "work")]
    assert CliRunner().invoke(app, [*args, "--out", str(tmp_path / "one")]).exit_code == 0
    done = CliRunner().invoke(app, [*args, "--out", str(tmp_path / "two"), "--start", str(tmp_path / "one")])
    assert done.exit_code == 0, done.output
    assert "step 0/" in done.output
    assert "tokens a step by kind: a tree " in done.output
