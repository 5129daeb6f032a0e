"""Log-probabilities in the two forms of OpenAI's interface."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from tokentree.serve.tokens import HALF, TokenTexts
from tokentree.serve.writing import Written

LEAST = -9999.0  # stands for minus infinity, which JSON lacks


def chat_logprobs(tokens: Sequence[Written], texts: TokenTexts) -> dict[str, Any]:
    """As chats have them."""

    def one(token: int, logprob: float) -> dict[str, Any]:
        return {"token": texts.text(token), "logprob": max(logprob, LEAST), "bytes": texts.bytes(token)}

    content = []
    for written in tokens:
        known = written.logprobs
        assert known is not None
        top = [one(token, logprob) for token, logprob in known.top.items()]
        content.append(one(known.token, known.logprob) | {"top_logprobs": top})
    return {"content": content, "refusal": None}


def completion_logprobs(tokens: Sequence[Written], texts: TokenTexts) -> dict[str, Any]:
    """As completions have them. A token that is part of a character is called by its bytes, so that no two have one
    name."""

    def name(token: int) -> str:
        text = texts.text(token)
        return text if HALF not in text else "bytes:" + "".join(f"\\x{byte:02x}" for byte in texts.bytes(token))

    found: dict[str, list[Any]] = {"tokens": [], "token_logprobs": [], "top_logprobs": [], "text_offset": []}
    for written in tokens:
        known = written.logprobs
        assert known is not None
        top = {name(token): max(logprob, LEAST) for token, logprob in known.top.items()}
        text, logprob = name(known.token), max(known.logprob, LEAST)
        found["tokens"].append(text)
        found["token_logprobs"].append(logprob)
        found["top_logprobs"].append(top | {text: logprob})
        found["text_offset"].append(_offset(written, texts.text(known.token)))
    return found


def _offset(written: Written, text: str) -> int:
    """Where the ``text`` of a token begins in the output."""
    behind = len(written.text) - len(text) if HALF not in text and written.text.endswith(text) else 0
    return written.offset + behind
