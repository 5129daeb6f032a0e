"""What takes long is told as it begins."""

from __future__ import annotations

import io
import logging
from pathlib import Path

import numba
import pytest
import torch
from rich.console import Console

from tests.gguf_files import write_gguf
from tests.tiny_models import tiny, tiny_tokenizer
from tokentree import LLM, SamplingParams
from tokentree.cli.terminal import working
from tokentree.converted import converted
from tokentree.costs import cost_curve
from tokentree.engines.cpu.packed_file import Place
from tokentree.engines.torch import TorchEngine
from tokentree.progress import told


class Saved:
    def save_pretrained(self, folder: Path) -> None:
        (folder / "file").touch()


def test_no_bar_goes_to_standard_output(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    write_gguf(tmp_path / "tiny.gguf", tiny("llama", vocab_size=300), tiny_tokenizer())
    LLM(tmp_path / "tiny.gguf").generate(["one", "two"], SamplingParams(max_tokens=4), progress=True)
    assert capfd.readouterr().out == ""


def test_phases_are_told_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TOKENTREE_CACHE", str(tmp_path / "cache"))
    (tmp_path / "model.gguf").touch()

    def start() -> list[str]:
        phases = list[str]()
        with told(phases.append):
            converted(tmp_path / "model.gguf", "tokenizer", Saved, lambda _: Saved())
            cost_curve(TorchEngine(tiny("qwen2", torch.bfloat16), kept=Place(tmp_path / "packed.pt", "a model")))
        return [phase for phase in phases if not phase.startswith("compiling")]

    assert start() == [
        "converting model.gguf, tokenizer (once)",
        "packing weights (once)",
        "measuring what a forward costs here (once)",
    ]
    assert start() == []


def test_compiling_is_told(caplog: pytest.LogCaptureFixture) -> None:
    phases = list[str]()
    with told(phases.append):
        numba.njit(lambda x: x + 1)(1)
        logging.getLogger("tokentree.some.module").info("100%% of %s", "it")
    numba.njit(lambda x: x + 2)(1)
    logging.getLogger("tokentree").info("to nobody")
    assert phases == ["compiling loops for this CPU (once)", "100% of it"]
    assert not caplog.records


def test_a_terminal_shows_them_and_names_as_they_are() -> None:
    screen = io.StringIO()
    with working(Console(file=screen, force_terminal=True, width=70), "loading a[red]b:smile:"):
        logging.getLogger("tokentree").info("converting [bold].gguf")
    assert "loading a[red]b:smile:" in screen.getvalue()
    assert "converting [bold].gguf" in screen.getvalue()
    pipe = io.StringIO()
    with working(Console(file=pipe, width=70), "loading"):
        logging.getLogger("tokentree").info("converting")
    assert pipe.getvalue() == ""
