"""How often candidates are accepted, learnt while decoding."""

from __future__ import annotations

from collections.abc import Sequence as SequenceOf

import numpy as np
from numpy.typing import NDArray

from tokentree.draft import Draft
from tokentree.tree import Floats, Ints

CONFIDENCE = np.log([0.02, 0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.96])  # edges of the buckets
DEPTHS = np.array([0, 0, 1, 2, 2, 3])  # depth -> bucket; deeper than 5 is bucket 3
DEPTH_NAMES = ("1", "2", "3-4", "5-")
RANKS = 4  # rank 0, 1, 2, and all others
RANK_NAMES = ("0", "1", "2", "3-")
ROWS = 64  # combinations of drafters that are told apart
CLAIMS = len(CONFIDENCE) + 1
BROAD = ROWS * CLAIMS
NARROW = BROAD * 4 * RANKS

# (weight of what is less particular, in trials; most trials that are remembered)
SHARED = (4.0, 1000.0)
PARTICULAR = (8.0, 300.0)
LOCAL = (8.0, 40.0)


class Cells:
    """Hits and trials, the old ones fading."""

    def __init__(self, size: int, weight: float, memory: float) -> None:
        self.hits, self.trials = np.zeros(size), np.zeros(size)
        self._weight, self._memory = weight, memory

    def estimate(self, cells: Ints, prior: Floats) -> Floats:
        """The rate in each cell, shrunk towards ``prior`` where there are few trials."""
        rates: Floats = (self.hits[cells] + self._weight * prior) / (self.trials[cells] + self._weight)
        return rates

    def learn(self, cells: Ints, hits: NDArray[np.bool_]) -> None:
        np.add.at(self.hits, cells, hits)
        np.add.at(self.trials, cells, 1.0)
        full = cells[self.trials[cells] > self._memory]
        if full.size:
            full = np.unique(full)
            self.hits[full] *= self._memory / self.trials[full]
            self.trials[full] = self._memory


class Rates:
    """P(a child is what the target goes on with | its parent is), for the candidates of a draft.

    Starts from the probability that the drafter itself claims, and corrects it by what happened to candidates with
    claims like it, whoever made them; then to those of the same drafters; of the same depth and rank too; within the
    same request. Every level is an average shrunk towards the one before it, and forgets slowly.
    """

    def __init__(self) -> None:
        self._claims = Cells(CLAIMS, *SHARED)
        self._shared = Cells(BROAD, *SHARED)
        self._particular = Cells(NARROW, *PARTICULAR)
        self._rows: dict[int, int] = {}  # combination of drafters -> row

    def new_request(self) -> Cells:
        """What is learnt within one request alone."""
        return Cells(BROAD, *LOCAL)

    def cells(self, draft: Draft) -> tuple[Ints, Ints]:
        """int64[n], int64[n]: the broad and the narrow cell of each node; the root's mean nothing."""
        rows = self._rows
        for bits in set(draft.sources) - rows.keys():
            rows[bits] = min(len(rows), ROWS - 1)
        broad = np.array([rows[bits] for bits in draft.sources]) * CLAIMS
        broad += np.searchsorted(CONFIDENCE, draft.log_probs)
        depths = DEPTHS[np.minimum(draft.depths, len(DEPTHS) - 1)]
        return broad, (broad * 4 + depths) * RANKS + np.minimum(draft.ranks, RANKS - 1)

    def estimate(self, draft: Draft, cells: tuple[Ints, Ints], request: Cells) -> Floats:
        """float64[n]: the joint probability of the path to each node; 1 at the root."""
        broad, narrow = cells
        rates = self._claims.estimate(broad % CLAIMS, np.exp(draft.log_probs))
        rates = self._shared.estimate(broad, rates)
        rates = request.estimate(broad, self._particular.estimate(narrow, rates))
        parents = np.array(draft.parents)
        rates[0] = 1.0
        total = np.bincount(parents[1:], rates[1:], len(draft))  # siblings exclude each other
        rates[1:] /= np.maximum(1.0, total[parents[1:]])
        joint = rates.tolist()
        for node in range(1, len(joint)):
            joint[node] *= joint[draft.parents[node]]
        return np.array(joint)

    def table(self, names: SequenceOf[str]) -> list[tuple[list[str], str, str, float, float]]:
        """(drafters, depth, rank, hits, trials) of everything that was tried, the most tried first."""
        shape = (ROWS, CLAIMS, len(DEPTH_NAMES), RANKS)
        hits, trials = (part.reshape(shape).sum(1) for part in (self._particular.hits, self._particular.trials))
        found = []
        for bits, row in self._rows.items():
            who = [name for bit, name in enumerate(names) if bits >> bit & 1]
            for d, depth in enumerate(DEPTH_NAMES):
                for r, rank in enumerate(RANK_NAMES):
                    if who and trials[row, d, r] >= 1:
                        found.append((who, depth, rank, float(hits[row, d, r]), float(trials[row, d, r])))
        return sorted(found, key=lambda entry: -entry[4])

    def by_rank(self) -> list[float]:
        """Acceptance by rank, over all drafters and depths; the last entry is for each rank from there on."""
        shape = (-1, RANKS)
        hits, trials = (part.reshape(shape).sum(0) for part in (self._particular.hits, self._particular.trials))
        rates: Floats = hits / np.maximum(1.0, trials)
        return [float(rate) for rate in rates]

    def learn(self, cells: tuple[Ints, Ints], nodes: list[int], hits: list[bool], request: Cells) -> None:
        """Learns what became of ``nodes``, whose parents were all accepted."""
        broad, narrow, hit = cells[0][nodes], cells[1][nodes], np.array(hits)
        self._claims.learn(broad % CLAIMS, hit)
        self._shared.learn(broad, hit)
        self._particular.learn(narrow, hit)
        request.learn(broad, hit)


class Ahead:
    """P(the child of a rank is accepted | its parent is), by depth: what children are worth that aren't there yet.

    Args:
        prior: by rank, before anything was seen; it also tells how many ranks are told apart.
    """

    DEPTHS = 64

    def __init__(self, prior: SequenceOf[float], weight: float = 4.0, memory: float = 200.0) -> None:
        self._prior = np.array(prior)
        self._cells = Cells(self.DEPTHS * len(prior), weight, memory)

    def at(self, depth: int) -> Floats:
        """float64[ranks], for children at that depth."""
        first = min(depth, self.DEPTHS - 1) * len(self._prior)
        return self._cells.estimate(np.arange(first, first + len(self._prior)), self._prior)

    def learn(self, depths: Ints, ranks: Ints, hits: NDArray[np.bool_]) -> None:
        known = ranks < len(self._prior)
        cells = np.minimum(depths, self.DEPTHS - 1) * len(self._prior) + ranks
        self._cells.learn(cells[known], hits[known])
