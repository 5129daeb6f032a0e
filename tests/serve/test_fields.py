"""Fields of OpenAI's interface that change nothing are taken, and those that would change the answer are not."""

from __future__ import annotations

import json
from typing import Any

import pytest
from openai.types import completion_create_params as completions
from openai.types.chat import completion_create_params as chats
from openai.types.responses import response_create_params as responses
from pydantic import ValidationError

from tests.serve.serving import NAME, Served, error_of
from tokentree.serve.protocol import Body, ChatRequest, CompletionRequest
from tokentree.serve.responses.protocol import ResponsesRequest

MESSAGES = [{"role": "user", "content": "one"}]
# a request, its least body, and what the official client may send
REQUESTS: list[tuple[type[Body], dict[str, Any], Any]] = [
    (CompletionRequest, {"prompt": "a"}, completions.CompletionCreateParamsBase),
    (ChatRequest, {"messages": MESSAGES}, chats.CompletionCreateParamsBase),
    (ResponsesRequest, {"input": "a"}, responses.ResponseCreateParamsBase),
]


@pytest.mark.parametrize(("kind", "least", "params"), REQUESTS, ids=["completions", "chats", "responses"])
def test_every_field_of_the_client_may_be_null(kind: type[Body], least: dict[str, Any], params: Any) -> None:
    assert len(params.__annotations__) > 15
    asked = kind(**dict.fromkeys(params.__annotations__) | least)
    assert asked.model_dump(exclude_none=True) == kind(**least).model_dump(exclude_none=True)


# of each request, what says nothing that isn't so anyway, and what asks for something that there isn't
VALUES: list[tuple[int, dict[str, Any], dict[str, Any]]] = [
    (0, {"suffix": ""}, {"suffix": "a"}),
    (1, {"reasoning_effort": "medium"}, {"reasoning_effort": "low"}),
    (1, {"verbosity": "medium"}, {"verbosity": "high"}),
    (1, {"functions": []}, {"functions": [{"name": "a"}]}),
    (1, {"function_call": "none"}, {"function_call": "auto"}),
    (1, {"prompt_cache_retention": "24h"}, {"prompt_cache_retention": "always"}),
    (1, {"modalities": ["text"]}, {"modalities": ["text", "audio"]}),
    (1, {"audio": None}, {"audio": {"voice": "a", "format": "mp3"}}),
    (2, {"reasoning": {"effort": "medium", "summary": None}}, {"reasoning": {"effort": "high"}}),
    (2, {"reasoning": {}}, {"reasoning": {"summary": "auto"}}),
    (2, {"text": {"verbosity": "medium"}}, {"text": {"verbosity": "low"}}),
    (2, {"top_logprobs": 0}, {"top_logprobs": 2}),
    (2, {"max_tool_calls": 3}, {"conversation": "a"}),
    (2, {"prompt": None}, {"prompt": {"id": "a"}}),
]


@pytest.mark.parametrize(("number", "taken", "refused"), VALUES, ids=str)
def test_values(number: int, taken: dict[str, Any], refused: dict[str, Any]) -> None:
    kind, least, _ = REQUESTS[number]
    kind(**least, **taken)
    with pytest.raises(ValidationError):
        kind(**least, **refused)


def test_all_samples_are_told(served: Served) -> None:
    made = served.client.completions.create(model=NAME, prompt="a", n=2, best_of=2, max_tokens=1, suffix="")
    assert len(made.choices) == 2
    assert served.client.completions.create(model=NAME, prompt="a", best_of=1, max_tokens=1).choices
    error = served.refused("/v1/chat/completions", {"messages": MESSAGES, "audio": {"voice": "a"}})
    assert error["message"] == "audio: this server doesn't have it: leave it out"


def test_whoever_asks_for_heads_alone_learns_whether_the_server_is_there(served: Served) -> None:
    for path in ("/health", "/ready"):
        answer = served.http.head(path)
        assert (answer.status_code, answer.content) == (200, b"")


def test_a_body_that_is_no_json_or_compressed_is_told_so(served: Served) -> None:
    body = json.dumps({"prompt": "a", "max_tokens": 1}).encode()
    for headers, status, code in (
        ({"Content-Type": "application/json", "Content-Encoding": "Identity"}, 200, ""),
        ({"Content-Type": "text/plain"}, 400, "invalid_json"),
        ({"Content-Type": "application/json", "Content-Encoding": "br"}, 415, "compressed_body"),
    ):
        answer = served.http.post("/v1/completions", content=body, headers=headers)
        assert answer.status_code == status
        assert status == 200 or error_of(answer)["code"] == code
