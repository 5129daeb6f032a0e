"""What stands before the replicas: it lets requests in, hands each to one of them, and tries again elsewhere."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Awaitable, Mapping
from contextlib import aclosing
from typing import Any, Protocol

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response
from prometheus_client import CONTENT_TYPE_LATEST
from starlette.types import Message, Receive, Scope, Send

from tokentree.scale.beginnings import Marks, marks_of
from tokentree.scale.calls import plain
from tokentree.scale.figures import FrontFigures, merged
from tokentree.scale.retry import Answer, ReplicaLost, lost
from tokentree.serve.errors import GONE, NOT_READY, TOO_LATE, ApiError
from tokentree.serve.protection import protect
from tokentree.serve.service import LOADING
from tokentree.serve.settings import Settings
from tokentree.serve.streaming import unless_gone

LATE = 5.0  # seconds that a replica has to tell by itself that a request took too long


class Replicas(Protocol):
    """The replicas, as their front sees them."""

    def answer(self, marks: Marks, scope: Mapping[str, Any], body: bytes) -> AsyncGenerator[Message]:
        """What one of them answers. Whoever stops iterating ends the request.

        Raises:
            ReplicaLost: if it ends before it is done.
            ApiError: if none of them takes it.
        """

    def ask_all(self, name: str) -> Awaitable[list[Any]]:
        """What the method ``name`` gives, of all that answer in time."""

    @property
    def ready(self) -> bool:
        """Whether one of them has taken requests yet."""


def create_front(settings: Settings, replicas: Replicas, name: str) -> FastAPI:
    """An ASGI application that answers as the replicas do. Its `Hand` is ``app.state.hand``.

    Args:
        name: what its own figures call it.
    """
    app = FastAPI(docs_url=None, redoc_url=None, openapi_url=None)
    figures = FrontFigures(settings.model_name, name)
    hand = app.state.hand = Hand(settings, replicas, figures)

    @app.head("/health")
    @app.get("/health")
    async def health() -> Response:
        return Response()

    @app.head("/ready")
    @app.get("/ready")
    async def ready() -> Response:
        hand.check_open()
        if not replicas.ready:
            raise ApiError(NOT_READY, "the model is still being loaded", code="loading", retry_after=LOADING)
        return Response()

    @app.get("/metrics")
    async def metrics() -> Response:
        told: dict[str, str] = dict(await replicas.ask_all("figures"))
        figures.replicas.set(len(told))
        return Response(merged(told) + figures.scrape(), media_type=CONTENT_TYPE_LATEST)

    @app.get("/replicas")
    async def facts() -> Response:
        return JSONResponse({"object": "list", "data": await replicas.ask_all("facts")})

    app.mount("/", hand)
    protect(app, settings, hand.check_open)
    return app


class Hand:
    """Hands requests to replicas."""

    def __init__(self, settings: Settings, replicas: Replicas, figures: FrontFigures) -> None:
        self._settings, self._replicas, self._figures = settings, replicas, figures
        self._open, self._idle, self._drains = 0, asyncio.Event(), False
        self._idle.set()

    def check_open(self) -> None:
        """Raises `ApiError` at the end. Before the first replica is there, requests wait for it."""
        if self._drains:
            raise ApiError(NOT_READY, "the server is shutting down", code="shutting_down", retry_after=LOADING)

    async def drain(self, seconds: float) -> bool:
        """As `Service.drain`."""
        self._drains = True
        try:
            await asyncio.wait_for(self._idle.wait(), seconds)
        except TimeoutError:
            return False
        return True

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        self._open += 1
        self._idle.clear()
        try:
            body = await whole(receive)
            await unless_gone(Request(scope, receive), self._answer(scope, body, send))
        except ApiError as error:
            if error.status != GONE:
                raise
        finally:
            self._open -= 1
            if not self._open:
                self._idle.set()

    async def _answer(self, scope: Scope, body: bytes, send: Send) -> None:
        seconds, loop = self._settings.request_timeout, asyncio.get_running_loop()
        end = None if seconds is None else loop.time() + seconds
        answer = Answer(send, "" if scope["path"].endswith("/responses") else "[DONE]")
        try:
            await self._hand(scope, body, answer, None if end is None else end + LATE)
        except ReplicaLost:
            if answer.given or (end is not None and loop.time() > end):
                await self._lost(answer)
                return
            answer.forget()
            self._figures.tried_again.inc()
            try:
                await self._hand(scope, body, answer, end)
            except ReplicaLost:
                await self._lost(answer)

    async def _hand(self, scope: Scope, body: bytes, answer: Answer, end: float | None) -> None:
        """Lets one replica answer, until ``end`` on the loop's clock."""
        try:
            async with asyncio.timeout_at(end), aclosing(self._asked(scope, body)) as messages:
                async for message in messages:
                    await answer.take(message)
        except TimeoutError:
            await answer.fail(ApiError(TOO_LATE, "the request took longer than this server allows", code="timeout"))
        except ApiError as error:
            await answer.fail(error)

    def _asked(self, scope: Scope, body: bytes) -> AsyncGenerator[Message]:
        return self._replicas.answer(marks_of(body), plain(scope), body)

    async def _lost(self, answer: Answer) -> None:
        self._figures.lost.inc()
        await answer.fail(lost())


async def whole(receive: Receive) -> bytes:
    """The body of a request. It may be as large as `Protection` lets through."""
    parts = list[bytes]()
    while True:
        message = await receive()
        parts.append(message.get("body", b""))
        if not message.get("more_body"):
            return b"".join(parts)
