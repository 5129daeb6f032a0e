"""What the documentation shows: its Python runs, on tiny models, and commands are such as the command takes."""

from __future__ import annotations

import ast
import importlib
import itertools
import json
import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import torch
import typer
from transformers import PreTrainedModel

from tests.conftest import decode
from tests.test_medusa import random_heads
from tests.tiny_models import TEXTS, request, save_model, some_tokens, tiny, tiny_pair, tiny_tokenizer
from tokentree import LLM
from tokentree.cli import app
from tokentree.engines.torch import TorchEngine
from tokentree.heads.saved import About, write_heads

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
            words = re.sub(r"^echo .*? \| ", "", words)
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


@pytest.fixture
def stand_ins(tmp_path: Path) -> dict[str, str]:
    """What stands for the models, folders and files that the pages name."""
    target, draft = (save_model(tmp_path / f"m{i}", model, tiny_tokenizer()) for i, model in enumerate(_pair()))
    write_heads(tmp_path / "heads", random_heads(48), "tiny", 300, About())
    texts = tmp_path / "data.jsonl"
    texts.write_text("\n".join(json.dumps({"text": text}) for text in TEXTS * 4))
    models = dict.fromkeys(("M", "MODEL", "path/or/hub-name"), str(target))
    return models | {
        "a/smaller-one": str(draft),
        "DIR": str(tmp_path / "heads"),
        "OUT": str(tmp_path / "new"),
        "texts.jsonl": str(texts),
    }


def _pair() -> tuple[PreTrainedModel, ...]:
    return tiny_pair(target_vocab=300, draft_vocab=300)


def _small(text: str, stand_ins: dict[str, str]) -> str:
    """The same on tiny models, with a few tokens."""
    for name, stand_in in stand_ins.items():
        text = text.replace(f'"{name}"', repr(stand_in))
    return re.sub(r"max_tokens=\d+", "max_tokens=9", text.replace("(temperature", "(max_tokens=9, temperature"))


@pytest.mark.parametrize("page", [page for page in PAGES if blocks(page, "python")], ids=lambda page: page.name)
def test_python_runs(page: Path, stand_ins: dict[str, str]) -> None:
    target, draft = _pair()
    inputs = {"input_ids": torch.tensor([some_tokens(6)]), "max_new_tokens": 8, "do_sample": False}
    for text in blocks(page, "python"):
        seen: dict[str, Any] = {"LLM": LLM, "model": target, "draft": draft, "inputs": inputs}
        exec(compile(_small(text, stand_ins), str(page), "exec"), seen)
        if "Echo" in seen:
            engine, ids = TorchEngine(tiny("llama")), some_tokens(9)
            expected = decode(engine, [request(ids, max_tokens=20)])
            assert decode(engine, [request(ids, max_tokens=20)], seen["Echo"](), "chain:2") == expected


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


def test_the_readme_s_commands_run_where_they_stand() -> None:
    """After `make demo`: what they read is in the checkout, or has a hub's form."""
    made = re.findall(r"^SMOLLM := \$\(MODELS\)/(\S+)", (ROOT / "Makefile").read_text(), re.MULTILINE)
    found = [words for words in commands(ROOT / "README.md") if words[0] != "report"]
    assert len(found) > 5
    for words in found:
        given = dict(itertools.pairwise(words))
        for option in ("--model", "-m", "--draft-model", "-d"):
            assert given.get(option, f".models/{made[0]}") == f".models/{made[0]}" or re.fullmatch(
                r"[\w.-]+/[\w.-]+", given[option]
            )
        for option in ("--prompts", "--reference", "--heads"):
            assert option not in given or (ROOT / given[option]).exists(), given[option]


def test_the_pages_have_both() -> None:
    assert sum(len(commands(page)) for page in PAGES) > 15
    assert sum(len(blocks(page, "python")) for page in PAGES) > 4
