"""A server with OpenAI's interface answers."""

from __future__ import annotations

import json
import time
from collections import deque
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from contextlib import aclosing
from typing import Any

import httpx

from tokentree.chat import Message
from tokentree.chatting.answers import KEPT, Figures, Part
from tokentree.cli.trees import Step
from tokentree.errors import OptionError, TokenTreeError

OURS = "tokentree"  # who owns the models of `tokentree serve`
WAITS = httpx.Timeout(600, connect=10)  # seconds: a prompt may be long, and others' servers are silent meanwhile
LONGEST_LINE = 1 << 24  # bytes of an event
LONGEST_ERROR = 1 << 16  # bytes of an answer that says what is wrong


class RemoteError(TokenTreeError):
    """A server can't be reached, refuses, or says what can't be understood."""


class Remote:
    """Answers through ``/v1/chat/completions``.

    Args:
        url: of the server. One without a path gets ``/v1``.
        key: the API key; none if empty.
        model: by default the first one of the server.
        options: what each request says beside the messages, such as ``temperature``.
        client: makes the requests.

    Raises:
        OptionError: if ``url`` is none.
    """

    def __init__(
        self, url: str, key: str = "", model: str | None = None, options: dict[str, Any] | None = None,
        client: httpx.AsyncClient | None = None,
    ) -> None:  # fmt: skip
        self._url, self._model, self._options = base_of(url), model, options or {}
        headers = {"Authorization": f"Bearer {key}"} if key else {}
        self._client = client or httpx.AsyncClient(headers=headers, timeout=WAITS)
        self._ours, self._speculating = False, True
        self.name, self.figures, self._seen = model or "", Figures(), deque[Step](maxlen=KEPT)

    async def start(self) -> None:
        """Asks the server for its models.

        Raises:
            RemoteError: if it doesn't answer, or there is no model.
        """
        try:
            answer = await self._client.get(f"{self._url}/models")
            models = answer.json() if answer.is_success else None
            if models is None and (self._model is None or answer.status_code in (401, 403, 503)):
                raise RemoteError(_refused(answer.status_code, answer.content))
        except httpx.HTTPError as error:
            raise RemoteError(self._unreachable(error)) from None
        except ValueError as error:
            if isinstance(error, RemoteError):
                raise
            models = None  # not JSON
        known = [one for one in _list(models, "data") if isinstance(one, dict) and isinstance(one.get("id"), str)]
        if self._model is None:
            if not known:
                raise RemoteError(f"the server at {self._url} tells no models: name one by --model")
            self._model = known[0]["id"]
        self._ours = any(one.get("owned_by") == OURS for one in known if one["id"] == self._model)
        self.name = f"{self._model} at {self._url}"

    @property
    def steps(self) -> Sequence[Step]:
        return self._seen

    @property
    def drafters(self) -> Sequence[str]:
        return sorted({name for step in self._seen for names in step.drafters for name in names})

    async def answer(self, messages: Sequence[Message]) -> AsyncGenerator[Part]:
        self.figures = Figures()
        self._seen.clear()
        body = {
            "model": self._model, "messages": list(messages), "stream": True,
            "stream_options": {"include_usage": True},
        } | self._options  # fmt: skip
        if self._ours:
            body |= {"return_tree": True} | ({} if self._speculating else {"speculation": "off"})
        start, ended = time.monotonic(), False
        usage: Any = None
        try:
            async with self._client.stream("POST", f"{self._url}/chat/completions", json=body) as answer:
                if not answer.is_success:
                    raise RemoteError(_refused(answer.status_code, await _beginning(answer)))
                async with aclosing(_events(answer)) as events:
                    async for event in events:
                        usage = event if isinstance(event.get("usage"), dict) else usage
                        text, reason = self._read(event)
                        if text:
                            yield Part(text)
                        ended = ended or reason is not None
                        self.figures = _figures(
                            usage, time.monotonic() - start, reason == "length" or self.figures.cut
                        )  # fmt: skip
            if not ended:
                raise RemoteError("the server's answer broke off")
        except (httpx.HTTPError, httpx.StreamError) as error:
            raise RemoteError(self._unreachable(error)) from None

    def _read(self, event: dict[str, Any]) -> tuple[str, str | None]:
        """The text of an event, and why the answer ends there; keeps its trees."""
        if event.get("error"):
            raise RemoteError(f"the server failed: {_said(event)}")
        choices = [one for one in _list(event, "choices") if isinstance(one, dict)]
        if not choices:
            return "", None
        delta, reason = choices[0].get("delta"), choices[0].get("finish_reason")
        for tree in _list(choices[0], "trees"):
            if (step := step_in(tree)) is not None:
                self._seen.append(step)
        text = delta.get("content") if isinstance(delta, dict) else None
        return text if isinstance(text, str) else "", reason if isinstance(reason, str) else None

    def speculate(self, on: bool) -> None:
        self._check_ours("chooses how it drafts")
        self._speculating = on

    def check_trees(self) -> None:
        self._check_ours("tells its trees")

    def _check_ours(self, does: str) -> None:
        if not self._ours:
            raise OptionError(f"this server isn't `tokentree serve`, which alone {does}")

    async def close(self) -> None:
        await self._client.aclose()

    def _unreachable(self, error: Exception) -> str:
        if isinstance(error, httpx.TimeoutException):
            return f"the server at {self._url} doesn't answer in time"
        said = (str(error).splitlines() or [type(error).__name__])[0] or type(error).__name__
        return f"can't reach the server at {self._url}: {said[:200]}"


