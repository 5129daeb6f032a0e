"""The front as Serve runs it, and replicas as it calls them."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Mapping
from typing import Any

from fastapi import Request
from fastapi.responses import Response
from ray import serve
from ray.exceptions import RayActorError
from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError
from ray.serve.handle import DeploymentHandle
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from tokentree.scale.arguments import Arguments
from tokentree.scale.beginnings import Marks
from tokentree.scale.front import create_front
from tokentree.scale.loopback import listen_here
from tokentree.scale.retry import ReplicaLost
from tokentree.serve.errors import NOT_READY, TOO_MANY, ApiError
from tokentree.serve.service import BUSY, LOADING

SCRAPE_TIMEOUT = 5.0  # seconds that replicas have to tell their figures


class Gate:
    """Serve's entry: all requests come here."""

    def __init__(self, arguments: Arguments, replicas: DeploymentHandle) -> None:
        listen_here()
        self._replicas = ServeReplicas(replicas)
        name = serve.get_replica_context().replica_id.unique_id
        self._app = create_front(arguments.settings(), self._replicas, name)

    async def __call__(self, request: Request) -> Response:
        """Answers a request by the application of the front."""
        self._replicas.watch()
        return _ByApp(self._app)

    async def check_health(self) -> None:
        """Called by Serve, for the first time soon after the start."""
        self._replicas.watch()

    async def drain(self, seconds: float) -> bool:
        """See `front.Hand.drain`."""
        over: bool = await self._app.state.hand.drain(seconds)
        return over


class _ByApp(Response):
    """The answer of an ASGI application."""

    def __init__(self, app: ASGIApp) -> None:
        super().__init__()
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await self._app(scope, receive, send)


class ServeReplicas:
    """See `front.Replicas`."""

    def __init__(self, handle: DeploymentHandle) -> None:
        self._handle, self._streaming = handle, handle.options(stream=True)
        self._first: asyncio.Future[Any] | None = None

    def watch(self) -> None:
        """From now on it is known when a replica takes requests."""
        if self._first is None:
            self._first = asyncio.ensure_future(self._asked())

    async def _asked(self) -> None:
        await self._handle.facts.remote()

    @property
    def ready(self) -> bool:
        return self._first is not None and self._first.done() and self._first.exception() is None

    async def answer(self, marks: Marks, scope: Mapping[str, Any], body: bytes) -> AsyncGenerator[Message]:
        found = self._streaming.answer.remote(marks, dict(scope), body)
        try:
            async for message in found:
                yield message
        except RayActorError as error:
            raise ReplicaLost(str(error)) from None
        except BackPressureError:
            said = "too many requests wait already"
            raise ApiError(TOO_MANY, said, code="queue_full", retry_after=BUSY) from None
        except DeploymentUnavailableError:
            said = "there is no replica: the log of Ray says why"
            raise ApiError(NOT_READY, said, code="no_replica", retry_after=LOADING) from None
        finally:
            found.cancel()

    async def ask_all(self, name: str) -> list[Any]:
        try:
            found = await self._handle.broadcast(name).results_async(timeout_s=SCRAPE_TIMEOUT, return_exceptions=True)
        except DeploymentUnavailableError:  # none is there just now
            return []
        return [one for one in found if not isinstance(one, BaseException)]
