"""What the command says of itself."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from importlib.metadata import version
from typing import Any

import pytest
import typer

from tests.cli.test_cli import Command, run  # noqa: F401  a fixture
from tokentree.acceptance import acceptance
from tokentree.cli.main import app
from tokentree.drafters.names import DRAFTERS, LOOKUPS
from tokentree.engines.names import ENGINES
from tokentree.errors import OptionError
from tokentree.loading import DTYPES
from tokentree.shapes.parse import KINDS


def _commands(command: Any, words: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
    yield words, command
    for name, one in getattr(command, "commands", {}).items():
        yield from _commands(one, (*words, name))


COMMANDS = dict(_commands(typer.main.get_command(app)))


def test_the_version_is_the_package_s(run: Command) -> None:  # noqa: F811
    assert run("--version") == (0, f"tokentree {version('tokentree')}\n", "")


@pytest.mark.parametrize("words", COMMANDS, ids=" ".join)
def test_every_command_and_option_has_help(
    run: Command,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
    words: tuple[str, ...],
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    (code, short, err), (_, long, _) = run(*words, "-h"), run(*words, "--help")
    assert (code, err) == (0, "")
    assert short == long
    assert short.startswith("Usage: tokentree")
    for param in COMMANDS[words].params:
        if not words or words[0] not in ("train", "plot"):
            assert param.help, param.name
        assert all(option in short for option in param.opts if param.param_type_name == "option")


def test_commands_stand_in_a_user_s_order_with_whole_sentences(
    run: Command,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("COLUMNS", "60")
    told = run("-h")[1]
    order = (
        "generate",
        "chat",
        "serve",
        "check",
        "bench",
        "report",
        "plot",
        "calibrate",
        "train",
        "theory",
        "simulate",
        "plan",
    )
    places = [told.index(f"\n  {name} ") for name in order]
    assert places == sorted(places)
    flat = " ".join(told.split())
    for words, command in COMMANDS.items():
        if len(words) == 1:
            assert " ".join(command.help.split()) in flat, words
    assert "..." not in told.partition("Commands:")[2]


def test_help_names_all_that_there_is(run: Command) -> None:  # noqa: F811
    told = " ".join(run("generate", "-h")[1].split())

    def of(option: str) -> str:
        return told.partition(f" --{option} ")[2].partition(" --")[0]

    assert [name for name in DRAFTERS if name not in of("drafter")] == []
    assert ", ".join(LOOKUPS) in of("drafter")
    assert [name for name in ENGINES.ours if name not in of("engine")] == []
    assert [name for name in KINDS if name not in of("shape")] == []
    assert [name for name in DTYPES if name not in of("dtype")] == []
    with pytest.raises(OptionError, match="choose one of") as raised:
        acceptance("none of them")
    rules = str(raised.value).partition("choose one of ")[2].split(", ")
    assert [rule for rule in rules if rule not in of("accept")] == []
    lossless, lossy, _ = of("accept").replace("lossless", "|").replace("lossy", "|").split("|")
    assert [rule for rule in rules if (rule in lossy) is not acceptance(rule).lossy] == []
    assert [rule for rule in rules if (rule in lossless) is acceptance(rule).lossy] == []


def test_options_stand_under_what_they_are_about(run: Command) -> None:  # noqa: F811
    told = run("generate", "-h")[1]
    headings = [line for line in told.splitlines() if line.endswith(":") and not line.startswith(" ")]
    assert headings == [
        "Arguments:",
        "Model:",
        "Options:",
        "Drafting:",
        "Sampling:",
        "Beam search:",
        "Structured outputs:",
    ]


@pytest.mark.parametrize(
    ("line", "found"),
    [("tokentree ge", "generate"), ("tokentree generate --dra", "--drafter"), ("tokentree plot a", "acceptance")],
)
def test_a_shell_completes_words(line: str, found: str) -> None:
    names = {"_TOKENTREE_COMPLETE": "complete_bash", "COMP_WORDS": line, "COMP_CWORD": str(len(line.split()) - 1)}
    command = [sys.executable, "-m", "tokentree"]
    done = subprocess.run(command, env=os.environ | names, capture_output=True, text=True, check=True)
    assert found in done.stdout.split()


def test_the_script_for_a_shell_is_shown(run: Command, monkeypatch: pytest.MonkeyPatch) -> None:  # noqa: F811
    monkeypatch.setattr("shellingham.detect_shell", lambda *_: ("bash", "/bin/bash"))  # whoever runs the tests
    code, out, _ = run("--show-completion", "bash")
    assert code == 0
    assert "_TOKENTREE_COMPLETE=complete_bash" in out
