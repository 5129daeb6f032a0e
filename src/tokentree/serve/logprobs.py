"""Log-probabilities in the two forms of OpenAI's interface."""

from __future__ import annotations

import codecs
from collections.abc import Sequence
from typing import Any, NamedTuple

from tokentree.sequence import Sequence as Request
from tokentree.sequence import TokenLogprobs
from tokentree.serve.tokens import HALF, TokenTexts
from tokentree.serve.writing import Written

LEAST = -9999.0  # stands for minus infinity, which JSON lacks
UTF8 = codecs.getincrementaldecoder("utf-8")


class Told(NamedTuple):
    """A token, its log-probabilities, if it has any, and where it begins in the text."""

    token: int
    known: TokenLogprobs | None
    offset: int


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


def of_written(tokens: Sequence[Written], texts: TokenTexts, before: int) -> list[Told]:
    """What completions tell of new tokens, behind so many characters."""
    return [Told(one.token, one.logprobs, before + _offset(one, texts.text(one.token))) for one in tokens]


def of_prompt(seq: Request, shown: str, texts: TokenTexts) -> list[Told]:
    """What completions tell of the prompt of ``seq``, which is ``shown`` as this text. A special token that was put
    before it isn't in it."""
    found, place, decoder = list[Told](), 0, UTF8("replace")
    for token, known in zip(seq.prompt_ids, seq.prompt_logprobs, strict=True):
        found.append(Told(token, known, place))
        text = decoder.decode(bytes(texts.bytes(token)))
        if not place and not shown.startswith(text):
            text = "" if token in texts.special.values() else text.removeprefix(" ")
        place = min(place + len(text), len(shown))
    return found


def completion_logprobs(tokens: Sequence[Told], texts: TokenTexts) -> dict[str, Any]:
    """As completions have them. A token that is part of a character is called by its bytes, so that no two have one
    name."""

    def name(token: int) -> str:
        text = texts.text(token)
        return text if HALF not in text else "bytes:" + "".join(f"\\x{byte:02x}" for byte in texts.bytes(token))

    found: dict[str, list[Any]] = {"tokens": [], "token_logprobs": [], "top_logprobs": [], "text_offset": []}
    for one in tokens:
        text, logprob, top = name(one.token), None, None
        if one.known is not None:
            logprob = max(one.known.logprob, LEAST)
            top = {name(token): max(value, LEAST) for token, value in one.known.top.items()} | {text: logprob}
        found["tokens"].append(text)
        found["token_logprobs"].append(logprob)
        found["top_logprobs"].append(top)
        found["text_offset"].append(one.offset)
    return found


def _offset(written: Written, text: str) -> int:
    """Where the ``text`` of a token begins in the output."""
    behind = len(written.text) - len(text) if HALF not in text and written.text.endswith(text) else 0
    return written.offset + behind
