"""Questions that simulations answer: what a load does, where speculation stops paying, how many replicas are needed."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass

import numpy as np

from tokentree.planning.figures import Figures, Target
from tokentree.planning.load import Clients, Lengths, Line, Load, Random, Trace
from tokentree.planning.replica import ROUTERS, Router, Setup
from tokentree.planning.simulation import MOST_REPLICAS, Simulation, Window
from tokentree.planning.timing import Beside

METHODS = ("plain", "speculation")
MEASURED = 400  # requests of a load
WARM = 0.2  # of these, that come before and are not measured
BETTER = 0.99  # of the time that requests took with fewer replicas: more help as long as they take less
EACH = 4  # requests of each client that are measured, at least
AT_ONCE = Beside()  # a turnaround of no time
PAYS = 1.02  # times plain's tokens a second, from which on speculation pays


@dataclass(frozen=True)
class Plan:
    """What all simulations of a plan have in common.

    Args:
        setup: what each replica is, with speculation if it has any acceptance.
        lengths: what requests are drawn from.
        router: chooses the replica of each request.
        measured: requests of each load.
        seed: of all draws. Each simulation has the same requests.
        turnaround: of clients, in seconds, by how many there are.
        in_round: requests that clients share before they begin anew. None: each asks on and on.
    """

    setup: Setup
    lengths: Lengths
    router: Router = ROUTERS["least-busy"]
    measured: int = MEASURED
    seed: int = 0
    turnaround: Beside = AT_ONCE
    in_round: int | None = None

    @property
    def methods(self) -> tuple[str, ...]:
        """Plain decoding; and speculation, if anything is known of it."""
        return METHODS if self.setup.acceptance is not None else METHODS[:1]

    # -- one load --------------------------------------------------------------------------------------------------

    def rate(
        self, rate: float, replicas: int, method: str, tell: Callable[[float], None] = lambda _: None,
        name: str | None = None,
    ) -> Figures:  # fmt: skip
        """Of requests that come at random, ``rate`` of them a second.

        A request that is alone takes some time, and so it takes some time until as many are under way as there will be.
        What comes before is not measured.
        """
        load = Random(rate, self.lengths, self._generator(0), name)
        warm = max(math.ceil(WARM * self.measured), math.ceil(2 * rate * self._alone()))
        return self._run(load, replicas, method, Window(warm, self.measured), tell)

    def clients(
        self, clients: int, replicas: int, method: str, tell: Callable[[float], None] = lambda _: None
    ) -> Figures:
        """Of so many clients, each of which asks again once it has its answer. The first request of each is not
        measured; of rounds, all are."""
        load = Clients(clients, self.lengths, self._generator(0), self.turnaround.seconds(clients), self.in_round)
        warm, measured = clients, max(self.measured, EACH * clients)
        if self.in_round is not None:  # whole rounds
            warm, measured = 0, self.in_round * math.ceil(self.measured / self.in_round)
        return self._run(load, replicas, method, Window(warm, measured), tell)

    def trace(
        self, name: str, lines: SequenceOf[Line], replicas: int, method: str,
        tell: Callable[[float], None] = lambda _: None,
    ) -> Figures:  # fmt: skip
        """Of requests that were recorded, all of them."""
        return self._run(Trace(lines, name), replicas, method, Window(0, len(lines)), tell)

    def _run(
        self, load: Load, replicas: int, method: str, window: Window, tell: Callable[[float], None]
    ) -> Figures:  # fmt: skip
        setup = self.setup if method == METHODS[1] else self.setup.plain()
        simulation = Simulation(setup, replicas, load, window, self._generator(1), self.router, tell)
        return Figures.of(simulation.run(), load.name, replicas, method)

    def _generator(self, purpose: int) -> np.random.Generator:
        """The same at each call, for each purpose another one."""
        return np.random.default_rng([self.seed, purpose])

    def _alone(self) -> float:
        """Seconds that a request takes about which is alone and decoded plainly."""
        timing, (prompt, output) = self.setup.timing, self.lengths.tokens
        rows = self.setup.prefill_rows
        reading = timing.forward(rows, 1) * prompt / rows
        return reading + output * (timing.forward(1, 1) + timing.step.seconds(1))

    # -- several of them -------------------------------------------------------------------------------------------

    def table(
        self, run: Callable[[int, str], Figures], counts: SequenceOf[int], enough: bool = False
    ) -> Iterator[list[Figures]]:
        """All methods side by side, for each number of replicas.

        Args:
            run: simulates a load, told the number of replicas and a method.
            counts: the numbers, ascending.
            enough: whether to stop behind the first number that helps nobody.
        """
        before = [math.inf] * len(self.methods)
        for count in counts:
            found = [run(count, method) for method in self.methods]
            yield found
            means = [math.inf if one.request_mean is None else one.request_mean for one in found]
            helped = any(now == math.inf or now < BETTER * then for now, then in zip(means, before, strict=True))
            if enough and not helped:
                return
            before = means

    def needed(
        self, run: Callable[[int, str], Figures], method: str, targets: SequenceOf[Target]
    ) -> Figures | None:  # fmt: skip
        """The fewest replicas with which all ``targets`` are met. None if requests that are alone miss them, or as
        many replicas as there may be.

        Args:
            run: simulates a load, told the number of replicas and a method.
        """

        def tried(count: int) -> Figures | None:
            found = run(count, method)
            return found if all(target.met(found) for target in targets) else None

        alone = self.clients(1, 1, method)
        if not all(target.met(alone) for target in targets):
            return None
        few, many = 0, 1
        while (best := tried(many)) is None:
            if many >= MOST_REPLICAS:
                return None
            few, many = many, min(2 * many, MOST_REPLICAS)
        while many - few > 1:
            middle = (few + many) // 2
            if (found := tried(middle)) is None:
                few = middle
            else:
                best, many = found, middle
        return best

    def by_texts(
        self, most: int, tell: Callable[[float], None] = lambda _: None
    ) -> Iterator[tuple[Figures, Figures]]:  # fmt: skip
        """Plain decoding and speculation on one replica, with 1, 2, 4, … clients at a time, up to ``most``."""
        Clients(most, self.lengths, self._generator(0))  # refused before the others have run
        counts = [1 << power for power in range(most.bit_length()) if 1 << power < most]
        for count in [*counts, most]:
            plain, tree = (self.clients(count, 1, method, tell) for method in METHODS)
            yield plain, tree


def stops_paying(found: SequenceOf[tuple[Figures, Figures]]) -> Figures | None:
    """Of loads that grow: the first one under which speculation gives less than `PAYS` times plain's tokens a second,
    as it is under plain decoding. None if there is none."""
    for plain, tree in found:
        if tree.tokens_a_second < PAYS * plain.tokens_a_second:
            return plain
    return None
