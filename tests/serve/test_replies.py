"""Answers have the form that the interface tells."""

from __future__ import annotations

import json
from typing import Any

import pytest

from tests.serve.serving import Served, events_of
from tokentree.serve import replies

MESSAGES = [{"role": "user", "content": "one two"}]
ALL: dict[str, Any] = {
    "max_tokens": 20, "seed": 3, "n": 2, "return_token_ids": True, "return_tree": True,
    "speculation": {"drafter": "suffix+ngram", "shape": "2x2"},
}  # fmt: skip


@pytest.mark.parametrize("more", [{}, ALL], ids=["short", "all"])
@pytest.mark.parametrize(
    ("path", "body", "whole", "part"),
    [
        ("/v1/completions", {"prompt": "one two", "logprobs": 2}, replies.Completion, replies.Completion),
        ("/v1/completions", {"prompt": ["a", "b"]}, replies.Completion, replies.Completion),
        (
            "/v1/chat/completions",
            {"messages": MESSAGES, "logprobs": True, "top_logprobs": 2},
            replies.ChatCompletion,
            replies.ChatCompletionChunk,
        ),
        (
            "/v1/chat/completions",
            {"messages": MESSAGES, "max_tokens": 4},
            replies.ChatCompletion,
            replies.ChatCompletionChunk,
        ),
    ],
)
def test_texts(
    served: Served, path: str, body: dict[str, Any], more: dict[str, Any], whole: type[replies.Answered],
    part: type[replies.Answered],
) -> None:  # fmt: skip
    once = whole.model_validate(served.post(path, body | more).json())
    assert once.usage is not None
    options = {"stream": True, "stream_options": {"include_usage": True}}
    events = [part.model_validate(event) for event in events_of(served.post(path, body | more | options)) if event]
    assert len({event.id for event in events}) == 1
    assert events[-1].metrics is not None


@pytest.mark.parametrize(
    ("method", "path", "body", "reply"),
    [
        ("GET", "/v1/models", None, replies.Models),
        ("GET", "/v1/models/tiny", None, replies.Model),
        ("GET", "/version", None, replies.Version),
        ("POST", "/tokenize", {"prompt": "a", "return_token_strs": True}, replies.Tokenized),
        ("POST", "/detokenize", {"tokens": [5]}, replies.Detokenized),
        ("POST", "/detokenize", {"tokens": ["a"]}, replies.ErrorReply),
        ("GET", "/nothing", None, replies.ErrorReply),
    ],
)
def test_others(served: Served, method: str, path: str, body: Any, reply: type[replies.Reply]) -> None:
    reply.model_validate(served.http.request(method, path, json=body).json())


def test_the_interface_tells_them_and_no_others(served: Served) -> None:
    spec = served.http.get("/openapi.json").json()
    for path, methods in spec["paths"].items():
        for route in methods.values():
            assert "422" not in route["responses"], path
            assert path == "/health" or {"4XX", "5XX"} <= set(route["responses"]), path
    told = json.dumps(spec["paths"])
    for name in ("Completion", "ChatCompletion", "Models", "Tokenized", "ErrorReply"):
        assert f'"#/components/schemas/{name}"' in told
