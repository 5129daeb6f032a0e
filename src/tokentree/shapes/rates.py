# numba gives every scalar a type of its own, which annotations can't follow:
# mypy: disable-error-code="index,assignment"
"""How often candidates are accepted, learnt while decoding."""

from __future__ import annotations

import math
from collections.abc import Sequence as SequenceOf

import numpy as np
from numpy.typing import NDArray

from tokentree.draft import Draft
from tokentree.growing import DEPTH, LOG_PROB, PARENT, RANK, SOURCES, TOKEN
from tokentree.jit import njit
from tokentree.tree import Floats, Ints

CONFIDENCE = np.log([0.02, 0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.96])  # edges of the buckets
DEPTHS = np.array([0, 0, 1, 2, 2, 3])  # depth -> bucket; deeper than 4 is bucket 3
DEPTH_NAMES = ("1", "2", "3-4", "5-")
RANKS = 4  # rank 0, 1, 2, and all others
RANK_NAMES = ("0", "1", "2", "3-")
ROWS = 64  # combinations of drafters that are told apart
FREE = -1  # a row without such a combination
CLAIMS = len(CONFIDENCE) + 1
EDGES = np.array([0.0, *np.exp(CONFIDENCE), 1.0])
CLAIMED = (EDGES[1:] + EDGES[:-1]) / 2  # what candidates of each bucket claim, about
BROAD = ROWS * CLAIMS
NARROW = BROAD * 4 * RANKS

# (weight of what is less particular, in trials; most trials that are remembered)
SHARED = (4.0, 1000.0)
PARTICULAR = (8.0, 300.0)
LOCAL = (8.0, 40.0)


Told = tuple[Ints, Floats, Floats, Floats, Floats]  # see `Rates.told`
Tried = tuple[Ints, NDArray[np.bool_]]  # see `tried`


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
        self._rows = np.full(ROWS, FREE, np.int64)  # the combination of drafters of each row, in the order they came

    def new_request(self) -> Cells:
        """What is learnt within one request alone."""
        return Cells(BROAD, *LOCAL)

    def estimate(self, draft: Draft, request: Cells) -> Floats:
        """float64[n], the joint probability of the path to each node, 1 at the root."""
        joint: Floats = estimate(draft.ints, draft.floats, len(draft), *self.told(request))
        return joint

    def told(self, request: Cells) -> Told:
        """What compiled loops are told of them. Arrays are told one by one: a tuple takes numba longer."""
        return self._rows, self._claims.table, self._shared.table, self._particular.table, request.table

    def table(self, names: SequenceOf[str]) -> list[tuple[list[str], str, str, float, float]]:
        """(drafters, depth, rank, hits, trials) of everything that was tried, the most tried first."""
        shape = (ROWS, CLAIMS, len(DEPTH_NAMES), RANKS)
        hits, trials = (part.reshape(shape).sum(1) for part in (self._particular.hits, self._particular.trials))
        found = []
        for row, bits in enumerate(self._rows[self._rows != FREE].tolist()):
            who = [name for bit, name in enumerate(names) if bits >> bit & 1]
            for d, depth in enumerate(DEPTH_NAMES):
                for r, rank in enumerate(RANK_NAMES):
                    if who and trials[row, d, r] >= 1:
                        found.append((who, depth, rank, float(hits[row, d, r]), float(trials[row, d, r])))
        return sorted(found, key=lambda entry: -entry[4])

    def cells(self, names: SequenceOf[str]) -> list[tuple[list[str], int, str, str, float, float]]:
        """(drafters, claim, depth, rank, hits, trials) of everything that was tried. A claim is the number of a bucket,
        of `CLAIMS`."""
        rows = self._rows[self._rows != FREE].tolist()
        who = [[name for bit, name in enumerate(names) if bits >> bit & 1] for bits in rows]
        hits, trials = (
            part.reshape(ROWS, CLAIMS, len(DEPTH_NAMES), RANKS)
            for part in (self._particular.hits, self._particular.trials)
        )
        return [
            (who[row], claim, DEPTH_NAMES[depth], RANK_NAMES[rank], float(hits[place]), float(trials[place]))
            for place in zip(*(part.tolist() for part in np.nonzero(trials)), strict=True)
            for row, claim, depth, rank in [place]
            if row < len(who) and who[row]
        ]

    def by_rank(self) -> list[float]:
        """Acceptance by rank, over all drafters and depths; the last entry is for each rank from there on."""
        shape = (-1, RANKS)
        hits, trials = (part.reshape(shape).sum(0) for part in (self._particular.hits, self._particular.trials))
        rates: Floats = hits / np.maximum(1.0, trials)
        return [float(rate) for rate in rates]

    def learn(self, draft: Draft, accepted: Ints, request: Cells) -> None:
        """Learns what became of the nodes of ``draft`` that `tried` finds."""
        learn(draft.ints, draft.floats, len(draft), accepted, *self.told(request))