def base_of(url: str) -> str:
    """The address before ``/chat/completions``.

    Raises:
        OptionError: if ``url`` is none.
    """
    try:
        parsed = httpx.URL(url)
    except (httpx.InvalidURL, UnicodeError):
        parsed = httpx.URL("")
    if parsed.scheme not in ("http", "https") or not parsed.host or parsed.query or parsed.fragment:
        raise OptionError(f"--url {url!r} is no address of a server: write it as http://localhost:8000")
    path = parsed.path.rstrip("/")
    return str(parsed.copy_with(path=path or "/v1"))


async def _events(answer: httpx.Response) -> AsyncGenerator[dict[str, Any]]:
    """The events of a stream, up to its end. Lines end at newlines alone: a text may hold other ends."""
    async for line in _lines(answer.aiter_bytes()):
        if not line.startswith(b"data:"):
            continue
        said = line[5:].strip()
        if said == b"[DONE]":
            return
        try:
            event = json.loads(said)
        except (ValueError, RecursionError):
            event = None
        if not isinstance(event, dict):
            raise RemoteError("the server's answer is no stream of events in JSON")
        yield event


async def _lines(parts: AsyncIterator[bytes]) -> AsyncGenerator[bytes]:
    rest = b""
    async for part in parts:
        *lines, rest = (rest + part).split(b"\n")
        for line in lines:
            yield line
        if len(rest) > LONGEST_LINE:
            raise RemoteError("the server's answer has a line without an end")
    yield rest


async def _beginning(answer: httpx.Response) -> bytes:
    found = b""
    async for part in answer.aiter_bytes():
        found += part
        if len(found) > LONGEST_ERROR:
            break
    return found


def _refused(status: int, content: bytes) -> str:
    try:
        said = _said(json.loads(content))
    except (ValueError, RecursionError):
        said = ""
    return f"the server refuses (status {status})" + (f": {said}" if said else "")


def _said(body: Any) -> str:
    """What an error says, on a line."""
    error = body.get("error", body.get("detail", body.get("message"))) if isinstance(body, dict) else None
    said = error.get("message") if isinstance(error, dict) else error
    return " ".join(said.split())[:500] if isinstance(said, str) else ""


def _list(value: Any, name: str) -> list[Any]:
    found = value.get(name) if isinstance(value, dict) else None
    return found if isinstance(found, list) else []


def _figures(event: Any, seconds: float, cut: bool) -> Figures:
    """What an event with usage tells, and `tokentree serve` beside it."""
    event = event if isinstance(event, dict) else {}
    usage, told = _dict(event, "usage"), _dict(_dict(event, "metrics"), "speculative_decoding")
    tokens, accepted = _count(usage, "completion_tokens"), _count(told, "num_accepted_draft_tokens")
    by_drafter = _dict(told, "accepted_by_drafter")
    return Figures(
        tokens,
        seconds,
        max(1, tokens - accepted) if tokens is not None and accepted is not None else None,
        {str(name): count for name, count in by_drafter.items() if isinstance(count, int)},
        _count(usage, "prompt_tokens"),
        _count(_dict(usage, "prompt_tokens_details"), "cached_tokens"),
        cut,
        with_prompt=True,
    )


def _dict(value: dict[str, Any], name: str) -> dict[str, Any]:
    found = value.get(name)
    return found if isinstance(found, dict) else {}


def _count(value: dict[str, Any], name: str) -> int | None:
    found = value.get(name)
    return found if isinstance(found, int) and found >= 0 else None


def step_in(tree: Any) -> Step | None:
    """The step that an entry of ``trees`` tells; None if it isn't one."""
    try:
        nodes = tree["nodes"]
        parents = [int(node["parent"]) for node in nodes]
        log_probs = [min(0.0, float(node["log_prob"])) for node in nodes]
        if not nodes or parents[0] != -1 or not all(0 <= up < node for node, up in enumerate(parents) if node):
            return None
        return Step(
            [repr(str(node["text"])) for node in nodes],
            parents,
            log_probs,
            [[str(name) for name in node["drafters"]] for node in nodes],
            [node["accepted"] is True for node in nodes],
            repr(str(tree["bonus"]["text"])),
        )
    except (KeyError, TypeError, ValueError, OverflowError):
        return None
