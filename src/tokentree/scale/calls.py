"""A request to an ASGI application as one call: plain values go in, messages come out."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from typing import Any

from starlette.types import ASGIApp, Message, Scope

KEPT = ("type", "http_version", "method", "scheme", "path", "raw_path", "query_string", "root_path", "client", "server")
HIDDEN = (b"authorization", b"cookie")  # the front has looked at keys, and nobody behind it needs them


def plain(scope: Scope) -> dict[str, Any]:
    """What an application needs of ``scope``, in values that can be sent to another process."""
    headers = [(bytes(name), bytes(value)) for name, value in scope["headers"] if bytes(name).lower() not in HIDDEN]
    return {name: scope[name] for name in KEPT if name in scope} | {"headers": headers}


async def messages(app: ASGIApp, scope: Scope, body: bytes) -> AsyncGenerator[Message]:
    """What ``app`` answers. Whoever stops iterating has gone away, as the application sees it.

    Raises:
        Exception: what ``app`` raised.
    """
    outbox, unread, gone = asyncio.Queue[Message | None](), [body], asyncio.Event()

    async def receive() -> Message:
        if unread:
            return {"type": "http.request", "body": unread.pop(), "more_body": False}
        await gone.wait()
        return {"type": "http.disconnect"}

    async def send(message: Message) -> None:
        outbox.put_nowait(message)

    async def work() -> None:
        await app(scope, receive, send)

    working = asyncio.create_task(work())
    working.add_done_callback(lambda _: outbox.put_nowait(None))
    try:
        while (message := await outbox.get()) is not None:
            yield message
        await working
    finally:
        gone.set()
        working.cancel()
        await asyncio.wait({working})
