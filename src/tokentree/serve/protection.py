"""Who may come in, and with how much: keys, sizes of bodies, and what is open before the model is loaded."""

from __future__ import annotations

import asyncio
import hmac
from collections.abc import Callable, Sequence

from fastapi import FastAPI
from fastapi.middleware.cors import CORSMiddleware
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from tokentree.serve.errors import PACKED, TOO_LARGE, TOO_SLOW, UNKNOWN_KEY, ApiError, of_http, tell_errors
from tokentree.serve.page import is_page
from tokentree.serve.settings import Settings

OPEN = ("/health", "/ready")  # to everybody, always


def protect(app: FastAPI, settings: Settings, check_ready: Callable[[], object]) -> None:
    """Puts a `Protection` before ``app``, which tells of errors as OpenAI's servers do, and answers pages of other
    places only where the settings allow them.

    Args:
        check_ready: see `Protection`.
    """
    tell_errors(app)
    app.add_middleware(Protection, settings=settings, check_ready=check_ready)
    if settings.cors_origins:
        app.add_middleware(
            CORSMiddleware, allow_origins=list(settings.cors_origins), allow_methods=["GET", "POST"],
            allow_headers=["Authorization", "Content-Type"],
        )  # fmt: skip


class Protection:
    """Refuses requests without a key, those that come before the model is loaded, and bodies that are compressed or too
    large. What it refuses is not read further.

    Args:
        check_ready: raises `ApiError` while the model is being loaded.
    """

    def __init__(self, app: ASGIApp, settings: Settings, check_ready: Callable[[], object]) -> None:
        self._app, self._settings, self._check_ready = app, settings, check_ready

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers, settings = dict[bytes, bytes](scope["headers"]), self._settings
        try:
            if scope["path"] not in OPEN and not is_page(scope["path"]):
                check_key(headers.get(b"authorization", b""), settings.keys)
                self._check_ready()
            if headers.get(b"content-encoding", b"identity").lower() != b"identity":
                raise ApiError(PACKED, "the body is compressed: send it as it is")
            length = headers.get(b"content-length", b"")
            if length.isdigit() and int(length) > settings.body_bytes:
                raise of_http(HTTPException(TOO_LARGE))
        except ApiError as error:
            await error.response(scope, receive, send)
        else:
            await self._app(scope, _bounded(receive, settings.body_bytes, settings.stall_timeout), send)


def _bounded(receive: Receive, most: int, seconds: float) -> Receive:
    """``receive``, which refuses more than ``most`` bytes, whatever length was told, and a body that isn't whole behind
    so many ``seconds``."""
    size, whole, end = 0, False, asyncio.get_running_loop().time() + seconds

    async def read() -> Message:
        nonlocal size, whole
        try:
            async with asyncio.timeout_at(None if whole else end):
                message = await receive()
        except TimeoutError:
            raise HTTPException(TOO_SLOW) from None
        size, whole = size + len(message.get("body", b"")), not message.get("more_body")
        if size > most:
            raise HTTPException(TOO_LARGE)
        return message

    return read


def check_key(authorization: bytes, keys: Sequence[str]) -> None:
    """Raises `ApiError` unless the header ``Authorization`` shows one of ``keys``, or there are none. How long it takes
    doesn't tell how much of a key is right."""
    if not keys:
        return
    scheme, _, given = authorization.partition(b" ")
    known = [hmac.compare_digest(given.strip(), key.encode()) for key in keys]
    if scheme.lower() != b"bearer" or not any(known):
        error = ApiError(UNKNOWN_KEY, "the API key is missing or wrong", code="invalid_api_key")
        error.headers["WWW-Authenticate"] = "Bearer"
        raise error