class Tally(Rates):
    """The same counts, of which none fades; they are of no use for estimates.

    Attributes:
        drafts: how many they are of.
    """

    def __init__(self) -> None:
        super().__init__()
        self._particular = Cells(NARROW, PARTICULAR[0], math.inf)
        self.drafts = 0

    def count(self, draft: Draft, accepted: Ints) -> None:
        """Counts the nodes of ``draft`` that `tried` finds."""
        nodes, hits = tried(draft, accepted)
        _, narrow = _cells(draft.ints, draft.floats, len(draft), self._rows)
        self._particular.learn(narrow[nodes], hits)
        self.drafts += 1


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
        rates: Floats = shrunk(*self.told(depth))
        return rates

    def told(self, depth: int) -> tuple[Floats, int, Floats, float]:
        """What `shrunk` is told of children at that depth."""
        return self._cells.table, min(depth, self.DEPTHS - 1) * len(self._prior), self._prior, self._cells.weight

    def learn(self, depths: Ints, ranks: Ints, hits: NDArray[np.bool_]) -> None:
        known = ranks < len(self._prior)
        cells = np.minimum(depths, self.DEPTHS - 1) * len(self._prior) + ranks
        self._cells.learn(cells[known], hits[known])

    def learn_proposed(self, draft: Draft, accepted: Ints, drafters: int) -> None:
        """Learns what became of the nodes that `tried` finds and one of ``drafters``, a set of bits, proposed."""
        table, memory = self._cells.table, self._cells.memory
        _learn_proposed(draft.ints, len(draft), accepted, drafters, self.DEPTHS, len(self._prior), table, memory)


def tried(draft: Draft, accepted: Ints) -> Tried:
    """The nodes of ``draft`` whose parent was right, as the tokens tell that were accepted, and whether they were."""
    return _tried(draft.ints, len(draft), accepted)


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
def _learn_proposed(
    ints: Ints, size: int, accepted: Ints, drafters: int, depths: int, ranks: int, table: Floats, memory: float
) -> None:
    """As `Ahead.learn_proposed`."""
    nodes, hits = _tried(ints, size, accepted)
    cells, right, count = np.empty(len(nodes), np.int64), np.empty(len(nodes), np.bool_), 0
    for i in range(len(nodes)):
        node = nodes[i]
        if ints[SOURCES, node] & drafters and ints[RANK, node] < ranks:
            cells[count] = min(ints[DEPTH, node], depths - 1) * ranks + ints[RANK, node]
            right[count] = hits[i]
            count += 1
    _learn(table, memory, cells[:count], right[:count])


@njit(cache=True)
def learn(
    ints: Ints, floats: Floats, size: int, accepted: Ints, rows: Ints, claims: Floats, shared: Floats,
    particular: Floats, request: Floats,
) -> None:  # fmt: skip
    """As `Rates.learn`."""
    nodes, hits = _tried(ints, size, accepted)
    learn_nodes(ints, floats, size, nodes, hits, rows, claims, shared, particular, request)


