"""Commands that a signal ends: what was there stays, one line at most, and the exit status that shells show for it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.cli.test_cli import Command, folder, run  # noqa: F401  fixtures
from tokentree.bench.results import Run

INT, TERM = signal.SIGINT, signal.SIGTERM
STATUS = {INT: 130, TERM: 143}
GENERATE = ("one two three one two", "--no-chat", "--max-tokens", 40)


def _signalled(function: Callable[..., Any], number: signal.Signals, call: int) -> Callable[..., Any]:
    """``function``, at whose end a signal comes when it is called for the ``call``-th time."""
    calls = 0

    def called(*args: Any, **options: Any) -> Any:
        nonlocal calls
        calls += 1
        result = function(*args, **options)
        if calls == call:
            os.kill(os.getpid(), number)
        return result

    return called


@pytest.mark.parametrize("number", [INT, TERM])
@pytest.mark.parametrize("more", [[], ["--stats", "--compare"]])
def test_a_text_that_is_interrupted_stays(
    run: Command,  # noqa: F811
    folder: Path,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
    number: signal.Signals,
    more: list[str],
) -> None:
    from tokentree.cli import show, terminal
    from tokentree.llm import LLM

    whole = run("generate", "-m", folder, *GENERATE)[1]
    monkeypatch.setattr(LLM, "plain", lambda self: pytest.fail("decoded plainly behind an interruption"))
    monkeypatch.setattr(show, "write", _signalled(terminal.write, number, 4))
    code, out, err = run("generate", "-m", folder, *GENERATE, *more)
    assert code == STATUS[number]
    assert out.endswith("\n")
    assert 4 < len(out) < len(whole)
    assert whole.startswith(out[:-1])
    assert err.endswith("interrupted\n")
    assert ("mean accepted length" in err) == bool(more)


@pytest.mark.parametrize("number", [INT, TERM])
def test_an_interruption_while_a_model_loads_says_nothing(
    run: Command,  # noqa: F811
    folder: Path,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
    number: signal.Signals,
) -> None:
    from tokentree.cli import generate as cli_generate

    monkeypatch.setattr(cli_generate, "load", _signalled(lambda *_, **__: None, number, 1))
    code, out, err = run("generate", "-m", folder, *GENERATE)
    assert (code, out, err.strip()) == (STATUS[number], "", "")


def test_a_run_that_is_interrupted_is_gone_on_with(
    run: Command,  # noqa: F811
    folder: Path,  # noqa: F811
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    prompts, out = tmp_path / "p.jsonl", tmp_path / "out"
    prompts.write_text('{"prompt": "one two"}\n{"prompt": "three"}\n')
    words = ["bench", "-m", folder, "--prompts", prompts, "--method", "plain", "--out", out, "--max-tokens", 3]
    with monkeypatch.context() as patch:
        patch.setattr(Run, "save", _signalled(Run.save, INT, 1))
        code, said, err = run(*words)
    assert (code, said) == (130, "")
    assert err.strip() == (
        f"interrupted: what was measured is kept in {str(out / 'results.json')!r}, and --resume goes on from there"
    )
    assert len(Run.load(out).samples) == 1
    assert run(*words, "--resume")[0] == 0
    assert len(Run.load(out).samples) == 2


def test_a_process_listens_to_signals_while_the_command_runs_alone() -> None:
    code = (
        "import signal, tokentree.cli.main, tokentree.__main__ as m;"
        "tokentree.cli.main.main = lambda: print(signal.getsignal(signal.SIGINT) is signal.SIG_DFL);"
        "m.start()"
    )
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert shown == "True\n"
    ignoring = "import os, signal; signal.signal(signal.SIGINT, signal.SIG_IGN); "
    asked = f"os.execv({sys.executable!r}, [{sys.executable!r}, '-c', {code!r}])"
    shown = subprocess.run([sys.executable, "-c", ignoring + asked], capture_output=True, text=True, check=True).stdout
    assert shown == "False\n"
