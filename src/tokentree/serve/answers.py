"""Answers, at once or in parts: what completions and chats have in common."""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import AsyncGenerator, Callable
from contextlib import AsyncExitStack, aclosing
from typing import Any, Protocol
from uuid import uuid4

from fastapi import Request
from fastapi.responses import JSONResponse, Response

from tokentree.serve.figures import speculative, usage
from tokentree.serve.protocol import Sampled
from tokentree.serve.service import Service
from tokentree.serve.streaming import EventStream, unless_gone
from tokentree.serve.trees import tree_json
from tokentree.serve.writing import Job, Planned, Update


class Told(Protocol):
    """What a request is told, in the form of its route.

    Attributes:
        last: the event that ends a stream, if there is one.
    """

    last: str

    def whole(self, updates: list[Update]) -> dict[str, Any]:
        """At once."""

    def chunks(self) -> AsyncGenerator[dict[str, Any]]:
        """In parts."""


class Answer(ABC):
    """What one request is told.

    Args:
        kind: the prefix of its id.
        named: the field ``object``, at once and in parts.
    """

    last = "[DONE]"

    def __init__(self, service: Service, asked: Sampled, job: Job, kind: str, named: tuple[str, str]) -> None:
        self.service, self.asked, self.job = service, asked, job
        self._head = {
            "id": f"{kind}-{uuid4().hex}",
            "object": named[bool(asked.stream)],
            "created": int(time.time()),
            "model": service.settings.model_name,
        }
        self._tells_tokens = bool(asked.return_token_ids) or self.has_logprobs

    @property
    @abstractmethod
    def has_logprobs(self) -> bool:
        """Whether log-probabilities were asked for."""

    @abstractmethod
    def at_once(self, update: Update) -> dict[str, Any]:
        """The fields of a choice that are OpenAI's."""

    @abstractmethod
    def part(self, update: Update, first: bool) -> dict[str, Any]:
        """The same in a part of an answer; ``first`` for the first one of a choice."""

    def begin(self) -> list[dict[str, Any]]:
        """Choices that a stream begins with, before anything is written."""
        return []

    def whole(self, updates: list[Update]) -> dict[str, Any]:
        """The answer at once."""
        choices = [self.at_once(update) | self._extras(update, True) for update in updates]
        return self._head | {"choices": choices} | self._figures()

    async def chunks(self) -> AsyncGenerator[dict[str, Any]]:
        """The answer in parts."""
        with_usage = self.asked.stream_options is not None and bool(self.asked.stream_options.include_usage)
        nothing = {"usage": None} if with_usage else {}
        for choice in self.begin():
            yield self._head | {"choices": [choice]} | nothing
        begun = set[int]()
        async with aclosing(self.job.updates()) as updates:
            async for update in updates:
                if (
                    update.text
                    or update.calls
                    or update.finish_reason
                    or update.steps
                    or (update.tokens and self._tells_tokens)
                ):
                    first = update.choice.index not in begun
                    begun.add(update.choice.index)
                    choices = [self.part(update, first) | self._extras(update, first)]
                    yield self._head | {"choices": choices} | nothing
        if with_usage:
            yield self._head | {"choices": []} | self._figures()

    def _extras(self, update: Update, first: bool) -> dict[str, Any]:
        """The fields of a choice that a request asked for by ``return_tree`` and ``return_token_ids``."""
        found = dict[str, Any]()
        if self.asked.return_token_ids:
            found["token_ids"] = [written.token for written in update.tokens]
            if first:
                found["prompt_token_ids"] = update.choice.seq.prompt_ids
        if self.asked.return_tree:
            names = self.job.backend.llm.decoder.drafter.names
            found["trees"] = [tree_json(step, names, self.service.texts) for step in update.steps]
        return found

    def _figures(self) -> dict[str, Any]:
        choices = self.job.choices
        return {"usage": usage(choices), "metrics": {"speculative_decoding": speculative(choices)}}


async def answer(
    request: Request, service: Service, asked: Sampled, texts: int, plan: Callable[[], list[Planned]],
    made: Callable[[Job], Told],
) -> Response:  # fmt: skip
    """Does what a request asks for, and tells it in its form.

    Args:
        texts: how many texts it writes.
        plan: makes prompts of it, in a thread.
        made: the answer that tells what was done.

    Raises:
        ApiError, TokenTreeError: if it can't be done.
    """
    async with AsyncExitStack() as held:
        job = await held.enter_async_context(service.job(asked, texts, plan))
        told = made(job)
        if asked.stream:
            return EventStream(told.chunks(), service.settings.stall_timeout, held.pop_all(), told.last)
        return JSONResponse(told.whole(await unless_gone(request, job.whole())))
