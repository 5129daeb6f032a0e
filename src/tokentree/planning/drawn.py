# numba gives every scalar a type of its own, which annotations can't follow:
# mypy: disable-error-code="index,assignment"
"""Drafts that are drawn: as many candidates as were recorded, and as often right."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from tokentree.draft import Draft
from tokentree.drafters.base import Drafter
from tokentree.growing import LOG_SCORE, planted, put
from tokentree.jit import njit
from tokentree.planning.clock import Clock
from tokentree.planning.engine import RIGHT
from tokentree.planning.timing import Beside
from tokentree.sequence import Sequence
from tokentree.shapes.base import Shape
from tokentree.shapes.rates import DEPTHS
from tokentree.tree import Floats, Ints

LEAST_CLAIM, MOST_CLAIM = 0.01, 0.99  # what a candidate may claim of itself


@dataclass(frozen=True, eq=False)
class Acceptance:
    """How many candidates a drafter has below a node that is right, and how often they are right. Depths and ranks are
    those that `Rates` tells apart, and the last rank is each one from there on.

    Args:
        names: of the drafters.
        sources: int64[kinds], the drafters of each kind of candidate, as a set of bits.
        offered: float64[depths, ranks], how many candidates of a rank there are, where there is one of the rank before.
        shares: float64[depths, ranks, kinds], how many of these are of a kind, or of one before it.
        right: float64[depths, ranks, kinds], how many of these are right.
        missed: float64[depths, ranks], how often no candidate of a rank before it is.
        claims: float64[depths, ranks, kinds], the log-probabilities that they claim.
    """

    names: tuple[str, ...]
    sources: Ints
    offered: Floats
    shares: Floats
    right: Floats
    missed: Floats
    claims: Floats

    @classmethod
    def of(
        cls, names: list[str], sources: Ints, offered: Floats, shares: Floats, right: Floats, claimed: Floats
    ) -> Acceptance:  # fmt: skip
        """With `missed` worked out. Candidates of one node exclude each other, so their rates add up.

        Args:
            claimed: float64[kinds], the probability that candidates of each kind claim. NaN where that isn't known:
                they claim the share of them that are right.
        """
        claims = np.where(np.isnan(claimed), right, claimed).clip(LEAST_CLAIM, MOST_CLAIM)
        of_kinds = np.diff(shares, axis=2, prepend=0.0)
        rates = (of_kinds * right).sum(2)
        missed = np.maximum(1.0 - np.cumsum(rates, axis=1) + rates, LEAST_CLAIM)
        return cls(tuple(names), sources, offered, shares, right, missed, np.log(claims))

    def drafter(self, seconds: Beside, clock: Clock, generator: np.random.Generator) -> Drafter:
        """One whose candidates are drawn from it."""
        return Drawn(self, seconds, clock, generator)


class Drawn(Drafter):
    """Proposes candidates that are drawn. A step that asks for some takes the time that drafting takes.

    Nodes grow best first, by what they claim, as the drafters' own do.

    Args:
        acceptance: what is drawn from.
        seconds: what drafting takes.
        clock: is set forward.
        generator: draws.
    """

    name = "drawn"

    def __init__(self, acceptance: Acceptance, seconds: Beside, clock: Clock, generator: np.random.Generator) -> None:
        self._acceptance, self._seconds, self._clock, self._generator = acceptance, seconds, clock, generator

    @property
    def names(self) -> list[str]:
        return list(self._acceptance.names)

    def propose(self, seqs: list[Sequence], shape: Shape, sampled: bool) -> list[Draft]:
        self._clock.advance(self._seconds.seconds(len(seqs)))
        return [self._draw(seq, shape) for seq in seqs]

    def _draw(self, seq: Sequence, shape: Shape) -> Draft:
        known, most, root = self._acceptance, shape.max_nodes, seq.tokens[-1]
        deepest = min(shape.max_depth, seq.room - 1)
        if deepest < 1 or not len(known.sources):
            return Draft(root)
        chances = self._generator.random(6 * most + 8)  # grow says what for
        arrays = known.sources, known.offered, known.shares, known.right, known.missed, known.claims
        grown = grow(root, most, deepest, chances, *arrays)
        return Draft(root, grown=grown)


@njit(cache=True)
def grow(
    root: int, most: int, deepest: int, chances: Floats, sources: Ints, offered: Floats, shares: Floats, right: Floats,
    missed: Floats, claims: Floats,
) -> tuple[Ints, Floats, int]:  # fmt: skip
    """The arrays of a draft of at most ``most`` nodes, and its size.

    Of ``chances`` it takes one for each rank of a node that gets children, and two for each child.
    """
    ints, floats, size = planted(root, most)
    waits, is_right, depths = np.ones(most, np.bool_), np.zeros(most, np.bool_), np.zeros(most, np.int64)
    is_right[0], used = True, 0
    while size < most:
        node = -1
        for other in range(size):
            better = node < 0 or floats[LOG_SCORE, other] > floats[LOG_SCORE, node]
            if waits[other] and depths[other] < deepest and better:
                node = other
        if node < 0:
            break
        waits[node] = False
        depth, rank, goes_on = DEPTHS[min(depths[node] + 1, len(DEPTHS) - 1)], 0, is_right[node]
        for place in range(offered.shape[1]):
            count = int(offered[depth, place])
            count += chances[used] < offered[depth, place] - count
            used += 1
            if not count:
                break
            for _ in range(min(count, most - size)):
                kind = 0
                while kind < len(sources) - 1 and shares[depth, place, kind] <= chances[used]:
                    kind += 1
                rate = right[depth, place, kind]
                hit = goes_on and chances[used + 1] * missed[depth, place] < rate
                used += 2
                goes_on = goes_on and not hit
                token, claim = RIGHT if hit else RIGHT + 1 + rank, claims[depth, place, kind]
                put(ints, floats, size, node, token, claim, rank, sources[kind])
                is_right[size], depths[size] = hit, depths[node] + 1
                size += 1
                rank += 1
    return ints, floats, size
