"""The texts of one request while they are written."""

from __future__ import annotations

import logging
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import Literal

from tokentree.llm import LLM
from tokentree.sampling import SamplingParams
from tokentree.scheduler import Event
from tokentree.sequence import FinishReason, TokenLogprobs
from tokentree.serve.backends import Backend
from tokentree.serve.errors import NOT_READY, TOO_LATE, ApiError
from tokentree.serve.metrics import Meter
from tokentree.serve.tools.reader import CallPart, CallReader
from tokentree.serve.trees import Step, TreeWatcher

LOG = logging.getLogger("tokentree.serve")


@dataclass(frozen=True)
class Planned:
    """A prompt that is ready to be decoded ``params.n`` times."""

    ids: list[int]
    params: SamplingParams
    references: Sequence[list[int]] = ()
    reader: Callable[[], CallReader] | None = None  # of calls in the text


@dataclass(frozen=True)
class Written:
    """A token that was written.

    Args:
        token: its id.
        text: what it made certain, which may begin with text of earlier tokens.
        offset: where that begins in the output, in characters.
        logprobs: if they were asked for.
    """

    token: int
    text: str
    offset: int
    logprobs: TokenLogprobs | None


@dataclass
class Update:
    """What steps added to a text."""

    choice: Choice
    text: str = ""
    tokens: list[Written] = field(default_factory=list)
    steps: list[Step] = field(default_factory=list)
    calls: list[CallPart] = field(default_factory=list)
    finish_reason: FinishReason | Literal["tool_calls"] | None = None

    @property
    def is_empty(self) -> bool:
        """Whether there is nothing to tell."""
        return not (self.text or self.tokens or self.steps or self.calls or self.finish_reason)

    def add(self, later: Update) -> None:
        """Appends what a ``later`` one has."""
        self.text += later.text
        self.tokens += later.tokens
        self.steps += later.steps
        self.calls += later.calls
        self.finish_reason = later.finish_reason


class Choice:
    """One text of an answer.

    Args:
        index: its number in the answer.
        prompt: the number of its prompt.
    """

    def __init__(self, index: int, prompt: int, llm: LLM, planned: Planned, sample: int, trees: bool) -> None:
        self.index, self.prompt = index, prompt
        self.seq = llm.sequence(planned.ids, planned.params, sample, planned.references)
        self._pieces = llm.pieces(self.seq)
        self.reader = planned.reader() if planned.reader is not None else None
        self._watcher = TreeWatcher() if trees else None
        self.seq.watch = self._watcher
        self._offset = self._tokens = 0

    def update(self, event: Event) -> Update:
        """What ``event`` adds. Text that a stop string may still cut off comes later, with its tokens."""
        update = Update(self, finish_reason=event.finish_reason)
        said, hidden = "", self.reader.hidden if self.reader is not None else {}
        for piece in self._pieces.of(event):
            if piece.token_id is not None:
                known = self.seq.logprobs[self._tokens] if self.seq.params.logprobs is not None else None
                update.tokens.append(Written(piece.token_id, piece.text, self._offset, known))
                self._tokens += 1
            update.text += piece.text
            self._offset += len(piece.text)
            said += (hidden.get(piece.token_id, "") if piece.token_id is not None else "") + piece.text
        if self.reader is not None:
            self._split(said, update)
        if self._watcher is not None:
            update.steps = self._watcher.take()
        return update

    def _split(self, said: str, update: Update) -> None:
        """Splits what was ``said`` into content and calls."""
        assert self.reader is not None
        parts = self.reader.feed(said, last=update.finish_reason is not None)
        update.text = "".join(part for part in parts if isinstance(part, str))
        update.calls = [part for part in parts if not isinstance(part, str)]
        if update.finish_reason == "stop" and self.reader.calls:
            update.finish_reason = self.reader.reason


class Job:
    """The work of one request.

    Args:
        backend: what decodes it.
        plans: its prompts.
        trees: whether the trees of its steps are kept.
        meter: counts what it does.
        logs: whether its texts are logged.
    """

    def __init__(self, backend: Backend, plans: Sequence[Planned], trees: bool, meter: Meter, logs: bool) -> None:
        self.backend, self._meter, self._logs = backend, meter, logs
        self.choices = list[Choice]()
        for prompt, planned in enumerate(plans):
            for sample in range(planned.params.n):
                choice = Choice(len(self.choices), prompt, backend.llm, planned, sample, trees)
                self.choices.append(choice)

    async def updates(self) -> AsyncGenerator[Update]:
        """What steps add, as it comes. Whoever stops iterating ends the request.

        Raises:
            ApiError: if it took too long, or the server ends.
            TokenTreeError: if it failed.
        """
        known = {choice.seq.id: choice for choice in self.choices}
        with self._meter.counting([choice.seq for choice in self.choices]) as seqs:
            async with aclosing(self.backend.asked.events(seqs)) as events:
                async for event in events:
                    choice = known[event.request_id]
                    self._meter.count(choice.seq, event)
                    _check(event)
                    if event.finish_reason is not None and self._logs:
                        LOG.info("text: %r", self.backend.llm.result(choice.seq).text)
                    yield choice.update(event)

    async def whole(self) -> list[Update]:
        """All that is written, of each text at once. Errors as those of `updates`."""
        found = [Update(choice) for choice in self.choices]
        async with aclosing(self.updates()) as updates:
            async for update in updates:
                found[update.choice.index].add(update)
        for one in found:
            if one.choice.reader is None:
                one.text = self.backend.llm.result(one.choice.seq).text
        return found


def _check(event: Event) -> None:
    """Raises what a request failed with."""
    if event.error is not None:
        raise event.error
    if event.finish_reason == "timeout":
        raise ApiError(TOO_LATE, "the request took longer than this server allows", code="timeout")
    if event.finish_reason == "interrupted":
        raise ApiError(NOT_READY, "the server is shutting down", code="shutting_down")
