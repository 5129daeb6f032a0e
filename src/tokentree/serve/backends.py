"""Ways to decode with one model: the server's own, and those that requests ask for."""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from typing import Literal

from tokentree.aio import AsyncLLM
from tokentree.errors import TokenTreeError
from tokentree.llm import LLM
from tokentree.registry import check_names
from tokentree.serve.errors import BAD, TOO_MANY, ApiError
from tokentree.serve.protocol import Speculation
from tokentree.serve.settings import Settings
from tokentree.shapes import shape

Key = tuple[str | None, str | None] | Literal["off"]
OWN: Key = (None, None)


class Backend:
    """An `LLM` and the thread that makes its steps.

    Attributes:
        users: how many requests need it.
    """

    def __init__(self, llm: LLM, max_batch: int) -> None:
        self.llm, self.asked, self.users = llm, AsyncLLM(llm, max_batch), 0


class Backends:
    """The server's own way to decode, and up to ``settings.twins`` others of the same model. The one that was not asked
    for longest makes room for a new one."""

    def __init__(self, llm: LLM, settings: Settings) -> None:
        self._settings = settings
        self.own = Backend(llm, settings.max_batch)
        self._twins = OrderedDict[Key, Backend]()
        self._turn = asyncio.Lock()

    @property
    def all(self) -> list[Backend]:
        """All that there are now."""
        return [self.own, *self._twins.values()]

    @asynccontextmanager
    async def using(self, speculation: Speculation | Literal["off"] | None) -> AsyncGenerator[Backend]:
        """The one that decodes as ``speculation`` has it. It stays as long as the block goes on.

        Raises:
            ApiError: if it can't be made, or there is no room for it.
        """
        backend = await self._get(speculation)
        backend.users += 1
        try:
            yield backend
        finally:
            backend.users -= 1

    async def _get(self, speculation: Speculation | Literal["off"] | None) -> Backend:
        key: Key = OWN
        if speculation is not None:
            key = "off" if speculation == "off" else (speculation.drafter, speculation.shape)
        if key == OWN:
            return self.own
        async with self._turn:
            if key not in self._twins:
                self._check(key)
                await self._make_room()
                try:
                    llm = await asyncio.to_thread(self._made, key)
                except TokenTreeError as error:
                    raise ApiError(BAD, f"speculation: {error}", "speculation", "invalid_value") from None
                self._twins[key] = Backend(llm, self._settings.max_batch)
            self._twins.move_to_end(key)
            return self._twins[key]

    def _check(self, key: Key) -> None:
        if key == "off":
            return
        try:
            check_names(_names(key[0]))
            nodes = 0 if key[1] is None else shape(key[1]).max_nodes
        except TokenTreeError as error:
            raise ApiError(BAD, f"speculation: {error}", "speculation", "invalid_value") from None
        if nodes > self._settings.tree_nodes:
            most = self._settings.tree_nodes
            raise ApiError(BAD, f"speculation: a tree has at most {most} nodes here", "speculation", "too_many")

    async def _make_room(self) -> None:
        if len(self._twins) < self._settings.twins:
            return
        idle = next((key for key, twin in self._twins.items() if not twin.users), None)
        if idle is None:
            raise ApiError(
                TOO_MANY, "other ways of speculation are in use, and there is no room for this one", "speculation",
                "speculation_busy", retry_after=1,
            )  # fmt: skip
        await self._twins.pop(idle).asked.close()

    def _made(self, key: Key) -> LLM:
        return self.own.llm.plain() if key == "off" else self.own.llm.using(_names(key[0]), key[1])

    async def close(self) -> None:
        """Interrupts all requests, and ends all threads."""
        await asyncio.gather(*(backend.asked.close() for backend in self.all))


def _names(drafter: str | None) -> str | list[str] | None:
    return drafter.split("+") if drafter and "+" in drafter else drafter
