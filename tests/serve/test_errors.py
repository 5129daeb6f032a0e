"""Whatever can't be honoured is an error in OpenAI's form that names the field."""

from __future__ import annotations

import logging
from typing import Any

import openai
import pytest

from tests.serve.serving import NAME, Served, error_of, serving, tiny_llm

HELLO: list[Any] = [{"role": "user", "content": "hello"}]
DEEP: Any = {"type": "string"}
for _ in range(40):
    DEEP = {"items": DEEP}


def schema(of: Any, **more: Any) -> dict[str, Any]:
    return {"response_format": {"type": "json_schema", "json_schema": {"name": "a", "schema": of} | more}}


BOTH: list[tuple[dict[str, Any], str]] = [
    ({"tempersture": 1}, "tempersture"),
    ({"temperature": -1}, "temperature"),
    ({"temperature": "1"}, "temperature"),
    ({"temperature": [1]}, "temperature"),
    ({"top_p": 0}, "top_p"),
    ({"top_p": 1.5}, "top_p"),
    ({"top_k": -2}, "top_k"),
    ({"top_k": 1.5}, "top_k"),
    ({"min_p": 2}, "min_p"),
    ({"presence_penalty": "a"}, "presence_penalty"),
    ({"frequency_penalty": 1e12}, "frequency_penalty"),
    ({"repetition_penalty": 0}, "repetition_penalty"),
    ({"n": 0}, "n"),
    ({"n": 17}, "n"),
    ({"n": True}, "n"),
    ({"seed": -1}, "seed"),
    ({"seed": 1.5}, "seed"),
    ({"seed": 2**64}, "seed"),
    ({"max_tokens": 0}, "max_tokens"),
    ({"max_tokens": 300}, "max_tokens"),
    ({"max_tokens": 2.5}, "max_tokens"),
    ({"min_tokens": -1}, "min_tokens"),
    ({"stop": ""}, "stop"),
    ({"stop": [""]}, "stop"),
    ({"stop": 5}, "stop"),
    ({"stop": ["a", 5]}, "stop"),
    ({"stop": ["a"] * 17}, "stop"),
    ({"stop": "a" * 300}, "stop"),
    ({"stop_token_ids": [-1]}, "stop_token_ids"),
    ({"stop_token_ids": ["a"]}, "stop_token_ids[0]"),
    ({"stop_token_ids": [300]}, "stop_token_ids"),
    ({"ignore_eos": 1}, "ignore_eos"),
    ({"logit_bias": {"a": 1}}, "logit_bias"),
    ({"logit_bias": {"-1": 1}}, "logit_bias"),
    ({"logit_bias": {"300": 1}}, "logit_bias"),
    ({"logit_bias": {"05": 1}}, "logit_bias"),
    ({"logit_bias": {" 5": 1}}, "logit_bias"),
    ({"logit_bias": {"\u0665": 1}}, "logit_bias"),
    ({"logit_bias": {"9" * 5000: 1}}, "logit_bias"),
    ({"logit_bias": {"3": "a"}}, "logit_bias"),
    ({"logit_bias": {str(i): 1 for i in range(1025)}}, "logit_bias"),
    ({"model": "gpt-4"}, "model"),
    ({"stream": "yes"}, "stream"),
    ({"stream_options": {"include_usage": True}}, "stream_options"),
    ({"stream": True, "stream_options": {"usage": True}}, "stream_options.usage"),
    ({"stream": True, "stream_options": {"include_obfuscation": True}}, "stream_options.include_obfuscation"),
    ({"response_format": "json"}, "response_format"),
    ({"response_format": {"type": "xml"}}, "response_format.type"),
    ({"response_format": {"type": "json_schema"}}, "response_format.json_schema"),
    ({"response_format": {"type": "json_schema", "json_schema": {"name": "a"}}}, "response_format.json_schema.schema"),
    ({"response_format": {"type": "text", "json_schema": {"name": "a", "schema": {}}}}, "response_format.json_schema"),
    (schema({}, name="a b"), "response_format.json_schema.name"),
    (schema({}, more=1), "response_format.json_schema.more"),
    (schema({"type": "array", "uniqueItems": True}), "response_format"),
    (schema({"type": "string", "minLength": 2, "maxLength": 1}), "response_format"),
    (schema({"enum": ["a" * 70_000]}), "response_format"),
    (schema(DEEP), "response_format"),
    (schema({}) | {"ignore_eos": True}, "response_format"),
    (schema({}) | {"structured_outputs": {"regex": "a"}}, "structured_outputs"),
    ({"structured_outputs": {}}, "structured_outputs"),
    ({"structured_outputs": {"regex": "("}}, "structured_outputs"),
    ({"structured_outputs": {"regex": "a", "choice": ["a"]}}, "structured_outputs"),
    ({"structured_outputs": {"regex": 5}}, "structured_outputs.regex"),
    ({"structured_outputs": {"json": 5}}, "structured_outputs.json"),
    ({"structured_outputs": {"json": "{"}}, "structured_outputs"),
    ({"structured_outputs": {"grammar": "start: b"}}, "structured_outputs"),
    ({"structured_outputs": {"choice": []}}, "structured_outputs"),
    ({"structured_outputs": {"structural_tag": "a"}}, "structured_outputs.structural_tag"),
    ({"speculation": "on"}, "speculation"),
    ({"speculation": {"accept": "typical"}}, "speculation"),
    ({"speculation": {"drafter": "nothing"}}, "speculation"),
    ({"speculation": {"drafter": "eagle"}}, "speculation"),
    ({"speculation": {"shape": "round"}}, "speculation"),
    ({"return_tree": "yes"}, "return_tree"),
    ({"user": 5}, "user"),
    ({"best_of": 2}, "best_of"),
    ({"num_beams": 2}, "num_beams"),
]
OF_COMPLETIONS: list[tuple[dict[str, Any], str]] = [
    ({"prompt": ""}, "prompt"),
    ({"prompt": []}, "prompt"),
    ({"prompt": [[]]}, "prompt"),
    ({"prompt": ["a", ""]}, "prompt"),
    ({"prompt": None}, "prompt"),
    ({"prompt": {"a": 1}}, "prompt"),
    ({"prompt": [1, "a"]}, "prompt"),
    ({"prompt": [1.5]}, "prompt"),
    ({"prompt": [True]}, "prompt"),
    ({"prompt": ["a"] * 65}, "prompt"),
    ({"prompt": [5] * 320}, "prompt"),
    ({"prompt": "a b " * 400}, "prompt"),
    ({"logprobs": 21}, "logprobs"),
    ({"logprobs": -1}, "logprobs"),
    ({"logprobs": True}, "logprobs"),
    ({"suffix": "a"}, "suffix"),
    ({"best_of": 1, "n": 2}, "best_of"),
    ({"messages": HELLO}, "messages"),
    ({"store": False}, "store"),
]
OF_CHATS: list[tuple[dict[str, Any], str]] = [
    ({"messages": []}, "messages"),
    ({"messages": None}, "messages"),
    ({"messages": "hello"}, "messages"),
    ({"messages": ["hello"]}, "messages[0]"),
    ({"messages": [{"content": "a"}]}, "messages[0].role"),
    ({"messages": [{"role": "user"}]}, "messages"),
    ({"messages": [{"role": "wizard", "content": "a"}]}, "messages[0].role"),
    ({"messages": [*HELLO, {"role": "user", "content": 5}]}, "messages[1].content"),
    (
        {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "a"}}]}]},
        "messages[0].content",
    ),
    ({"messages": [{"role": "user", "content": "a", "mood": "b"}]}, "messages[0].mood"),
    ({"messages": [{"role": "assistant", "content": None, "tool_calls": [{}]}]}, "messages[0].tool_calls"),
    ({"messages": HELLO * 1025}, "messages"),
    ({"messages": [{"role": "user", "content": "a b " * 400}]}, "messages"),
    ({"logprobs": 2}, "logprobs"),
    ({"top_logprobs": 2}, "top_logprobs"),
    ({"logprobs": True, "top_logprobs": 21}, "top_logprobs"),
    ({"max_completion_tokens": 0}, "max_completion_tokens"),
    ({"max_completion_tokens": 3, "max_tokens": 4}, "max_tokens"),
    ({"tools": [{"type": "function"}]}, "tools"),
    ({"tool_choice": "auto"}, "tool_choice"),
    ({"parallel_tool_calls": True}, "parallel_tool_calls"),
    ({"functions": [{"name": "a"}]}, "functions"),
    ({"store": True}, "store"),
    ({"service_tier": "flex"}, "service_tier"),
    ({"modalities": ["audio"]}, "modalities[0]"),
    ({"metadata": {"a": 1}}, "metadata"),
    ({"reasoning_effort": "high"}, "reasoning_effort"),
    ({"verbosity": "low"}, "verbosity"),
    ({"function_call": "auto"}, "function_call"),
    ({"audio": {"voice": "a"}}, "audio"),
    ({"web_search_options": {}}, "web_search_options"),
    ({"prediction": {"type": "content"}}, "prediction.content"),
    ({"echo": True}, "echo"),
]


