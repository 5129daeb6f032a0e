"""What the documentation shows: its Python runs, on tiny models, and commands are such as the command takes. Its pages
are complete, in order, and can be read on a screen."""

from __future__ import annotations

import ast
import importlib
import inspect
import itertools
import json
import re
import runpy
import shlex
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
import typer
from transformers import PreTrainedModel

import tokentree
from tests.conftest import decode
from tests.drafters.test_medusa import random_heads
from tests.tiny_models import TEXTS, request, save_model, some_tokens, tiny, tiny_pair, tiny_tokenizer
from tokentree import LLM
from tokentree.cli.main import app
from tokentree.engines.torch import TorchEngine
from tokentree.heads.saved import About, write_heads

ROOT = Path(__file__).parent.parent
REFERENCE = sorted((ROOT / "docs" / "reference").glob("*.md"))
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")), *REFERENCE]
LONGEST = 99  # characters of a line of prose
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


def prose(page: Path) -> list[str]:
    """The lines of a page that are neither code nor a table's nor a picture."""
    text = BLOCK.sub("", page.read_text(encoding="utf-8"))
    return [line for line in text.splitlines() if not line.startswith(("|", "!["))]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_a_page_has_one_title_and_lines_that_can_be_read(page: Path) -> None:
    lines = prose(page)
    assert [line for line in lines if line.startswith("# ")] == lines[:1]
    assert [line for line in lines if len(line) > LONGEST and not line.startswith("## ")] == []


def test_every_page_is_in_the_manual_once() -> None:
    named = re.findall(r": (\S+\.md)$", (ROOT / "mkdocs.yml").read_text(encoding="utf-8"), re.MULTILINE)
    assert sorted(named) == sorted(str(page.relative_to(ROOT / "docs")) for page in (ROOT / "docs").rglob("*.md"))


def test_links_between_pages_lead_somewhere() -> None:
    for page in PAGES:
        for link in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", BLOCK.sub("", page.read_text(encoding="utf-8"))):
            assert (page.parent / link).exists(), f"{page.name}: {link}"


def documented() -> list[Any]:
    """All classes and functions that the reference shows, a module's own included."""
    shown = []
    for page in REFERENCE:
        for name in re.findall(r"^::: (\S+)$", page.read_text(encoding="utf-8"), re.MULTILINE):
            try:
                module = importlib.import_module(name)
            except ModuleNotFoundError:
                home, _, own = name.rpartition(".")
                shown.append(getattr(importlib.import_module(home), own))
                continue
            for own, value in vars(module).items():
                made_here = getattr(value, "__module__", "") == name
                if made_here and not own.startswith("_") and (inspect.isclass(value) or inspect.isfunction(value)):
                    shown.append(value)
    return shown


def test_the_reference_has_every_public_name_once() -> None:
    times = Counter(documented())
    assert [value for value, count in times.items() if count > 1] == []
    assert [name for name in tokentree.__all__ if getattr(tokentree, name) not in times] == []
    assert len(times) > len(tokentree.__all__) > 20
    for value in times:
        assert value.__doc__, value


def test_the_page_of_the_command_has_every_command_and_option() -> None:
    made = runpy.run_path(str(ROOT / "tools" / "manual.py"))
    page = (ROOT / "docs" / made["PAGE"]).read_text(encoding="utf-8")
    assert page.count(made["PLACE"]) == 1
    text = made["text"]()
    assert max(map(len, text.splitlines())) <= made["WIDTH"]
    context = typer.main.get_command(app).make_context("tokentree", [], resilient_parsing=True)
    commands = list(made["commands"](context))
    assert len(commands) > 10
    for one in commands:
        of_command = text.partition(f"## {one.command_path}\n")[2].partition("\n## ")[0]
        for option in one.command.get_params(one):
            assert all(name in of_command for name in option.opts), (one.command_path, option.opts)


def test_the_readme_is_short_and_its_table_is_of_the_report() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert len(text.split()) < 700
    report = (ROOT / "docs/results/smollm2-135m-turns/report.md").read_text(encoding="utf-8")
    gains = re.findall(r"\d\.\d\d\*{0,2} \(\d\.\d\d to \d\.\d\d\)", text)
    assert len(gains) > 10
    for gain in gains:
        value, interval = gain.replace("*", "").split(" ", 1)
        assert f"{value} {interval}" in report, gain
