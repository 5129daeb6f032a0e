"""Requests whose replica ends: which may be tried again, and what the others are told."""

from __future__ import annotations

import json
from typing import Any

from starlette.types import Message, Send

from tokentree.serve.errors import NOT_READY, ApiError

HEADS = ("response.created", "response.in_progress", "response.content_part.added")  # events before any text
EVENTS = b"text/event-stream"


class ReplicaLost(Exception):
    """The replica that worked on a request has ended."""


def lost() -> ApiError:
    """What the client of such a request is told."""
    said = "the replica that worked on this request has ended: ask again"
    return ApiError(NOT_READY, said, code="replica_lost", retry_after=1)


class Answer:
    """The answer to one request on its way to the client. Its beginning is kept back while nothing of the text is in
    it, so that another replica may answer instead.

    Args:
        send: takes the messages.
        ends: the word that ends a stream of events, if there is one.

    Attributes:
        given: whether the client has some of the answer.
    """

    def __init__(self, send: Send, ends: str) -> None:
        self._send, self._ends = send, ends
        self._last = f"data: {ends}\n\n".encode() if ends else b""
        self.given = False
        self._begun = self._ended = False  # whether the status of a stream has gone out, and the word at its end
        self._kept = list[Message]()

    async def take(self, message: Message) -> None:
        """Takes the next message of a replica."""
        if self.given:
            self._ended = message.get("body") == self._last
            await self._send(message)
        elif message["type"] == "http.response.start":
            self._kept = [message]
        elif self._is_stream and message.get("more_body") and not gives(message["body"]):
            if message["body"].startswith(b":"):  # a comment shows that the stream goes on
                await self._begin()
                await self._send(message)
            else:
                self._kept.append(message)
        elif self._begun and not self._is_stream:  # another replica refuses what the first one had begun
            await self._end(message["body"])
        elif not self._is_stream and message.get("more_body"):
            self._kept.append(message)
        else:
            await self._begin()
            self.given = True
            for one in [*self._kept[1:], message]:
                await self._send(one)

    def forget(self) -> None:
        """Another replica begins anew."""
        self._kept = []

    async def fail(self, error: ApiError) -> None:
        """Tells an error instead of the rest.

        Raises:
            ApiError: ``error``, where the status has not gone out yet.
        """
        if not self._begun:
            raise error
        if self._ended:  # all has been told
            await self._send({"type": "http.response.body", "body": b"", "more_body": False})
            return
        await self._end(json.dumps(self._event(error), separators=(",", ":")).encode())

    def _event(self, error: ApiError) -> dict[str, Any]:
        if self._ends:
            return error.body
        return {"type": "error", "code": error.code, "message": error.message, "param": error.param}

    async def _end(self, data: bytes) -> None:
        self.given = True
        name = b"" if self._ends else b"event: error\n"
        event = name + b"data: " + data + b"\n\n" + self._last
        await self._send({"type": "http.response.body", "body": event, "more_body": False})

    async def _begin(self) -> None:
        if not self._begun:
            self._begun = True
            await self._send(self._kept[0])

    @property
    def _is_stream(self) -> bool:
        headers = dict(self._kept[0]["headers"]) if self._kept else {}
        return bool(headers.get(b"content-type", b"").startswith(EVENTS))


def gives(part: bytes) -> bool:
    """Whether there is anything of an answer in these events: comments, a role and heads are nothing yet."""
    lines = part.decode(errors="replace").splitlines()
    return any(_says(line.removeprefix("data: ")) for line in lines if line.startswith("data: "))


def _says(data: str) -> bool:
    try:
        event = json.loads(data)
    except ValueError:  # the word at the end
        return True
    kind, choices = event.get("type"), event.get("choices")
    if kind is not None:
        return not (kind in HEADS or (kind.endswith("output_item.added") and event["item"]["type"] == "message"))
    return not choices or not all(_is_head(choice) for choice in choices)


def _is_head(choice: dict[str, Any]) -> bool:
    said = choice.get("delta") or {}
    more = said.get("content") or said.get("tool_calls") or choice.get("finish_reason") or choice.get("trees")
    return "role" in said and not more
