"""The loop: draft, verify, accept, commit."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterable, Iterator
from functools import partial

import torch

from tokentree.acceptance import Acceptance
from tokentree.draft import Draft
from tokentree.drafters.base import Drafter
from tokentree.engines.base import Engine, TargetOutput
from tokentree.errors import OptionError, PairingError, RequestError
from tokentree.exclusive import Exclusive, exclusive
from tokentree.growing import SOURCES, compile_loops
from tokentree.sequence import Accepted, Sequence, TokenLogprobs
from tokentree.shapes.base import Shape

Watcher = Callable[[Sequence, Draft, Accepted], None]


class Decoder:
    """Decodes sequences, several tokens per target forward.

    Args:
        engine: the target model.
        drafter: who proposes the trees.
        shape: how they grow and are cut.
        accept: the rule that picks the new tokens.
        watch: called after every step of every sequence, with the draft and what was accepted of it. It is a part of
            the step: it must not decode with this engine, nor wait for a thread that does.

    Raises:
        PairingError: if the rule needs drawn children and the drafter can't draw any.
        OptionError: if drafter or shape is none.
    """

    def __init__(
        self, engine: Engine, drafter: Drafter, shape: Shape, accept: Acceptance, watch: Watcher | None = None
    ) -> None:
        for given, kind in ((drafter, Drafter), (shape, Shape)):
            if not isinstance(given, kind):
                raise OptionError(f"{given!r} is not a {kind.__name__}: names are for LLM")
        if isinstance(accept, str) or not callable(accept):
            raise OptionError(f"{accept!r} is not a rule: names are for LLM and for acceptance()")
        if accept.draws_children and not drafter.draws_children:
            raise PairingError(
                f"accept='rejection' needs children drawn from a distribution, and the drafter {drafter.name!r} picks "
                "them: use accept='match', which is lossless with any drafter"
            )
        compile_loops()
        self.engine, self.drafter, self.shape, self.accept, self.watch = engine, drafter, shape, accept, watch

    @property
    def lock(self) -> Exclusive:
        """The engine's. Several threads may decode at once, with this decoder and others of the same engine: their
        steps take turns."""
        return self.engine.lock

    def run(self, seqs: Iterable[Sequence], max_batch: int = 8) -> Iterator[list[Sequence]]:
        """Decodes all ``seqs``, at most ``max_batch`` at a time; yields those that grew after each step.

        A finished sequence leaves and a waiting one joins between steps. What is kept for a sequence is forgotten when
        it finishes, or when the caller stops iterating. One whose rules fail ends alone, with the finish reason "error"
        and its `error` set.

        Raises:
            OptionError: if ``max_batch`` is below 1, or something else than sequences is given.
        """
        if not isinstance(max_batch, int) or max_batch < 1:
            raise OptionError(f"max_batch={max_batch!r} must be at least 1")
        waiting, active, over = iter(seqs), list[Sequence](), object()
        try:
            while True:
                while len(active) < max_batch and (seq := next(waiting, over)) is not over:
                    if not isinstance(seq, Sequence):
                        raise OptionError(f"the loop decodes sequences, and {seq!r} is none")
                    if any(seq is other for other in active):
                        raise OptionError("one and the same sequence can't be decoded twice at a time")
                    if not seq.finished:
                        active.append(seq)
                        self.prefill(seq)
                if not active:
                    return
                self.step(active)
                yield list(active)
                if done := [seq for seq in active if seq.finished]:
                    self.release(done)
                    active = [seq for seq in active if not seq.finished]
        finally:
            if active and not sys.is_finalizing():  # torch is half gone then, and so is what there is to release
                self.lock.when_free(partial(self.release, active))

    @exclusive
    def prefill(self, seq: Sequence) -> None:
        """Puts all of a new sequence but its last token into the KV of target and drafter."""
        started = time.perf_counter()
        seq.metrics.reused_tokens += self.engine.prefill(seq)
        self.drafter.prefill([seq])
        seq.metrics.prefill_seconds += time.perf_counter() - started
        seq.metrics.lossy = self.accept.lossy

    @exclusive
    def step(self, seqs: list[Sequence]) -> None:
        """One target forward for the whole batch."""
        clock = [time.perf_counter()]
        drafts = [draft.cut(seq.room - 1) for seq, draft in zip(seqs, self._draft(seqs), strict=True)]
        clock.append(time.perf_counter())
        out = self.engine.verify(seqs, [draft.tree for draft in drafts])
        clock.append(time.perf_counter())
        accepted = [self._accept(i, seq, draft, out) for i, (seq, draft) in enumerate(zip(seqs, drafts, strict=True))]
        self.engine.commit(seqs, [step.path for step in accepted])
        clock.append(time.perf_counter())
        going = [i for i, step in enumerate(accepted) if step.error is None]
        part = [seqs[i] for i in going], [drafts[i] for i in going], [accepted[i] for i in going]
        if going:
            self.drafter.observe(*part[:2], out.of(going), part[2])
            self.shape.observe(*part, clock[1] - clock[0], out.seconds)
        clock.append(time.perf_counter())
        for i, (seq, draft, step) in enumerate(zip(seqs, drafts, accepted, strict=True)):
            self._record(i, seq, draft, step, out, clock)

    @exclusive
    def release(self, seqs: list[Sequence]) -> None:
        self.engine.release(seqs)
        self.drafter.release(seqs)
        self.shape.release(seqs)

    def _draft(self, seqs: list[Sequence]) -> list[Draft]:
        if self.shape.rests(seqs):
            return [Draft(seq.tokens[-1]) for seq in seqs]
        return self.shape.cut(seqs, self.drafter.propose(seqs, self.shape, self.accept.draws_children))

    def _accept(self, i: int, seq: Sequence, draft: Draft, out: TargetOutput) -> Accepted:
        """Stops and limits cut before anything is permanent."""
        try:
            step = self.accept(seq, draft, out.after(i))
        except RequestError as error:
            step = Accepted([], [], error=error)
        return seq.truncate(step)

    def _record(
        self, i: int, seq: Sequence, draft: Draft, step: Accepted, out: TargetOutput, clock: list[float]
    ) -> None:
        metrics = seq.metrics
        metrics.count_step(draft.depth, len(draft) - 1, max(0, len(step.path) - 1), step.refused)
        metrics.draft_seconds += clock[1] - clock[0] + clock[4] - clock[3]
        metrics.verify_seconds += clock[2] - clock[1]
        metrics.accept_seconds += clock[3] - clock[2]
        metrics.decode_seconds += clock[4] - clock[0]
        metrics.steps.append((len(draft), len(step.tokens), clock[4] - clock[0]))
        for node in step.path[1:]:
            for bit, name in enumerate(self.drafter.names):
                if draft.ints[SOURCES, node] >> bit & 1:
                    metrics.accepted_by_source[name] = metrics.accepted_by_source.get(name, 0) + 1
        if seq.params.logprobs is not None:
            for node, token in zip(step.path, step.tokens, strict=True):
                seq.logprobs.append(_logprobs(out.logits(i, node), token, seq.params.logprobs))
        seq.extend(step)
        if self.watch is not None and step.tokens:
            self.watch(seq, draft, step)


def _logprobs(logits: torch.Tensor, token: int, count: int) -> TokenLogprobs:
    scores = logits.float().log_softmax(-1)
    best = scores.topk(min(count, scores.numel()))
    top = dict(zip(best.indices.tolist(), best.values.tolist(), strict=True))
    return TokenLogprobs(token, float(scores[token]), top)