@pytest.fixture(scope="module")
def limited() -> Any:
    with serving(tiny_llm(), max_tokens=200) as served:
        yield served
        served.wait_idle()


def refuses(served: Served, path: str, body: dict[str, Any], param: str) -> None:
    error = served.refused(path, body, 404 if param == "model" else 400)
    told = error["param"]
    assert told is not None
    assert told == param or (told.startswith(param) and told[len(param)] in ".["), error


@pytest.mark.parametrize(("wrong", "param"), BOTH + OF_COMPLETIONS, ids=str)
def test_completions(limited: Served, wrong: dict[str, Any], param: str) -> None:
    refuses(limited, "/v1/completions", {"prompt": "a"} | wrong, param)


@pytest.mark.parametrize(("wrong", "param"), BOTH + OF_CHATS, ids=str)
def test_chats(limited: Served, wrong: dict[str, Any], param: str) -> None:
    refuses(limited, "/v1/chat/completions", {"messages": HELLO} | wrong, param)


@pytest.mark.parametrize(
    ("path", "body", "param"),
    [
        ("/tokenize", {}, "prompt"),
        ("/tokenize", {"prompt": "a", "messages": HELLO}, "prompt"),
        ("/tokenize", {"prompt": 5}, "prompt"),
        ("/tokenize", {"messages": HELLO, "add_special_tokens": True}, "add_special_tokens"),
        ("/tokenize", {"prompt": "a", "more": 1}, "more"),
        ("/tokenize", {"prompt": "a", "model": "b"}, "model"),
        ("/detokenize", {"tokens": [300]}, "tokens"),
        ("/detokenize", {"tokens": ["a"]}, "tokens[0]"),
        ("/detokenize", {}, "tokens"),
    ],
    ids=str,
)
def test_tokens(limited: Served, path: str, body: dict[str, Any], param: str) -> None:
    refuses(limited, path, body, param)