@njit(cache=True)
def learn_nodes(
    ints: Ints, floats: Floats, size: int, nodes: Ints, hits: NDArray[np.bool_], rows: Ints, claims: Floats,
    shared: Floats, particular: Floats, request: Floats,
) -> None:  # fmt: skip
    """Learns what became of ``nodes``, whose parents were all right."""
    broad, narrow = _cells(ints, floats, size, rows)
    broad, narrow = broad[nodes], narrow[nodes]
    _learn(claims, SHARED[1], broad % CLAIMS, hits)
    _learn(shared, SHARED[1], broad, hits)
    _learn(particular, PARTICULAR[1], narrow, hits)
    _learn(request, LOCAL[1], broad, hits)


@njit(cache=True)
def _cells(ints: Ints, floats: Floats, size: int, rows: Ints) -> tuple[Ints, Ints]:
    """The broad and the narrow cell of each node; they mean nothing for the root. Writes combinations of drafters that
    are new into ``rows``."""
    broad, narrow = np.empty(size, np.int64), np.empty(size, np.int64)
    for node in range(size):
        row = 0
        while row < ROWS - 1 and rows[row] != FREE and rows[row] != ints[SOURCES, node]:
            row += 1
        if rows[row] == FREE:
            rows[row] = ints[SOURCES, node]  # more than there is room for share the last
        bucket = 0
        while bucket < CLAIMS - 1 and CONFIDENCE[bucket] < floats[LOG_PROB, node]:
            bucket += 1
        broad[node] = row * CLAIMS + bucket
        depth = DEPTHS[min(ints[DEPTH, node], len(DEPTHS) - 1)]
        narrow[node] = (broad[node] * 4 + depth) * RANKS + min(ints[RANK, node], RANKS - 1)
    return broad, narrow


@njit(cache=True)
def _shrunk(table: Floats, cell: int, weight: float, prior: float) -> float:
    return float((table[0, cell] + weight * prior) / (table[1, cell] + weight))


@njit(cache=True)
def shrunk(table: Floats, first: int, prior: Floats, weight: float) -> Floats:
    """The rates in cells ``first`` and on, as many as there are of ``prior``, towards which few trials shrink them."""
    return (table[0, first : first + len(prior)] + weight * prior) / (table[1, first : first + len(prior)] + weight)


@njit(cache=True)
def estimate(
    ints: Ints, floats: Floats, size: int, rows: Ints, claims: Floats, shared: Floats, particular: Floats,
    request: Floats,
) -> Floats:  # fmt: skip
    """As `Rates.estimate`."""
    broad, narrow = _cells(ints, floats, size, rows)
    joint, total = np.empty(len(broad)), np.zeros(len(broad))
    joint[0] = 1.0
    for node in range(1, len(broad)):
        rate = _shrunk(claims, broad[node] % CLAIMS, SHARED[0], math.exp(floats[LOG_PROB, node]))
        rate = _shrunk(shared, broad[node], SHARED[0], rate)
        rate = _shrunk(particular, narrow[node], PARTICULAR[0], rate)
        joint[node] = _shrunk(request, broad[node], LOCAL[0], rate)
        total[ints[PARENT, node]] += joint[node]
    for node in range(1, len(broad)):  # siblings exclude each other
        parent = ints[PARENT, node]
        joint[node] *= joint[parent] / max(1.0, total[parent])
    return joint


@njit(cache=True)
def _tried(ints: Ints, size: int, accepted: Ints) -> Tried:
    """As `tried`."""
    nodes, hits = np.empty(size, np.int64), np.zeros(size, np.bool_)
    count, node = 0, 0
    for token in accepted:
        following = -1
        for child in range(node + 1, size):
            if ints[PARENT, child] == node:
                nodes[count], hits[count] = child, ints[TOKEN, child] == token
                if hits[count]:
                    following = child
                count += 1
        if following < 0:
            break
        node = following
    return nodes[:count], hits[:count]
