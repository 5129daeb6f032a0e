"""The examples run, on the tiny models they make and on models in folders."""

from __future__ import annotations

import runpy
import sys
from pathlib import Path

import pytest
import torch

from tests.tiny_models import save_model, tiny, tiny_tokenizer

EXAMPLES = Path(__file__).parent.parent / "examples"


@pytest.fixture
def folders(tmp_path: Path) -> list[str]:
    """A target and a draft model with one tokenizer."""
    tokenizer = tiny_tokenizer()
    models = [tiny("llama", vocab_size=len(tokenizer), seed=seed) for seed in range(2)]
    return [str(save_model(tmp_path / str(seed), model, tokenizer)) for seed, model in enumerate(models)]


def run(name: str, *arguments: str) -> None:
    with pytest.MonkeyPatch.context() as patch, torch.random.fork_rng(devices=[]):
        patch.setattr(sys, "argv", [name, *arguments])
        runpy.run_path(str(EXAMPLES / name), run_name="__main__")


def test_transformers_generate(capsys: pytest.CaptureFixture[str]) -> None:
    run("transformers_generate.py")
    assert capsys.readouterr().out.splitlines() == [
        "40 tokens in 10 forwards of the target",
        "identical to plain decoding",
    ]


def test_transformers_generate_on_folders(folders: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    for arguments in (folders, folders[:1]):
        run("transformers_generate.py", *arguments)
        out = capsys.readouterr().out
        assert out.startswith("One, two, three, four.")
        assert "identical to plain decoding" in out


def test_tutorial_tree(capsys: pytest.CaptureFixture[str]) -> None:
    run("tutorial_tree.py")
    out = capsys.readouterr().out
    assert "[1, 0, 1, 0, 0, 0]" in out
    assert "identical to plain decoding" in out


def test_tutorial_tree_on_folders(folders: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    run("tutorial_tree.py", *folders)
    assert "identical to plain decoding" in capsys.readouterr().out
