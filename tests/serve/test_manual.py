"""The page about the server: its examples run, and it names all that there is."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import typer

from tests.serve.serving import NAME, Served, serving
from tests.serve.test_tools import llm_of
from tests.test_docs import blocks
from tokentree.cli.main import app
from tokentree.serve.metrics import Metrics
from tokentree.serve.protocol import ChatRequest, CompletionRequest
from tokentree.serve.responses.protocol import ResponsesRequest

PAGE = Path(__file__).parents[2] / "docs" / "serve.md"
TEXT = PAGE.read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def calling() -> Iterator[Served]:
    """A server whose model knows tools."""
    with serving(llm_of("hermes")) as served:
        yield served


def test_examples_run(calling: Served, capsys: pytest.CaptureFixture[str]) -> None:
    seen: dict[str, Any] = {}
    examples = blocks(PAGE, "py")
    assert len(examples) == 5
    for example in examples:
        exec(example.replace("http://localhost:8000", calling.url).replace('"MODEL"', f'"{NAME}"'), seen)
    told = capsys.readouterr().out
    assert "num_spec_steps" in told
    assert "'parent': -1" in told
    assert "name='weather'" in told
    seen["client"].close()


def test_calls_of_curl_are_answered(served: Served) -> None:
    calls = [text for text in blocks(PAGE, "sh") if text.startswith("curl")]
    assert calls
    for call in calls:
        words = shlex.split(call.replace("\\\n", " "))
        path = words[1].removeprefix("http://localhost:8000")
        answer = served.post(path, json.loads(words[words.index("-d") + 1]))
        assert answer.status_code == 200, answer.text


def test_the_tree_that_is_shown_has_the_form_of_real_ones(served: Served) -> None:
    (shown,) = (json.loads(text) for text in blocks(PAGE, "json"))
    answer = served.post("/v1/completions", {"prompt": "a", "max_tokens": 2, "return_tree": True}).json()
    real = answer["choices"][0]["trees"][0]
    assert set(shown) == set(real)
    assert set(shown["bonus"]) == set(real["bonus"])
    assert all(set(node) == set(real["nodes"][0]) for node in shown["nodes"])


def test_it_names_every_option_field_and_figure() -> None:
    command: Any = typer.main.get_command(app).commands["serve"]  # type: ignore[attr-defined]
    for option in command.params:
        assert f"`{option.opts[0]}`" in TEXT or f"`{option.opts[-1]}`" in TEXT, option.opts
    missing = [
        name
        for kind in (ChatRequest, CompletionRequest, ResponsesRequest)
        for name in kind.model_fields
        if f"`{name}`" not in TEXT
    ]
    assert [name for name in missing if name != "model"] == []
    names = re.findall(r"^# TYPE (\S+) (?:counter|histogram)", Metrics("a").scrape().decode(), re.MULTILINE)
    assert len(names) > 10
    assert [name for name in names if f"`{name}`" not in TEXT] == []
