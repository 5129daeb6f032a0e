# numba gives every scalar a type of its own, which annotations can't follow:
# mypy: disable-error-code="index,assignment"
"""How often candidates are accepted, learnt while decoding."""

from __future__ import annotations

import math
from collections.abc import Sequence as SequenceOf

import numpy as np
from numpy.typing import NDArray

from tokentree.draft import Draft
from tokentree.jit import njit
from tokentree.tree import Floats, Ints

CONFIDENCE = np.log([0.02, 0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.96])  # edges of the buckets
DEPTHS = np.array([0, 0, 1, 2, 2, 3])  # depth -> bucket; deeper than 4 is bucket 3
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
        self.table, self.weight, self.memory = np.zeros((2, size)), weight, memory

    @property
    def hits(self) -> Floats:
        hits: Floats = self.table[0]
        return hits

    @property
    def trials(self) -> Floats:
        trials: Floats = self.table[1]
        return trials

    def estimate(self, cells: Ints, prior: Floats) -> Floats:
        """The rate in each cell, shrunk towards ``prior`` where there are few trials."""
        rates: Floats = (self.hits[cells] + self.weight * prior) / (self.trials[cells] + self.weight)
        return rates

    def learn(self, cells: Ints, hits: NDArray[np.bool_]) -> None:
        _learn(self.table, self.memory, cells, hits)


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
        numbers = np.array([[rows[bits] for bits in draft.sources], draft.depths, draft.ranks])
        return _cells(numbers, np.array(draft.log_probs))

    def estimate(self, draft: Draft, cells: tuple[Ints, Ints], request: Cells) -> Floats:
        """float64[n]: the joint probability of the path to each node; 1 at the root."""
        tables = self._claims.table, self._shared.table, self._particular.table, request.table
        return _estimate(*cells, np.array(draft.log_probs), np.array(draft.parents), *tables)

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

    def learn(self, cells: tuple[Ints, Ints], nodes: Ints, hits: NDArray[np.bool_], request: Cells) -> None:
        """Learns what became of ``nodes``, whose parents were all accepted."""
        broad, narrow = cells[0][nodes], cells[1][nodes]
        self._claims.learn(broad % CLAIMS, hits)
        self._shared.learn(broad, hits)
        self._particular.learn(narrow, hits)
        request.learn(broad, hits)


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


def tried(draft: Draft, accepted: SequenceOf[int]) -> tuple[Ints, NDArray[np.bool_]]:
    """The nodes of ``draft`` whose parent was right, as the tokens tell that were accepted, and whether they were."""
    return _tried(np.array([draft.tokens, draft.parents]), np.array(accepted))


# -- the loops, compiled by numba --------------------------------------------------------------------------------------


@njit(cache=True)
def _learn(table: Floats, memory: float, cells: Ints, hits: NDArray[np.bool_]) -> None:
    for i in range(len(cells)):
        table[0, cells[i]] += hits[i]
        table[1, cells[i]] += 1.0
    for cell in cells:
        if table[1, cell] > memory:
            table[0, cell] *= memory / table[1, cell]
            table[1, cell] = memory


@njit(cache=True)
def _cells(numbers: Ints, log_probs: Floats) -> tuple[Ints, Ints]:
    """As `Rates.cells`; ``numbers`` are rows, depths and ranks."""
    broad, narrow = np.empty(len(log_probs), np.int64), np.empty(len(log_probs), np.int64)
    for node in range(len(log_probs)):
        bucket = 0
        while bucket < CLAIMS - 1 and CONFIDENCE[bucket] < log_probs[node]:
            bucket += 1
        broad[node] = numbers[0, node] * CLAIMS + bucket
        depth = DEPTHS[min(numbers[1, node], len(DEPTHS) - 1)]
        narrow[node] = (broad[node] * 4 + depth) * RANKS + min(numbers[2, node], RANKS - 1)
    return broad, narrow


@njit(cache=True)
def _shrunk(table: Floats, cell: int, weight: float, prior: float) -> float:
    return float((table[0, cell] + weight * prior) / (table[1, cell] + weight))


@njit(cache=True)
def _estimate(
    broad: Ints, narrow: Ints, log_probs: Floats, parents: Ints, claims: Floats, shared: Floats, particular: Floats,
    request: Floats,
) -> Floats:  # fmt: skip
    joint, total = np.empty(len(parents)), np.zeros(len(parents))
    joint[0] = 1.0
    for node in range(1, len(parents)):
        rate = _shrunk(claims, broad[node] % CLAIMS, SHARED[0], math.exp(log_probs[node]))
        rate = _shrunk(shared, broad[node], SHARED[0], rate)
        rate = _shrunk(particular, narrow[node], PARTICULAR[0], rate)
        joint[node] = _shrunk(request, broad[node], LOCAL[0], rate)
        total[parents[node]] += joint[node]
    for node in range(1, len(parents)):  # siblings exclude each other
        joint[node] *= joint[parents[node]] / max(1.0, total[parents[node]])
    return joint


@njit(cache=True)
def _tried(draft: Ints, accepted: Ints) -> tuple[Ints, NDArray[np.bool_]]:
    """As `tried`; ``draft`` has tokens and parents."""
    nodes, hits = np.empty(draft.shape[1], np.int64), np.zeros(draft.shape[1], np.bool_)
    count, node = 0, 0
    for token in accepted:
        following = -1
        for child in range(node + 1, draft.shape[1]):
            if draft[1, child] == node:
                nodes[count], hits[count] = child, draft[0, child] == token
                if hits[count]:
                    following = child
                count += 1
        if following < 0:
            break
        node = following
    return nodes[:count], hits[:count]
