"""Who may come in: keys, and what is open before the model is loaded."""

from __future__ import annotations

import hmac
from collections.abc import Sequence

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

from tokentree.serve.errors import UNKNOWN_KEY, ApiError
from tokentree.serve.service import Service

OPEN = ("/health", "/ready")  # to everybody, always


class Protection:
    """Refuses requests without a key, and those that come before the model is loaded. It reads no body."""

    def __init__(self, app: ASGIApp, service: Service) -> None:
        self._app, self._service = app, service

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and scope["path"] not in OPEN:
            try:
                check_key(Headers(scope=scope).get("authorization"), self._service.settings.keys)
                assert self._service.backends
            except ApiError as error:
                await error.response(scope, receive, send)
                return
        await self._app(scope, receive, send)


def check_key(authorization: str | None, keys: Sequence[str]) -> None:
    """Raises `ApiError` unless the header ``Authorization`` shows one of ``keys``, or there are none. How long it takes
    doesn't tell how much of a key is right."""
    if not keys:
        return
    scheme, _, given = (authorization or "").partition(" ")
    known = [hmac.compare_digest(given.strip().encode(), key.encode()) for key in keys]
    if scheme.lower() != "bearer" or not any(known):
        error = ApiError(UNKNOWN_KEY, "the API key is missing or wrong", code="invalid_api_key")
        error.headers["WWW-Authenticate"] = "Bearer"
        raise error
