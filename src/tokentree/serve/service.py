"""What the routes share: the model once it is loaded, the requests under way, and figures."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Literal

from fastapi import Request

from tokentree.engines.base import HasPrefixes
from tokentree.errors import ModelError
from tokentree.llm import LLM
from tokentree.serve.backends import Backend, Backends
from tokentree.serve.errors import BAD, NOT_FOUND, NOT_READY, TOO_MANY, ApiError
from tokentree.serve.metrics import Meter, Metrics
from tokentree.serve.protocol import Sampled
from tokentree.serve.settings import Settings
from tokentree.serve.structured import grammar_blamed
from tokentree.serve.tokens import TokenTexts
from tokentree.serve.writing import Job, Planned

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

LOG = logging.getLogger("tokentree.serve")
LOADING, BUSY = 5, 1  # seconds after which it is worth asking again


class Service:
    """A server without its HTTP.

    Attributes:
        state: whether the model is being loaded, requests are taken, or no more are.
    """

    def __init__(self, settings: Settings) -> None:
        self.settings, self.metrics = settings, Metrics(settings.model_name)
        self.state: Literal["loading", "ready", "draining"] = "loading"
        self.created = int(time.time())
        self._backends: Backends | None = None
        self._texts: TokenTexts | None = None
        self._open = 0  # texts that were asked for and aren't over
        self._idle = asyncio.Event()
        self._idle.set()
        gauge = self.metrics.gauge
        gauge("vllm:num_requests_running", "Texts that are read or decoded.", lambda: self._sum("running"))
        gauge("vllm:num_requests_waiting", "Texts that wait for their turn.", lambda: self._sum("waiting"))
        gauge("vllm:kv_cache_usage_perc", "KV of texts, as a part of the memory for it (1: all).", self._kv_usage)
        self.metrics.memory(
            "Memory of what grows with requests.",
            {"kv": lambda: self._sum("kv_used"), "prefixes": self._prefixes, "lookups": self._lookups},
        )

    # -- the model -------------------------------------------------------------------------------------------------

    def start(self, llm: LLM) -> None:
        """From now on requests are taken.

        Raises:
            ModelError: if there is no tokenizer.
        """
        if llm.tokenizer is None:
            raise ModelError("this model came without a tokenizer, and a server needs one")
        self._texts, self._backends = TokenTexts(llm.tokenizer), Backends(llm, self.settings)
        if self.state == "loading":
            self.state = "ready"

    @property
    def backends(self) -> Backends:
        """The ways to decode.

        Raises:
            ApiError: while the model is being loaded.
        """
        if self._backends is None:
            raise ApiError(NOT_READY, "the model is still being loaded", code="loading", retry_after=LOADING)
        return self._backends

    @property
    def llm(self) -> LLM:
        """The model, as `backends`."""
        return self.backends.own.llm

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """That of the model, as `backends`."""
        assert self.llm.tokenizer is not None  # as `start` has seen
        return self.llm.tokenizer

    @property
    def texts(self) -> TokenTexts:
        """What its tokens are called, as `backends`."""
        assert self.backends is not None
        assert self._texts is not None
        return self._texts

    @property
    def prompt_tokens(self) -> int:
        """The most tokens of a prompt."""
        most, limit = self.llm.engine.info.context - 1, self.settings.prompt_tokens
        return most if limit is None else min(most, limit)

    def check_model(self, name: str | None) -> None:
        """Raises `ApiError` unless ``name`` is None or that of the model."""
        if name is not None and name != self.settings.model_name:
            raise ApiError(NOT_FOUND, f"there is no model {name!r} here: see /v1/models", "model", "model_not_found")

    def check_length(self, ids: Sequence[int], param: str) -> None:
        """Raises `ApiError` if a prompt of these ``ids`` is too long."""
        if len(ids) > self.prompt_tokens:
            said = f"{param}: the prompt has {len(ids)} tokens, and this server takes at most {self.prompt_tokens}"
            raise ApiError(BAD, said, param, "context_length_exceeded")

    # -- requests --------------------------------------------------------------------------------------------------

    @asynccontextmanager
    async def _place(self, texts: int) -> AsyncGenerator[None]:
        """A place for so many texts."""
        most = self.settings.max_batch + self.settings.max_queue
        if self.state == "draining":
            raise ApiError(NOT_READY, "the server is shutting down", code="shutting_down", retry_after=LOADING)
        if self._open and self._open + texts > most:
            raise ApiError(TOO_MANY, "too many requests wait already", code="queue_full", retry_after=BUSY)
        self._open += texts
        self._idle.clear()
        try:
            yield
        finally:
            self._open -= texts
            if not self._open:
                self._idle.set()

    @asynccontextmanager
    async def job(self, asked: Sampled, texts: int, plan: Callable[[], list[Planned]]) -> AsyncGenerator[Job]:
        """The work that a request asks for, as long as the block goes on.

        Args:
            texts: how many texts it writes.
            plan: makes prompts of it, in a thread.

        Raises:
            ApiError, TokenTreeError: if it can't be done, or not now.
        """
        meter = Meter(self.metrics)
        async with self._place(texts), self.backends.using(asked.speculation) as backend:
            yield await asyncio.to_thread(self._made, backend, asked, plan, meter)

    def _made(self, backend: Backend, asked: Sampled, plan: Callable[[], list[Planned]], meter: Meter) -> Job:
        """The job; a grammar may be compiled for it, which takes a second or two."""
        with grammar_blamed(asked):
            plans = plan()
            if self.settings.log_prompts:
                for planned in plans:
                    LOG.info("prompt: %r", self.tokenizer.decode(planned.ids))
            return Job(backend, plans, bool(asked.return_tree), meter, self.settings.log_prompts)

    # -- figures ---------------------------------------------------------------------------------------------------

    def _sum(self, name: Literal["running", "waiting", "kv_used"]) -> int:
        backends = self._backends.all if self._backends is not None else []
        return sum(getattr(backend.asked.scheduler, name) for backend in backends)

    def _kv_usage(self) -> float:
        schedulers = [backend.asked.scheduler for backend in self._backends.all] if self._backends else []
        most = schedulers[0].kv_bytes if schedulers else None
        return sum(scheduler.kv_used for scheduler in schedulers) / most if most else 0.0

    def _prefixes(self) -> int:
        engines = [self._backends.own.llm.engine, *self._backends.own.llm.engines] if self._backends else []
        known = {id(engine): engine for engine in engines if isinstance(engine, HasPrefixes)}
        return sum(engine.prefix_nbytes for engine in known.values())

    def _lookups(self) -> int:
        backends = self._backends.all if self._backends is not None else []
        return sum(backend.llm.decoder.drafter.nbytes for backend in backends)

    # -- the end ---------------------------------------------------------------------------------------------------

    async def drain(self, seconds: float) -> bool:
        """Takes no more requests, and waits so long for those that are under way. Returns whether all are over."""
        self.state = "draining"
        try:
            await asyncio.wait_for(self._idle.wait(), seconds)
        except TimeoutError:
            return False
        return True

    async def close(self) -> None:
        """Interrupts what is under way."""
        self.state = "draining"
        if self._backends is not None:
            await self._backends.close()


def service_of(request: Request) -> Service:
    """The service of the app that ``request`` came to."""
    service: Service = request.app.state.service
    return service
