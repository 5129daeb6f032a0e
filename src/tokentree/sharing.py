"""One scheduler for any number of threads: who waits for a token steps for all."""

from __future__ import annotations

from collections import deque
from collections.abc import Generator, Iterable, Iterator

from tokentree.errors import OptionError
from tokentree.scheduler import Event, Scheduler
from tokentree.sequence import Sequence

AHEAD = 16  # steps that a request may be ahead of who reads it

Events = list[tuple[Sequence, Event]]


class Shared:
    """Decodes the requests of several threads in the same steps, without a thread of its own. A thread that has no
    events takes the engine's lock. Then either another one has stepped for it, or it makes a step for all.

    A request whose owner doesn't read on is stopped when it is `AHEAD` steps ahead: it takes no part in steps, and is
    the first to lose its KV when memory runs out.

    Args:
        scheduler: nobody else steps it.
    """

    def __init__(self, scheduler: Scheduler) -> None:
        self._scheduler = scheduler
        self._owned: dict[int, tuple[Sequence, deque[Events]]] = {}  # requests, and where their events go

    def run(self, seqs: Iterable[Sequence], max_batch: int) -> Generator[Events]:
        """Decodes ``seqs``, at most ``max_batch`` of them at a time; yields what a step did for them. What isn't
        finished when the caller stops iterating is cancelled.

        Raises:
            OptionError: if ``max_batch`` is below 1, or something else than new sequences is given.
        """
        if not isinstance(max_batch, int) or max_batch < 1:
            raise OptionError(f"max_batch={max_batch!r} must be at least 1")
        return self._run(iter(seqs), max_batch)

    def _run(self, waiting: Iterator[Sequence], max_batch: int) -> Generator[Events]:
        inbox, own = deque[Events](), set[int]()
        try:
            while True:
                while len(own) < max_batch and (seq := next(waiting, self)) is not self:
                    if isinstance(seq, Sequence) and not seq.finished:
                        self._owned.setdefault(seq.id, (seq, inbox))  # before another thread decodes it
                        own.add(self._scheduler.add(seq))
                    else:
                        self._scheduler.add(seq)  # type: ignore[arg-type]
                if not own:
                    return
                while not inbox:
                    with self._scheduler.lock:
                        if not inbox:
                            self._step()
                events = inbox.popleft()
                for seq, event in events:
                    if event.finish_reason is not None:
                        own.discard(seq.id)
                yield events
        finally:
            for request_id in sorted(own):  # in the order in which they came
                self._owned.pop(request_id, None)
                self._scheduler.cancel(request_id)

    def _step(self) -> None:
        """One step, and its events to whom they belong."""
        held = {request_id for request_id, (_, inbox) in list(self._owned.items()) if len(inbox) >= AHEAD}
        told = dict[int, tuple[deque[Events], Events]]()
        for event in self._scheduler.step(held):
            owned = self._owned.get(event.request_id)
            if owned is None:  # cancelled in the midst of the step
                continue
            seq, inbox = owned
            if event.finish_reason is not None:
                self._owned.pop(event.request_id, None)
            told.setdefault(id(inbox), (inbox, []))[1].append((seq, event))
        for inbox, events in told.values():
            inbox.append(events)
