"""A load on some replicas, event by event."""

from __future__ import annotations

import heapq
from array import array
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np

from tokentree.errors import OptionError
from tokentree.planning.load import Asked, Load
from tokentree.planning.replica import ROUTERS, Replica, Router, Setup
from tokentree.scheduler import Event

DELIVERY, ARRIVAL, STEP = range(3)  # of what happens at the same time, in this order
GROWTH = 0.1  # of the measured requests: if so many more are under way at their end, there are too many of them
MOST_REPLICAS = 512  # a cost shape remembers a quarter of a megabyte


@dataclass(frozen=True)
class Window:
    """Which requests are measured.

    Args:
        warm: those that come first are not.
        measured: so many after these are. None: all.
    """

    warm: int = 0
    measured: int | None = None


@dataclass
class Outcome:
    """What became of the measured requests.

    Attributes:
        begin, end: the time between the arrivals of the first measured request and of the first one after them.
        tokens: that were given out in between, of all requests.
        arrived: measured requests that came, and ``ended``, that ended.
        first: seconds from a request's arrival to its first token.
        gaps: seconds between two steps that gave tokens of one request.
        whole: seconds from a request's arrival to its end.
        overloaded: whether more requests came than ended, so that the others wait longer and longer. Times are of no
            use then.
        forwards: that decoded texts, all replicas together.
        texts: of these forwards altogether.
        all_tokens: that these gave.
    """

    begin: float = 0.0
    end: float = 0.0
    tokens: int = 0
    arrived: int = 0
    ended: int = 0
    first: array[float] = field(default_factory=lambda: array("d"))
    gaps: array[float] = field(default_factory=lambda: array("d"))
    whole: array[float] = field(default_factory=lambda: array("d"))
    overloaded: bool = False
    forwards: int = 0
    texts: int = 0
    all_tokens: int = 0


class Simulation:
    """Requests of a load, and replicas that decode them.

    A step begins once the one before it has ended, with all requests that came until then. What it gives is there at
    its end.

    Args:
        setup: what each replica is.
        replicas: how many there are.
        load: where requests come from.
        window: which requests are measured.
        generator: draws what is right of drafts.
        router: chooses the replica of each request.
        tell: is called now and then, with the share of the measured requests that ended.

    Raises:
        OptionError: if there is no replica, or are too many.
    """

    def __init__(
        self, setup: Setup, replicas: int, load: Load, window: Window, generator: np.random.Generator,
        router: Router = ROUTERS["least-busy"], tell: Callable[[float], None] = lambda share: None,
    ) -> None:  # fmt: skip
        if not 1 <= replicas <= MOST_REPLICAS:
            raise OptionError(f"there are 1 to {MOST_REPLICAS:,} replicas")
        self._replicas = [Replica(setup, one) for one in generator.spawn(replicas)]
        self._load, self._window, self._router, self._tell = load, window, router, tell
        self._queue = list[tuple[float, int, int, Asked | Replica, list[Event]]]()
        self._serial, self._under_way = 0, 0
        self._latest: dict[int, float] = {}  # of measured requests that have tokens, by number: when the last ones came
        self._under_way_at_first = 0
        self._is_open, self._now = True, 0.0  # whether the window is; the time of what happened last

    def run(self) -> Outcome:
        """Lets it all happen, until the measured requests have ended, or are too many."""
        self.outcome = Outcome()
        for asked in self._load.first():
            self._put(asked.seconds, ARRIVAL, asked)
        while self._queue and not self._is_over():
            now, kind, _, subject, events = heapq.heappop(self._queue)
            if isinstance(subject, Asked):
                self._arrive(subject, now)
            elif kind == DELIVERY:
                self._deliver(subject, events, now)
            else:
                self._step(subject, now)
            self._now = now
        if self._is_open:
            self.outcome.end = self._now
        self.outcome.forwards = sum(one.forwards for one in self._replicas)
        self.outcome.texts = sum(one.texts for one in self._replicas)
        return self.outcome

    def _put(self, seconds: float, kind: int, subject: Asked | Replica, events: list[Event] | None = None) -> None:
        heapq.heappush(self._queue, (seconds, kind, self._serial, subject, events or []))
        self._serial += 1

    def _is_over(self) -> bool:
        found, measured = self.outcome, self._window.measured
        return found.overloaded or (measured is not None and found.ended == measured)

    def _measures(self, asked: Asked) -> bool:
        place, measured = asked.number - self._window.warm, self._window.measured
        return place >= 0 and (measured is None or place < measured)

    # -- what happens ----------------------------------------------------------------------------------------------

    def _arrive(self, asked: Asked, now: float) -> None:
        place, found = asked.number - self._window.warm, self.outcome
        if place == 0:
            found.begin, self._under_way_at_first = now, self._under_way
        elif place == self._window.measured:
            found.end, self._is_open = now, False
            found.overloaded = self._under_way - self._under_way_at_first > GROWTH * place + len(self._replicas)
        found.arrived += self._measures(asked)
        self._under_way += 1
        replica = self._router(asked, self._replicas)
        if not replica.is_busy:
            replica.is_busy, replica.clock.now = True, now
            self._put(now, STEP, replica)
        replica.add(asked)
        if (following := self._load.after_arrival(asked)) is not None:
            self._put(following.seconds, ARRIVAL, following)

    def _step(self, replica: Replica, now: float) -> None:
        """It begins now, and what it gives is told when it ends."""
        events = replica.step()
        self._put(replica.clock.now, DELIVERY, replica, events)

    def _deliver(self, replica: Replica, events: list[Event], now: float) -> None:
        for event in events:
            asked = replica.asked[event.request_id]
            self._count(asked, event, now)
            if event.finish_reason is not None:
                del replica.asked[event.request_id]
                self._under_way -= 1
                for following in self._load.after_end(asked, now):
                    self._put(following.seconds, ARRIVAL, following)
        replica.is_busy = not replica.idle
        if replica.is_busy:
            self._put(now, STEP, replica)

    def _count(self, asked: Asked, event: Event, now: float) -> None:
        found, measured = self.outcome, self._measures(asked)
        found.all_tokens += len(event.tokens)
        if found.arrived and self._is_open:
            found.tokens += len(event.tokens)
        if not measured:
            return
        before = self._latest.get(asked.number)
        if event.tokens:
            (found.first if before is None else found.gaps).append(now - (asked.seconds if before is None else before))
            self._latest[asked.number] = now
        if event.finish_reason is not None:
            found.ended += 1
            found.whole.append(now - asked.seconds)
            self._latest.pop(asked.number, None)
            if self._window.measured:
                self._tell(found.ended / self._window.measured)
