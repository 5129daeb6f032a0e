"""Which requests a step is about: they come and go between steps, and are read, decoded, set back and ended."""

from __future__ import annotations

import sys
import warnings
from collections import deque
from collections.abc import Collection
from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass
from typing import TYPE_CHECKING

from tokentree.engines.prefix import LEAST
from tokentree.errors import OptionError, StepError, TokenTreeError, told
from tokentree.exclusive import Exclusive, stepping
from tokentree.sequence import FinishReason, Sequence

if TYPE_CHECKING:
    from tokentree.decoder import Decoder

PREFILL_ROWS = 64  # a forward over so many takes 3 to 5 times as long as one over a single row, on two cores
MORE_ALONE = 4  # times as many prompt tokens go through a step that nobody waits for a token of
SPARE_ROWS = 64  # that each text must have room for when another one is admitted


@dataclass(frozen=True)
class Event:
    """The result of a step for one request.

    Args:
        request_id: the id that `Scheduler.add` returned.
        tokens: the new tokens.
        finish_reason: why the request ended. It is set in its last event only.
        error: the error that ended the request, with the finish reason "error".
    """

    request_id: int
    tokens: list[int]
    finish_reason: FinishReason | None = None
    error: TokenTreeError | None = None


class Scheduler:
    """Chooses the requests of each step of a `Decoder`. Any thread may add and cancel requests. Steps take turns.

    A step is one forward. It holds the trees of all texts that are decoded, and up to ``prefill_rows`` tokens of
    prompts. So a long prompt delays others for no longer than so many rows take. A step that decodes no text reads four
    times as many tokens. Prompts share these rows, the shortest first. A prompt that begins like another one that is
    being read waits for that one, and reuses its KV. Prompts that are scored reuse none, and there are no more than
    ``prefill_rows`` in a step that has one: each of their rows has logits.

    Requests are admitted in the order of their arrival, while memory is left for their KV and for that of the next
    tokens of all. When memory runs out, the youngest request goes back to waiting, and is read again later. The oldest
    request always goes on, whatever it needs.

    Args:
        decoder: the loop.
        prefill_rows: the number of prompt tokens in a step that decodes texts too.
        kv_bytes: the memory for the target's KV of these requests in bytes. None: no limit.
        max_batch: the largest number of requests at a time. None: as many as memory allows.

    Attributes:
        kv_used: the bytes of KV that its requests had after the last step.
    """

    def __init__(
        self, decoder: Decoder, *, prefill_rows: int = PREFILL_ROWS, kv_bytes: int | None = None,
        max_batch: int | None = None,
    ) -> None:  # fmt: skip
        self._decoder, self._prefill_rows = decoder, prefill_rows
        self._kv_bytes, self._max_batch = kv_bytes, max_batch
        self._told: dict[int, int] = {}  # of each request that is here: tokens that events told of
        self._arrived, self._cancelled = deque[Sequence](), deque[int]()
        self._waiting, self._active = list[Sequence](), list[Sequence]()  # the oldest first
        self._suspects = list[int]()  # requests that were in a step that failed, and have been in no other since
        self._begun = set[int]()  # requests that were admitted once
        self._moved = self._decoder.clock()  # when a step began or ended last, or a request came where there was none
        self.kv_used = 0

    @property
    def lock(self) -> Exclusive:
        """The engine's lock."""
        return self._decoder.lock

    @property
    def idle(self) -> bool:
        """Whether there is nothing to do."""
        return not self._told

    @property
    def running(self) -> int:
        """How many requests are read or decoded."""
        return len(self._active)

    @property
    def waiting(self) -> int:
        """How many requests wait for their turn."""
        return max(0, len(self._told) - len(self._active))

    @property
    def still(self) -> float:
        """The seconds without a step, while there are requests."""
        return 0.0 if self.idle else self._decoder.clock() - self._moved

    @property
    def kv_bytes(self) -> int | None:
        """The memory for the KV of its requests in bytes. None: no limit."""
        return self._kv_bytes

    def add(self, request: Sequence) -> int:
        """From now on ``request`` waits for its turn; returns its id. One that is finished already stays as it is, and
        gets no event.

        Raises:
            OptionError: if it is no request, or is here already.
        """
        if not isinstance(request, Sequence):
            raise OptionError(f"the loop decodes sequences, and {request!r} is none")
        if request.id in self._told:
            raise OptionError("one and the same sequence can't be decoded twice at a time")
        if not request.finished:
            if self.idle:
                self._moved = self._decoder.clock()
            self._told[request.id] = len(request.output_ids)
            self._arrived.append(request)
        return request.id

    def cancel(self, request_id: int) -> None:
        """Drops a request and its KV: now, or when the step that is under way is over. It gets no event any more."""
        self._cancelled.append(request_id)
        if not sys.is_finalizing():  # torch is half gone then, and so is what there is to release
            self.lock.when_free(self._sweep)

    @stepping
    def step(self, held: Collection[int] = ()) -> list[Event]:
        """One forward. Who is over its deadline ends before it.

        A step that raises ends no other request: all that were in it are read again, one by one, and the one that fails
        alone ends with a `StepError`, or with what it raised if that is an error of this library.

        Args:
            held: ids of requests that take no part in it, and are the first to lose their KV.
        """
        self._sweep()
        now = self._moved = self._decoder.clock()
        for seq in [*self._active, *self._waiting]:
            if now > seq.deadline:
                seq.finish_reason = "timeout"
        self._make_room(held)
        self._admit(held)
        going = [seq for seq in self._active if seq.id not in held and not seq.finished]
        if suspect := next((seq for seq in going if seq.id in self._suspects), None):
            going = [suspect]
        unread = {seq.id: self._decoder.unread(seq) for seq in going}
        decoding = [seq for seq in going if not unread[seq.id]]
        alone = not decoding and not any(seq.scores_prompt for seq in going)
        rows = MORE_ALONE * self._prefill_rows if alone else self._prefill_rows
        reading = self._shares([(seq, unread[seq.id]) for seq in going if unread[seq.id]], rows)
        try:
            if decoding or reading:
                self._decoder.step(decoding, reading)
        except BaseException as error:  # noqa: BLE001  what is none of a request's is raised again
            self._recover([*decoding, *(seq for seq, _ in reading)], error)
        else:
            self._suspects = [one for one in self._suspects if one not in {seq.id for seq in decoding}]
        return self._events()

    # -- who takes part --------------------------------------------------------------------------------------------

    def _sweep(self) -> None:
        """Takes in what came, and drops what was cancelled."""
        while self._arrived:
            self._waiting.append(self._arrived.popleft())
        gone = set[int]()
        while self._cancelled:
            gone.add(self._cancelled.popleft())
        if gone:
            self._end([seq for seq in [*self._active, *self._waiting] if seq.id in gone])

    def _admit(self, held: Collection[int]) -> None:
        for seq in list(self._waiting):
            if seq.finished or seq.id in held:
                continue
            if self._max_batch is not None and sum(one.id not in held for one in self._active) >= self._max_batch:
                break
            if not self._make_room(held, seq):
                break
            if any(self._reads_for(seq, one) for one in self._active if one.id not in held):
                continue
            self._waiting.remove(seq)
            self._active.append(seq)
            if seq.id not in self._begun:
                self._begun.add(seq.id)
                seq.metrics.queue_seconds = self._decoder.clock() - seq.made
            try:
                self._decoder.begin(seq)
            except BaseException as error:  # noqa: BLE001  as in a step
                self._recover([seq], error)

    def _reads_for(self, seq: Sequence, one: Sequence) -> bool:
        """Whether ``one`` is still reading what ``seq`` begins with too."""
        most = max(self._decoder.engine.committed(one), LEAST - 1) + 1
        return most < min(seq.reusable + 1, len(one.tokens)) and seq.tokens[:most] == one.tokens[:most]

    def _fits(self, seqs: SequenceOf[Sequence], spare: int) -> bool:
        if self._kv_bytes is None:
            return True
        rows = self._decoder.shape.max_nodes + spare
        return sum(self._decoder.engine.nbytes(seq, len(seq.tokens) + rows) for seq in seqs) <= self._kv_bytes

    def _make_room(self, held: Collection[int], newcomer: Sequence | None = None) -> bool:
        """Sets back as many as there is no memory for: those held, and, but for a ``newcomer``, the youngest ones too.
        Returns whether there is room."""
        new, spare = ([], 0) if newcomer is None else ([newcomer], SPARE_ROWS)
        while len(self._active) + len(new) > 1 and not self._fits([*self._active, *new], spare):
            loser = next((seq for seq in reversed(self._active) if seq.id in held), None)
            if loser is None and new:
                return False
            self._set_back(loser or self._active[-1])
        return True

    def _set_back(self, seq: Sequence) -> None:
        """To waiting, in front of all others."""
        self._active.remove(seq)
        self._decoder.release([seq])
        self._waiting.insert(0, seq)

    def _shares(self, unread: list[tuple[Sequence, int]], rows: int) -> list[tuple[Sequence, int]]:
        """How many tokens of each prompt are read of ``rows``: as many of each, but no more than it has left."""
        reading = list[tuple[Sequence, int]]()
        shortest = sorted(unread, key=lambda one: one[1])
        for place, (seq, left) in enumerate(shortest):
            share = min(left, -(-rows // (len(shortest) - place)))
            rows -= share
            if share:
                reading.append((seq, share))
        return reading

    # -- what became of them ---------------------------------------------------------------------------------------

    def _recover(self, seqs: list[Sequence], error: BaseException) -> None:
        """A step was left in its midst: what engine and drafters have of ``seqs`` may be half of it, and is dropped."""
        for seq in reversed([one for one in self._active if one in seqs and not one.finished]):
            del seq.logprobs[len(seq.output_ids) :]
            self._set_back(seq)
        if not isinstance(error, Exception):
            raise error
        if len(seqs) == 1:
            fail(seqs[0], error)
            return
        self._suspects = [seq.id for seq in seqs]
        said = f"a step of {len(seqs)} requests failed, and each is tried alone now: {told(error)}"
        warnings.warn(said, stacklevel=4)

    def _events(self) -> list[Event]:
        """What there is to tell; who has finished is dropped."""
        events, over, self._moved = list[Event](), list[Sequence](), self._decoder.clock()
        for seq in [*self._active, *self._waiting]:
            new = seq.tokens[len(seq.prompt_ids) + self._told[seq.id] :]
            if new or seq.finished:
                events.append(Event(seq.id, new, seq.finish_reason, seq.error))
                self._told[seq.id] += len(new)
            if seq.finished:
                over.append(seq)
        self._end(over)
        return events

    def _end(self, seqs: list[Sequence]) -> None:
        gone = {seq.id for seq in seqs}
        self._decoder.release([seq for seq in self._active if seq.id in gone])
        self._active = [seq for seq in self._active if seq.id not in gone]
        self._waiting = [seq for seq in self._waiting if seq.id not in gone]
        self._suspects = [one for one in self._suspects if one not in gone]
        self._begun -= gone
        for one in gone:
            self._told.pop(one, None)
        self.kv_used = sum(self._decoder.engine.nbytes(seq, len(seq.tokens)) for seq in self._active)


def fail(seq: Sequence, error: Exception) -> None:
    """Ends a request that was alone in the step that raised ``error``."""
    if not isinstance(error, TokenTreeError):
        cause, error = error, StepError(f"a step failed: {told(error)}")
        error.__cause__ = cause
    seq.finish_reason, seq.error = "error", error
