"""The loop: draft, verify, accept, commit."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Iterator
from collections.abc import Sequence as SequenceOf

import torch

from tokentree.acceptance import Acceptance
from tokentree.draft import Draft
from tokentree.drafters.base import Drafter
from tokentree.drafters.none import NoDrafter
from tokentree.engines.base import Engine, TakesPrompts
from tokentree.engines.output import TargetOutput
from tokentree.errors import InvariantError, ModelError, OptionError, PairingError, RequestError
from tokentree.exclusive import Exclusive, exclusive
from tokentree.grammars.drafting import NAME, guided
from tokentree.growing import compile_loops
from tokentree.sampling import NOT_NUMBERS
from tokentree.scheduler import Scheduler, fail
from tokentree.sequence import Accepted, Sequence, TokenLogprobs
from tokentree.shapes.base import Shape
from tokentree.sharing import Shared

Watcher = Callable[[Sequence, Draft, Accepted], None]
SCORED = 64  # rows of logits that become log-probabilities at a time


class Decoder:
    """Decodes sequences, several tokens per target forward.

    Args:
        engine: the target model.
        drafter: proposes the trees.
        shape: decides how trees grow and are cut.
        accept: the acceptance rule. It chooses the new tokens.
        watch: called after every step with each sequence, its draft and what was accepted of it. It runs inside of the
            step. So it must not decode with this engine, nor wait for a thread that does.
        clock: tells the time in seconds, of requests and of the scheduler too; by default ``time.perf_counter``. The
            engine and the drafter have clocks of their own.

    Raises:
        PairingError: if the rule needs drawn children and the drafter can't draw any, or chains and the shape branches.
        OptionError: if ``drafter`` isn't a `Drafter`, or ``shape`` isn't a `Shape`.
    """

    def __init__(
        self, engine: Engine, drafter: Drafter, shape: Shape, accept: Acceptance, watch: Watcher | None = None,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:  # fmt: skip
        for given, kind in ((drafter, Drafter), (shape, Shape)):
            if not isinstance(given, kind):
                raise OptionError(f"{given!r} is not a {kind.__name__}: names are for LLM")
        if isinstance(accept, str) or not callable(accept):
            raise OptionError(f"{accept!r} is not a rule: names are for LLM and for acceptance()")
        if not accept.takes_picked and not drafter.draws_children:
            raise PairingError(
                f"accept='rejection' needs children drawn from a distribution, and the drafter {drafter.name!r} picks "
                "them: use accept='match', which is lossless with any drafter"
            )
        if accept.chains_only and shape.branches:
            raise PairingError(
                f"accept='block' verifies chains, and the shape {shape!r} branches: use shape='chain:6', or "
                "accept='traversal', which verifies trees"
            )
        compile_loops()
        self.engine, self.drafter, self.shape, self.accept, self.watch = engine, drafter, shape, accept, watch
        self.clock = clock

    @property
    def lock(self) -> Exclusive:
        """The engine's lock. Several threads may decode with this decoder, and with others of the same engine. Their
        steps take turns."""
        return self.engine.lock

    @property
    def names(self) -> list[str]:
        """The names of all proposers, in the order of the bits in `Draft.sources`: the drafters, and grammars."""
        return [*self.drafter.names, NAME]

    def run(self, seqs: Iterable[Sequence], max_batch: int = 8) -> Iterator[list[Sequence]]:
        """Decodes all ``seqs``, at most ``max_batch`` at a time. Yields the sequences that grew, after each step.

        Finished sequences leave and waiting ones join between steps. The KV and the state of a sequence are dropped
        when it finishes, or when the caller stops iterating. A sequence whose rules fail ends alone, with the finish
        reason "error" and its `error` set. A `Scheduler`, made for this call, chooses the sequences of each step.

        Raises:
            OptionError: if ``max_batch`` is below 1, or ``seqs`` holds anything but sequences.
            Exception: whatever else a step raised.
        """
        for events in Shared(Scheduler(self)).run(seqs, max_batch):
            for _, event in events:
                if event.error is not None and not isinstance(event.error, RequestError):
                    raise event.error.__cause__ or event.error
            yield [seq for seq, _ in events]

    @exclusive
    def begin(self, seq: Sequence) -> None:
        """Makes room for a new sequence, and reuses the KV of a text that begins alike, or of its prompt itself.

        Raises:
            ModelError: if the engine can't use the KV that its prompt came with.
        """
        started = self.clock()
        if seq.prompt_kv is None:
            seq.metrics.reused_tokens = self.engine.begin(seq)
        elif isinstance(self.engine, TakesPrompts):
            self.engine.take(seq, seq.prompt_kv)
        else:
            raise ModelError(f"{self.engine.info.name} can't go on here behind a prompt that the model read by itself")
        self._observe_prompt(seq)
        seq.metrics.prefill_seconds += self.clock() - started
        seq.metrics.lossy = self.accept.lossy

    def unread(self, seq: Sequence) -> int:
        """The number of tokens that must still be read before the sequence can be decoded. The last token isn't
        read."""
        return len(seq.tokens) - 1 - self.engine.committed(seq)

    @exclusive
    def prefill(self, seq: Sequence) -> None:
        """Reads all tokens of a new sequence but the last one into the KV of target and drafter."""
        self.begin(seq)
        if unread := self.unread(seq):
            self.step([], [(seq, unread)])

    @exclusive
    def step(self, seqs: list[Sequence], reading: SequenceOf[tuple[Sequence, int]] = ()) -> None:
        """Makes one step: one target forward for the whole batch.

        Args:
            seqs: the sequences to decode.
            reading: pairs of a sequence that has begun and a number of tokens. So many of its next tokens go through
                the same forward.
        """
        times, unread = [self.clock()], sum([count for _, count in reading])
        before = sum([seq.metrics.prefill_seconds for seq in seqs])
        drafts = [draft.cut(seq.room - 1) for seq, draft in zip(seqs, self._draft(seqs, unread), strict=True)]
        times[0] += sum([seq.metrics.prefill_seconds for seq in seqs]) - before  # when a drafter read a prompt
        times.append(self.clock())
        out = self.engine.verify(seqs, [draft.tree for draft in drafts], reading=reading)
        for seq, _ in reading:
            self._score(seq, out)
        times.append(self.clock())
        accepted = [self._accept(i, seq, draft, out) for i, (seq, draft) in enumerate(zip(seqs, drafts, strict=True))]
        self.engine.commit(seqs, [step.path for step in accepted])
        times.append(self.clock())
        going = [i for i, step in enumerate(accepted) if step.error is None]
        part = [seqs[i] for i in going], [drafts[i] for i in going], [accepted[i] for i in going]
        if going:
            self.drafter.observe(*part[:2], out.of(going), part[2])
            self.shape.observe(*part, times[1] - times[0], 0.0 if reading else out.seconds)
        times.append(self.clock())
        for i, (seq, draft, step) in enumerate(zip(seqs, drafts, accepted, strict=True)):
            self._record(i, seq, draft, step, out, times)
        rows = sum(map(len, drafts)) + unread
        for seq, count in reading:
            started = self.clock()
            self._observe_prompt(seq)
            share = (times[2] - times[1]) * count / rows
            seq.metrics.prefill_seconds += share + self.clock() - started
        self._stepped(seqs, [seq for seq, _ in reading], rows, times)

    def _stepped(self, seqs: list[Sequence], reading: list[Sequence], rows: int, times: list[float]) -> None:
        """For who measures: a step of ``rows`` rows has been made. ``times``: when drafting, the forward, accepting and
        learning began, and when the last one ended."""

    def _observe_prompt(self, seq: Sequence) -> None:
        """What has been read of ``seq`` is told to the drafter. A request that only scores its prompt needs no drafts,
        and ends here."""
        if seq.room:
            self.drafter.observe_prompt([seq], self.engine.committed(seq))
        elif not seq.finished and not self.unread(seq):
            seq.finish_reason = "length"

    def _score(self, seq: Sequence, out: TargetOutput) -> None:
        """Log-probabilities of the prompt's tokens that follow those which were read now. What was scored before it
        was read again stays."""
        rows, count, known = out.read.get(seq.id), seq.params.prompt_logprobs, seq.prompt_logprobs
        if rows is None or count is None:
            return
        first = self.engine.committed(seq) - len(rows) + 1  # the place of the token after the first row
        if first > len(known):
            raise InvariantError(f"tokens {len(known)} to {first - 1} of a prompt can't be scored: they were not read")
        end = min(first + len(rows), len(seq.prompt_ids))
        for start in range(len(known), end, SCORED):
            tokens, row = seq.prompt_ids[start : min(start + SCORED, end)], rows[start - first]
            new = _logprobs(out.all_logits[row : row + len(tokens)], tokens, count)
            known += new
            if any(math.isnan(one.logprob) for one in new):
                fail(seq, RequestError(NOT_NUMBERS))

    @exclusive
    def release(self, seqs: list[Sequence]) -> None:
        self.engine.release(seqs)
        self.drafter.release(seqs)
        self.shape.release(seqs)

    def _draft(self, seqs: list[Sequence], unread: int) -> list[Draft]:
        if not seqs or self.shape.rests(seqs, unread):
            return [Draft(seq.tokens[-1]) for seq in seqs]
        drafts = self.drafter.propose(seqs, self.shape, self.accept.draws_children)
        return self.shape.cut(seqs, [self._guided(seq, draft) for seq, draft in zip(seqs, drafts, strict=True)])

    def _guided(self, seq: Sequence, draft: Draft) -> Draft:
        """``draft``, without what the request's grammar forbids, and with what it forces. Children that were drawn were
        drawn from what it allows. Plain decoding has no drafts."""
        if seq.guide is None or draft.sampled is not None or isinstance(self.drafter, NoDrafter):
            return draft
        depth = min(self.shape.max_depth, seq.room - 1)
        return guided(draft, seq.followed(seq.guide), 1 << len(self.drafter.names), depth)

    def _accept(self, i: int, seq: Sequence, draft: Draft, out: TargetOutput) -> Accepted:
        """Stops and limits cut before anything is permanent."""
        try:
            step = self.accept(seq, draft, out.after(i))
        except RequestError as error:
            step = Accepted([], [], error=error)
        return seq.truncate(step)

    def _record(
        self, i: int, seq: Sequence, draft: Draft, step: Accepted, out: TargetOutput, times: list[float]
    ) -> None:
        metrics = seq.metrics
        metrics.count_step(draft.depth, len(draft) - 1, max(0, len(step.path) - 1), step.refused)
        metrics.draft_seconds += times[1] - times[0] + times[4] - times[3]
        metrics.verify_seconds += times[2] - times[1]
        metrics.accept_seconds += times[3] - times[2]
        metrics.decode_seconds += times[4] - times[0]
        metrics.steps.append((len(draft), len(step.tokens), times[4] - times[0]))
        if len(step.path) > 1:
            metrics.count_sources(draft.sources, step.path[1:], self.names)
        if seq.params.logprobs is not None:
            for node, token in zip(step.path, step.tokens, strict=True):
                seq.logprobs += _logprobs(out.logits(i, node)[None], [token], seq.params.logprobs)
        seq.extend(step)
        for watch in (self.watch, seq.watch) if step.tokens else ():
            if watch is not None:
                watch(seq, draft, step)


def _logprobs(logits: torch.Tensor, tokens: list[int], count: int) -> list[TokenLogprobs]:
    """Of each of ``tokens``, and of the ``count`` most probable ones, by its row of ``logits`` [tokens, vocab]."""
    scores = logits.float().log_softmax(-1)
    best = scores.topk(min(count, scores.shape[-1]))
    said = scores.gather(-1, torch.tensor(tokens, device=scores.device)[:, None])[:, 0].tolist()
    tops = zip(best.indices.tolist(), best.values.tolist(), strict=True)
    return [
        TokenLogprobs(token, logprob, dict(zip(ids, values, strict=True)))
        for token, logprob, (ids, values) in zip(tokens, said, tops, strict=True)
    ]
