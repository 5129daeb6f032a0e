# numba gives every scalar a type of its own, which annotations can't follow:
# mypy: disable-error-code="index,assignment,no-any-return"
"""What candidates are worth: the loops of the `cost` shape, compiled by numba.

``times`` are seconds of a step, by rows.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from tokentree.growing import PARENT, TOKEN, child, links, take_marked
from tokentree.jit import njit
from tokentree.kernels.copying import copy_into
from tokentree.shapes import rates
from tokentree.shapes.curve import refine
from tokentree.tree import Floats, Ints


@njit(cache=True)
def best_cut(
    offered: Floats, ends: Ints, most: int, rows: int, tokens: float, trust: float, spent: float, times: Floats
) -> tuple[NDArray[np.bool_], int, float, float]:  # fmt: skip
    """Which candidates to take: whether each is, how many, tokens per second then, and the tokens that they promise.

    Args:
        offered: how probable each of the candidates is, those of a draft behind one another, up to ``ends``.
        most: that one draft may keep.
        rows, tokens: of the forward without any of them.
        trust: what candidates bring, relative to what they promise.
        spent: seconds beside the forward.
        times: of forwards.
    """
    order = np.argsort(-offered, kind="mergesort")  # parents stay before their children
    taken, promised, total, pace = 0, 0.0, 0.0, tokens / (spent + times[rows])
    for count in range(1, len(order) + 1):
        total += offered[order[count - 1]]
        now = (tokens + trust * total) / (spent + times[rows + count])
        if now > pace:
            taken, promised, pace = count, total, now
    keep, kept = np.zeros(len(offered), np.bool_), np.zeros(len(ends), np.int64)
    for candidate in order[:taken]:
        draft = np.searchsorted(ends, candidate, side="right")
        keep[candidate] = kept[draft] < most
        kept[draft] += 1
    return keep, taken, pace, promised


@njit(cache=True)
def cut(
    ints: Ints, floats: Floats, size: int, rows: Ints, claims: Floats, shared: Floats, particular: Floats,
    request: Floats, most: int, trust: float, spent: float, times: Floats,
) -> tuple[tuple[Ints, Floats, int, int, bool], int, float, float]:  # fmt: skip
    """A draft that is alone, cut as `best_cut` says: what is taken, as `take_marked` has it; how many nodes that are,
    tokens per second then, and the tokens that they promise.

    Args:
        rows, claims, shared, particular, request: as `Rates.told` has them.
        most, trust, spent, times: as in `best_cut`.
    """
    joint = rates.estimate(ints, floats, size, rows, claims, shared, particular, request)
    keep, taken, pace, promised = best_cut(joint[1:], np.array([size - 1]), most, 1, 1.0, trust, spent, times)
    return take_marked(ints, floats, size, keep, 0), taken, pace, promised


@njit(cache=True)
def learn(
    knots: Ints, seconds: Floats, table: Floats, count: int, measured: float, others: float, ints: Ints,
    floats: Floats, size: int, accepted: Ints, rows: Ints, claims: Floats, shared: Floats, particular: Floats,
    request: Floats,
) -> float:  # fmt: skip
    """What a step teaches that has one draft to learn from: as `refine`, and as `Rates.learn`.

    Args:
        knots, seconds, table, count, measured, others: as `CostCurve.told` has them.
        ints, floats, size: of the draft, before it was cut.
        accepted: tokens.
        rows, claims, shared, particular, request: as `Rates.told` has them.
    """
    rates.learn(ints, floats, size, accepted, rows, claims, shared, particular, request)
    return refine(knots, seconds, table, count, measured, others)


@njit(cache=True)
def beside(ints: Ints, joint: Floats, their_ints: Ints, their_joint: Floats) -> tuple[Floats, Floats]:
    """What a draft has beside what others propose.

    Args:
        ints, joint: of the draft, and how probable each of its nodes is.
        their_ints, their_joint: the same of theirs.

    Returns:
        How probable all nodes are that the others have, or the draft alone; and float64[n]: where a node is right, how
        probable it is that a child of theirs is too.
    """
    count = len(their_joint)
    latest, before = links(their_ints, count, count)
    below, where = np.zeros(count), np.zeros(len(joint), np.int64)
    covered, together, size = np.zeros(len(joint)), np.empty(count + len(joint)), count
    copy_into(together, their_joint)
    for other in range(1, count):
        below[their_ints[PARENT, other]] += their_joint[other]
    for node in range(len(joint)):
        if node:
            parent = where[ints[PARENT, node]]
            found = child(their_ints, latest, before, parent, ints[TOKEN, node]) if parent >= 0 else 0
            where[node] = found if found else -1
        if where[node] < 0:
            together[size] = joint[node]
            size += 1
        elif their_joint[where[node]] > 0:
            covered[node] = min(1.0, below[where[node]] / their_joint[where[node]])
    return together[:size], covered


@njit(cache=True)
def best_size(joint: Floats, times: Floats, spent: float) -> tuple[int, float]:
    """Rows, and tokens expected, of the best tree from these candidates, the root among them."""
    order, total, most, rows, tokens = np.argsort(-joint, kind="mergesort"), 0.0, -1.0, 0, 0.0
    for count in range(1, len(joint) + 1):
        total += joint[order[count - 1]]
        pace = total / (times[count] + spent)
        if pace > most:
            most, rows, tokens = pace, count, total
    return rows, tokens


@njit(cache=True)
def shares(table: Floats, others: float, overhead: float, batch: int, rows: int) -> Floats:
    """float64[rows + 1]: one text's share of a step with so many rows for each of a ``batch``.

    Args:
        table: seconds of a forward of one text, by rows.
        others: what the texts after the first add.
        overhead: seconds of a step beside the forward.
    """
    times = np.empty(rows + 1)
    for count in range(rows + 1):
        times[count] = (table[count * batch] + others + overhead) / batch
    return times


@njit(cache=True)
def price(times: Floats, rows: int, tokens: float, spent: float) -> float:
    """The tokens that the time of one more row is worth."""
    return (times[rows + 4] - times[rows]) / 4 * tokens / (times[rows] + spent)


@njit(cache=True)
def expanded(
    joint: Floats, covered: Floats, level: Ints, ahead: Floats, top_k: int, rows: int, tokens: float, times: Floats,
    spent: float, level_seconds: float,
) -> tuple[bool, Ints]:  # fmt: skip
    """Whether another level is worth its time, and which nodes of ``level`` are expanded then, in its order.

    Args:
        joint, covered: as `beside` has them.
        level: nodes, ascending.
        ahead: how often the children of a node that is right are, by rank.
        top_k: most nodes.
        rows, tokens: of the best tree without that level.
        spent: seconds of the levels before.
    """
    least, waits = price(times, rows, tokens, spent), np.ones(len(level), np.bool_)
    picked, gains, gained = np.zeros(len(level), np.bool_), 0, 0.0
    for _ in range(min(top_k, len(level))):
        best = -1
        for i in range(len(level)):
            if waits[i] and (best < 0 or joint[level[i]] > joint[level[best]]):
                best = i
        waits[best], worth = False, 0
        for rank in range(len(ahead)):
            gain = joint[level[best]] * (1 - covered[level[best]]) * ahead[rank]
            if gain > least:
                gained += gain
                worth += 1
        gains += worth
        picked[best] = worth > 0
    before, after = times[rows] + spent, times[rows + gains] + spent + level_seconds
    return gains > 0 and (tokens + gained) / after > tokens / before, level[picked]


@njit(cache=True)
def further(
    ints: Ints, floats: Floats, size: int, rows: Ints, claims: Floats, shared: Floats, particular: Floats,
    request: Floats, their_ints: Ints, their_floats: Floats, their_size: int, level: Ints, top_k: int,
    hits: Floats, first: int, prior: Floats, weight: float, table: Floats, others: float, overhead: float, batch: int,
    most: int, spent: float, level_seconds: float,
) -> tuple[int, bool, Ints]:  # fmt: skip
    """Rows of the best tree of what is there, and what `expanded` says of another level.

    Args:
        ints, floats, size: of a draft whose children were not drawn.
        rows, claims, shared, particular, request: as `Rates.told` has them.
        their_ints, their_floats, their_size: of what others propose.
        hits, first, prior, weight: as `Ahead.told` has them.
        table, others, overhead, batch, most: as in `shares`, of rows up to ``most``.
        level, top_k, spent, level_seconds: as in `expanded`.
    """
    ahead = rates.shrunk(hits, first, prior, weight)
    times = shares(table, others, overhead, batch, most)
    joint = rates.estimate(ints, floats, size, rows, claims, shared, particular, request)
    theirs = rates.estimate(their_ints, their_floats, their_size, rows, claims, shared, particular, request)
    together, covered = beside(ints, joint, their_ints, theirs)
    best, tokens = best_size(together, times, spent)
    pays, picked = expanded(joint, covered, level, ahead, top_k, best, tokens, times, spent, level_seconds)
    return best, pays, picked
