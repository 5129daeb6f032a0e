"""Answers under a grammar are those of `LLM.generate` under the same grammar, whole and streamed."""

from __future__ import annotations

import json
import re
import threading
from typing import Any

import pytest

from tests.serve.serving import NAME, Served, serving, tiny_llm
from tests.serve.test_texts import MESSAGES, PROMPT, joined, same
from tokentree import LLM, SamplingParams, StructuredOutputs
from tokentree.errors import OptionError
from tokentree.serve.structured import prepare

SCHEMA: dict[str, Any] = {
    "type": "object",
    "properties": {"name": {"type": "string", "maxLength": 6}, "size": {"enum": ["S", "M", "L"]}},
    "required": ["name", "size"],
    "additionalProperties": False,
}
NAMED = {"name": "product", "description": "A product.", "schema": SCHEMA, "strict": True}
# what is asked for, and the same for `LLM`
KINDS: list[tuple[dict[str, Any], dict[str, Any]]] = [
    ({"response_format": {"type": "json_schema", "json_schema": NAMED}}, {"json": SCHEMA}),
    ({"response_format": {"type": "json_object"}}, {"json_object": True}),
    ({"structured_outputs": {"json": SCHEMA, "regex": None}}, {"json": SCHEMA}),
    ({"structured_outputs": {"json": json.dumps(SCHEMA)}}, {"json": SCHEMA}),
    ({"structured_outputs": {"regex": "[ab]{3,9}c"}}, {"regex": "[ab]{3,9}c"}),
    ({"structured_outputs": {"choice": ["yes", "no"]}}, {"choice": ["yes", "no"]}),
    ({"structured_outputs": {"grammar": 'start: "a" start | "b"'}}, {"grammar": 'start: "a" start | "b"'}),
    ({"structured_outputs": {"json_object": True}}, {"json_object": True}),
]


def params(wanted: dict[str, Any]) -> SamplingParams:
    return SamplingParams(max_tokens=60, temperature=1.0, seed=3, structured_outputs=StructuredOutputs(**wanted))


@pytest.mark.parametrize(("asked", "wanted"), KINDS, ids=[str(next(iter(one[0].values())))[:40] for one in KINDS])
def test_texts_are_those_of_the_library(served: Served, asked: dict[str, Any], wanted: dict[str, Any]) -> None:
    options: Any = {"model": NAME, "max_tokens": 60, "seed": 3, "extra_body": {"return_token_ids": True} | asked}
    create = served.client.completions.create
    results = served.llm.generate(PROMPT, params(wanted))
    same(create(prompt=PROMPT, **options).choices, results, lambda choice: choice.text)
    chunks = create(prompt=PROMPT, stream=True, **options)
    same(joined(chunks, lambda choice: choice.text, 1), results, lambda choice: choice.text)
    chat = served.client.chat.completions.create
    results = served.llm.generate([served.llm.chat_prompt(MESSAGES)], params(wanted))
    same(chat(messages=MESSAGES, **options).choices, results, lambda choice: choice.message.content)
    parts = chat(messages=MESSAGES, stream=True, **options)
    same(joined(parts, lambda choice: choice.delta.content, 1), results, lambda choice: choice.text)


def test_a_text_fits_its_schema(served: Served) -> None:
    form: Any = {"type": "json_schema", "json_schema": NAMED}
    whole = served.client.chat.completions.create(
        model=NAME, messages=MESSAGES, seed=1, response_format=form, max_tokens=200
    )
    assert whole.choices[0].finish_reason == "stop"
    said = json.loads(whole.choices[0].message.content or "")
    assert set(said) == {"name", "size"}
    assert said["size"] in "SML"


def test_every_sample_keeps_to_it(served: Served) -> None:
    body = {"prompt": ["a", "b"], "n": 3, "max_tokens": 60, "structured_outputs": {"regex": "[ab]{3,9}c"}}
    choices = served.post("/v1/completions", body).json()["choices"]
    assert len(choices) == 6
    assert all(re.fullmatch("[ab]{3,9}c", choice["text"]) for choice in choices)


def test_grammars_are_compiled_beside_the_loop(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    """A long compilation holds up no other request."""
    compiling, go_on = threading.Event(), threading.Event()
    sequence = LLM.sequence

    def slow(self: LLM, *args: Any) -> Any:
        compiling.set()
        assert go_on.wait(60)
        return sequence(self, *args)

    monkeypatch.setattr(LLM, "sequence", slow)
    answers: list[int] = []
    body = {"prompt": "a", "structured_outputs": {"regex": "a"}}
    thread = threading.Thread(target=lambda: answers.append(served.post("/v1/completions", body).status_code))
    thread.start()
    try:
        assert compiling.wait(60)
        assert served.http.get("/health", timeout=20).status_code == 200
        assert not answers
    finally:
        go_on.set()
        thread.join(60)
    assert answers == [200]


def test_the_tokenizer_is_read_before_requests_come() -> None:
    llm = tiny_llm()
    with serving(llm):
        assert llm._grammars._tokens is not None


def test_a_server_without_grammars_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(_: LLM) -> None:
        raise OptionError("structured_outputs needs llguidance")

    monkeypatch.setattr(LLM, "prepare_grammars", refuse)
    llm = tiny_llm()
    prepare(llm)
    monkeypatch.setattr(type(llm._grammars), "guide", lambda *_: refuse(llm))
    with serving(llm) as served:
        error = served.refused("/v1/completions", {"prompt": "a", "structured_outputs": {"regex": "a"}})
        assert error["param"] == "structured_outputs"
        assert served.post("/v1/completions", {"prompt": "a"}).status_code == 200
