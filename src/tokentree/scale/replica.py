"""One engine and the application that answers with it, in a process of its own."""

from __future__ import annotations

import asyncio
import gc
import logging
import os
import socket
from collections.abc import AsyncGenerator
from dataclasses import replace
from typing import Any

from ray import serve
from starlette.types import Message

from tokentree.sampling import SamplingParams
from tokentree.scale.arguments import Arguments
from tokentree.scale.beginnings import Marks
from tokentree.scale.calls import messages
from tokentree.scale.loopback import listen_here
from tokentree.scale.memories import Memories
from tokentree.serve.allocator import keep_memory_level
from tokentree.serve.app import create_app
from tokentree.serve.run import log_to_stderr
from tokentree.serve.service import Service


class Replica:
    """What Serve makes so many of. It takes requests once it has written a first token.

    Raises:
        ModelError, OptionError, PairingError: as `LLM`.
    """

    _is_made = False  # Serve ends those too that couldn't be made

    def __init__(self, arguments: Arguments) -> None:
        listen_here()
        log_to_stderr(arguments.log_level)
        keep_memory_level()
        self._stuck_timeout = arguments.stuck_timeout
        self._name = serve.get_replica_context().replica_id.unique_id
        llm = arguments.load()
        llm.generate("a", SamplingParams(max_tokens=2, ignore_eos=True))
        # keys and origins are looked at by the front, and requests come from there alone
        self._app = create_app(replace(arguments.settings(), keys=(), cors_origins=()), llm)
        self._service: Service = self._app.state.service
        self._memories = Memories(llm, arguments.memory, _rank, arguments.memory_seconds)
        gc.freeze()
        self._is_made = True

    async def answer(self, marks: Marks, scope: dict[str, Any], body: bytes) -> AsyncGenerator[Message]:
        """The messages of an answer.

        Args:
            marks: the router has looked at them.
            scope: what `calls.plain` made of it.
        """
        async for message in messages(self._app, scope, body):
            yield message

    async def figures(self) -> tuple[str, str]:
        """Its name, and its figures in the text format of Prometheus."""
        return self._name, self._service.metrics.scrape().decode()

    async def facts(self) -> dict[str, Any]:
        """What it is, and what it does now."""
        schedulers = [backend.asked.scheduler for backend in self._service.backends.all]
        return {
            "replica": self._name, "rank": _rank(), "host": socket.gethostname(), "pid": os.getpid(),
            "running": sum(one.running for one in schedulers), "waiting": sum(one.waiting for one in schedulers),
        }  # fmt: skip

    async def check_health(self) -> None:
        """Called by Serve, which starts another replica where this raises.

        Raises:
            StepError: if the engine is stuck.
        """
        for backend in self._service.backends.all:
            backend.asked.check(self._stuck_timeout)

    async def __del__(self) -> None:
        """Called by Serve once all requests have ended, or their time is up."""
        if self._is_made:
            logging.getLogger("tokentree.serve").info("the replica %s ends", self._name)
            await asyncio.to_thread(self._memories.close)
            await self._service.close()


def _rank() -> int:
    """Its number among the replicas, from 0. A new one has that of the one which ended."""
    rank = serve.get_replica_context().rank
    return int(rank.rank) if rank is not None else 0
