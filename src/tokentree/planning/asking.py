"""Clients of a server, as a program of their own: each asks for one chat after another, and reads its stream.

    python -P asking.py URL CLIENTS SECONDS < REQUESTS

REQUESTS are bodies for ``/v1/chat/completions``, one a line, which are taken in turns. After SECONDS all clients leave.
It prints how many answers came to their ends, and the first error, as JSON. It imports nothing of the package: clients
are no part of a server.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
import sys
from typing import Any

import httpx


class Refused(Exception):
    """The server's answer is an error."""


async def ask(http: httpx.AsyncClient, url: str, body: dict[str, Any]) -> None:
    """One chat, read to its end.

    Raises:
        Refused: if it is an error, or ends in one.
    """
    async with http.stream("POST", f"{url}/v1/chat/completions", json=body) as answer:
        if answer.status_code != 200:
            raise Refused(json.loads(await answer.aread())["error"]["message"])
        async for line in answer.aiter_lines():
            if line.startswith("data: {"):
                event = json.loads(line[6:])
                if "error" in event:
                    raise Refused(event["error"]["message"])


async def asking(url: str, clients: int, seconds: float, bodies: list[dict[str, Any]]) -> dict[str, Any]:
    """What came of them: ``answered``, and ``error``, if there was one."""
    waiting, answered, wrong = itertools.cycle(bodies), itertools.count(), list[str]()
    async with httpx.AsyncClient(timeout=600, limits=httpx.Limits(max_connections=2 * clients)) as http:

        async def client() -> None:
            try:
                while not wrong:
                    await ask(http, url, next(waiting) | {"stream": True})
                    next(answered)
            except (Refused, httpx.HTTPError) as error:
                wrong.append(str(error) or type(error).__name__)

        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                await asyncio.gather(*(client() for _ in range(clients)))
    return {"answered": next(answered), "error": wrong[0] if wrong else None}


def main() -> None:
    url, clients, seconds = sys.argv[1:]
    bodies = [json.loads(line) for line in sys.stdin if line.strip()]
    print(json.dumps(asyncio.run(asking(url, int(clients), float(seconds), bodies))))


if __name__ == "__main__":
    main()
