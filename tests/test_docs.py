"""What the documentation shows: Python compiles and asks for what is there, commands are such as the command takes."""

from __future__ import annotations

import ast
import importlib
import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import typer

from tokentree.cli import app

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
BLOCK = re.compile(r"^```(\w*)\n(.*?)^```", re.MULTILINE | re.DOTALL)


def blocks(page: Path, *kinds: str) -> list[str]:
    return [text for kind, text in BLOCK.findall(page.read_text(encoding="utf-8")) if kind in kinds]


def commands(page: Path) -> list[list[str]]:
    """Lines that call the command, without what a shell does to them."""
    found = []
    for text in blocks(page, "", "sh"):
        for line in text.replace("\\\n", " ").splitlines():
            words = re.sub(r"^\$ ", "", line.strip()).partition(" # ")[0]
            if words.startswith("tokentree ") and page.name != "log.md":
                found.append(shlex.split(re.sub(r"\s[<>] \S+|&&.*", "", words))[1:])
    return found


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_python_compiles_and_names_what_is_there(page: Path) -> None:
    for text in blocks(page, "python"):
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.ImportFrom) and str(node.module).startswith("tokentree"):
                module = importlib.import_module(str(node.module))
                for alias in node.names:
                    assert hasattr(module, alias.name), f"{node.module}.{alias.name}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_commands_are_such_as_the_command_takes(page: Path) -> None:
    for words in commands(page):
        left = [word for word in words if word != "…"] + (
            ["…"] if "…" in words and words[0] in ("generate", "plot") else []
        )
        command: Any = typer.main.get_command(app)
        while hasattr(command, "commands"):
            assert left[0] in command.commands, left[0]
            command = command.commands[left.pop(0)]
        command.make_context(command.name, left).close()  # raises where it takes no such words


def test_the_pages_have_both() -> None:
    assert sum(len(commands(page)) for page in PAGES) > 15
    assert sum(len(blocks(page, "python")) for page in PAGES) > 4