@pytest.mark.parametrize(
    ("content", "kind"),
    [
        (b"", "application/json"),
        (b"{", "application/json"),
        (b"[]", "application/json"),
        (b"5", "application/json"),
        (b"\xff", "application/json"),
        (b"[" * 100_000, "application/json"),
        (b'{"prompt": "a", "seed": ' + b"9" * 6000 + b"}", "application/json"),
        (b'{"prompt": "\\ud800"}', "application/json"),
        (b'{"prompt": "a", "temperature": NaN}', "application/json"),
        (b'{"prompt": "a", "temperature": 1e999}', "application/json"),
        (b'{"prompt": "a"}', "text/plain"),
    ],
    ids=lambda one: str(one)[:40],
)
def test_what_is_no_request_is_told(limited: Served, content: bytes, kind: str) -> None:
    answer = limited.http.post("/v1/completions", content=content, headers={"content-type": kind})
    assert answer.status_code == 400, answer.text
    error_of(answer)


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("GET", "/nothing", 404),
        ("GET", "/web/nothing", 404),
        ("POST", "/", 405),
        ("GET", "/v1/nothing", 404),
        ("GET", "/v1/models/nothing", 404),
        ("POST", "/v1/embeddings", 404),
        ("GET", "/v1/completions", 405),
        ("DELETE", "/v1/models", 405),
        ("POST", "/health", 405),
    ],
)
def test_other_pages_and_methods(limited: Served, method: str, path: str, status: int) -> None:
    answer = limited.http.request(method, path)
    assert answer.status_code == status
    error_of(answer)


def test_the_client_raises_what_it_knows(limited: Served) -> None:
    with pytest.raises(openai.BadRequestError) as bad:
        limited.client.completions.create(model=NAME, prompt="a", temperature=-1)
    assert bad.value.param == "temperature"
    with pytest.raises(openai.NotFoundError) as missing:
        limited.client.completions.create(model="gpt-4", prompt="a")
    assert missing.value.code == "model_not_found"


@pytest.mark.parametrize("stream", [False, True])
def test_a_request_whose_rules_fail(limited: Served, stream: bool) -> None:
    """Nothing is left to choose, as all tokens but the end are banned, and the end may not come yet."""
    end = next(iter(limited.llm.eos_ids))
    banned = {str(token): -(1e9) for token in range(300) if token != end}
    body = {"prompt": "a", "logit_bias": banned | {str(end): -1e9}, "min_tokens": 2, "stop_token_ids": [*range(300)]}
    answer = limited.post("/v1/completions", body | {"stream": stream})
    if not stream:
        assert answer.status_code == 400
        error_of(answer)
        return
    assert '"error":{"message":' in answer.text
    assert answer.text.rstrip().endswith("data: [DONE]")


def test_a_failure_of_the_server_is_told_without_its_words(
    limited: Served, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fails(*_: Any) -> None:
        raise RuntimeError("of the inside")

    monkeypatch.setattr(limited.llm, "prompt_ids", fails)
    with caplog.at_level(logging.ERROR):
        answer = limited.post("/v1/completions", {"prompt": "a"})
    assert answer.status_code == 500
    assert "inside" not in answer.text
    assert "of the inside" in caplog.text
    error_of(answer)
