"""Answers that go out while they are written, and clients that go away."""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import AsyncGenerator, Coroutine
from contextlib import AsyncExitStack, aclosing
from typing import Any, TypeVar

from fastapi import Request
from sse_starlette import EventSourceResponse, ServerSentEvent
from sse_starlette.sse import SendTimeoutError
from starlette.types import Receive, Scope, Send

from tokentree.serve.errors import GONE, ApiError, api_error

LOG = logging.getLogger("tokentree.serve")
PING = 15  # seconds of silence after which a comment shows that the stream goes on
T = TypeVar("T")


class EventStream(EventSourceResponse):
    """Server-sent events.

    Args:
        chunks: each becomes one event, which its ``type`` names, if it has one. An error becomes the last one.
        stall_timeout: the seconds after which the stream ends whose client reads nothing.
        held: closed at the end, however that comes.
        last: what the last event says, if it isn't empty.
    """

    def __init__(
        self, chunks: AsyncGenerator[dict[str, Any]], stall_timeout: float, held: AsyncExitStack, last: str
    ) -> None:
        super().__init__(_events(chunks, last), sep="\n", ping=PING, send_timeout=stall_timeout)
        self._held = held

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        except SendTimeoutError:
            LOG.warning("a client reads nothing: its stream is ended")
        finally:
            await self._held.aclose()


async def _events(chunks: AsyncGenerator[dict[str, Any]], last: str) -> AsyncGenerator[ServerSentEvent]:
    try:
        async with aclosing(chunks):
            async for chunk in chunks:
                yield _event(chunk)
    except Exception as error:  # noqa: BLE001  the status has gone out already
        yield _event(api_error(error).body)
    if last:
        yield ServerSentEvent(last, sep="\n")


def _event(chunk: dict[str, Any]) -> ServerSentEvent:
    text = json.dumps(chunk, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    return ServerSentEvent(text, event=chunk.get("type"), sep="\n")


async def unless_gone(request: Request, work: Coroutine[Any, Any, T]) -> T:
    """What ``work`` gives. It is cancelled if the client goes away.

    Raises:
        ApiError: if it went.
    """
    working, gone = asyncio.ensure_future(work), asyncio.ensure_future(_gone(request))
    try:
        await asyncio.wait({working, gone}, return_when=asyncio.FIRST_COMPLETED)
        if working.done():
            return working.result()
        raise ApiError(GONE, "the client has gone", code="client_gone")
    finally:
        for task in (working, gone):
            task.cancel()
        await asyncio.wait({working, gone})


async def _gone(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass
