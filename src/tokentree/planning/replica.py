"""A server among others: the scheduler and the loop, and a clock of their own."""

from __future__ import annotations

from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass, replace
from typing import Protocol

import numpy as np

from tokentree.acceptance import acceptance
from tokentree.decoder import Decoder
from tokentree.draft import Draft
from tokentree.drafters.base import Drafter
from tokentree.drafters.none import NoDrafter
from tokentree.errors import OptionError
from tokentree.planning.clock import Clock
from tokentree.planning.engine import CONTEXT, TimedEngine
from tokentree.planning.load import Asked
from tokentree.planning.timing import Beside, Timing
from tokentree.sampling import Noise, SamplingParams
from tokentree.scheduler import PREFILL_ROWS, Event, Scheduler
from tokentree.sequence import Sequence
from tokentree.shapes import Cost, Shape, shape

AHEAD = 4  # requests that a replica which has a prompt's KV may have more than the one that has the fewest


class Proposing(Protocol):
    """What is known of drafts."""

    def drafter(self, seconds: Beside, clock: Clock, generator: np.random.Generator) -> Drafter:
        """One that proposes such drafts. A step that asks for some takes ``seconds``."""


@dataclass(frozen=True)
class Setup:
    """What every replica is.

    Args:
        timing: what its steps take.
        acceptance: what is known of its drafts. None: it decodes plainly.
        shape: of its trees, as `LLM` takes it.
        max_batch: the largest number of texts that are decoded together. None: as many as there is memory for.
        prefill_rows: tokens of prompts in a step that decodes texts too.
        kv_tokens: memory for KV, in tokens. None: without end.
        kept_tokens: the same, for KV of ended texts.
        shared_tokens: that all prompts begin with.

    Raises:
        OptionError: if a number is too small.
    """

    timing: Timing
    acceptance: Proposing | None = None
    shape: str = "cost"
    max_batch: int | None = 8
    prefill_rows: int = PREFILL_ROWS
    kv_tokens: int | None = None
    kept_tokens: int | None = None
    shared_tokens: int = 0

    def __post_init__(self) -> None:
        for name in ("max_batch", "prefill_rows", "kv_tokens", "kept_tokens"):
            value = getattr(self, name)
            if value is not None and value < (name != "kept_tokens"):
                raise OptionError(f"{name}={value} is too small")
        shape(self.shape)

    def plain(self) -> Setup:
        """The same that decodes plainly."""
        return replace(self, acceptance=None, timing=self.timing.plainly())

    def decoder(self, clock: Clock, generator: np.random.Generator) -> Decoder:
        """The loop of a replica, which reads the time of ``clock``."""
        engine = TimedEngine(self.timing, clock, self.kept_tokens, self.shared_tokens)
        drafter: Drafter = NoDrafter()
        form: Shape = Plain()
        if self.acceptance is not None:
            drafter = self.acceptance.drafter(self.timing.drafting, clock, generator)
            form = shape(self.shape)
            if isinstance(form, Cost):
                form.use_curve(self.timing.curve)
        return Decoder(engine, drafter, form, acceptance("match"), clock=clock)


class Plain(Shape):
    """No trees at all."""

    max_depth, max_nodes = 1, 2

    def counts(self, seq: Sequence, draft: Draft, frontier: SequenceOf[int]) -> list[int]:
        return [0] * len(frontier)

    def select(self, seq: Sequence, draft: Draft, level: SequenceOf[int]) -> list[int]:
        return []

    def rests(self, seqs: list[Sequence], reading: int = 0) -> bool:
        return True

    def prune(self, seq: Sequence, draft: Draft) -> Draft:
        return draft


class Replica:
    """Decodes requests on a clock of its own.

    Args:
        setup: what it is.
        generator: draws what is right of its drafts.

    Attributes:
        clock: its time. It is ahead of the simulation's while a step goes on.
        asked: the requests that are under way, by the ids of their sequences.
        forwards, texts: how many forwards decoded texts, and of how many texts these were altogether.
        is_busy: whether a step goes on, or is about to begin.
    """

    def __init__(self, setup: Setup, generator: np.random.Generator) -> None:
        self.clock = Clock()
        self.asked: dict[int, Asked] = {}
        self.forwards, self.texts, self.is_busy = 0, 0, False
        self._step = setup.timing.step
        decoder = setup.decoder(self.clock, generator)
        assert isinstance(decoder.engine, TimedEngine)
        self.engine = decoder.engine
        self._scheduler = Scheduler(
            decoder, prefill_rows=setup.prefill_rows, kv_bytes=setup.kv_tokens, max_batch=setup.max_batch
        )

    @property
    def idle(self) -> bool:
        """Whether it has nothing to do."""
        return self._scheduler.idle

    def add(self, asked: Asked) -> None:
        """A request comes."""
        params = SamplingParams(max_tokens=asked.output_tokens)
        seq = Sequence([asked.prompt] * asked.prompt_tokens, params, _no_noise, CONTEXT, made=asked.seconds)
        self.asked[self._scheduler.add(seq)] = asked

    def step(self) -> list[Event]:
        """One step, at the end of which its clock stands. What it gave is there by then."""
        events = self._scheduler.step()
        texts = sum(bool(event.tokens) for event in events)
        self.forwards += bool(texts)
        self.texts += texts
        tokens = sum(len(event.tokens) for event in events)
        self.clock.advance(self._step.seconds(texts, tokens) if texts else self._step.first)
        return events


def _no_noise(position: int, purpose: int) -> Noise:
    raise AssertionError("a simulated target draws nothing")


# -- which replica a request goes to -----------------------------------------------------------------------------------


class Router(Protocol):
    """Chooses the replica of a request."""

    def __call__(self, asked: Asked, replicas: SequenceOf[Replica]) -> Replica: ...


def in_turns(asked: Asked, replicas: SequenceOf[Replica]) -> Replica:
    """One replica after another."""
    return replicas[asked.number % len(replicas)]


def least_busy(asked: Asked, replicas: SequenceOf[Replica]) -> Replica:
    """The one with the fewest requests under way; of several, the first one."""
    return min(replicas, key=lambda one: len(one.asked))


def by_prefix(asked: Asked, replicas: SequenceOf[Replica]) -> Replica:
    """The least busy one of those that have KV of the prompt, if it has at most `AHEAD` requests more than the least
    busy one of all."""
    best = least_busy(asked, replicas)
    knowing = [one for one in replicas if one.engine.keeps(asked.prompt)]
    known = least_busy(asked, knowing) if knowing else best
    return known if len(known.asked) <= len(best.asked) + AHEAD else best


ROUTERS: dict[str, Router] = {"in-turns": in_turns, "least-busy": least_busy, "prefix": by_prefix}
