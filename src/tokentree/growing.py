# numba gives every scalar a type of its own, which annotations can't follow:
# mypy: disable-error-code="index,assignment,no-any-return"
"""Loops over the arrays of a draft, compiled by numba.

A draft is ``ints`` int64[5, room] and ``floats`` float64[2, room], of which the first ``size`` columns are its nodes.
"""

from __future__ import annotations

import functools

import numpy as np
from numpy.typing import NDArray

from tokentree.jit import njit
from tokentree.tree import Floats, Ints, check

ROOM = 256  # nodes that there is room for at first
TOKEN, PARENT, DEPTH, RANK, SOURCES = range(5)  # rows of ``ints``
LOG_PROB, LOG_SCORE = range(2)  # rows of ``floats``

# the row of each node; logits and tokens [rows, k], best first, and log-sum-exps [rows], of a forward's rows
Best = tuple[Ints, NDArray[np.float32], Ints, NDArray[np.float32]]


@njit
def put(
    ints: Ints, floats: Floats, node: int, parent: int, token: int, log_prob: float, rank: int, source: int
) -> None:  # fmt: skip
    """Writes ``node``, a child of ``parent``."""
    ints[TOKEN, node], ints[PARENT, node], ints[DEPTH, node] = token, parent, ints[DEPTH, parent] + 1
    ints[RANK, node], ints[SOURCES, node] = rank, source
    floats[LOG_PROB, node], floats[LOG_SCORE, node] = log_prob, floats[LOG_SCORE, parent] + log_prob


@njit
def links(ints: Ints, size: int, room: int) -> tuple[Ints, Ints]:
    """Per node, its latest child, and its sibling before; 0 where there is none. With room for more nodes."""
    latest, before = np.zeros(room, np.int64), np.zeros(room, np.int64)
    for node in range(1, size):
        parent = ints[PARENT, node]
        latest[parent], before[node] = node, latest[parent]
    return latest, before


@njit
def child(ints: Ints, latest: Ints, before: Ints, parent: int, token: int) -> int:
    """The child of ``parent`` that carries ``token``, or 0."""
    node = latest[parent]
    while node and ints[TOKEN, node] != token:
        node = before[node]
    return node


@njit(cache=True)
def planted(root: int, room: int) -> tuple[Ints, Floats, int]:
    """The arrays of a draft that is a root, and its size."""
    ints, floats = np.empty((5, room), np.int64), np.empty((2, room), np.float64)
    ints[:, 0], floats[:, 0] = 0, 0.0
    ints[TOKEN, 0], ints[PARENT, 0] = root, -1
    return ints, floats, 1


@njit(cache=True)
def grown(root: int, tokens: Ints, parents: Ints, probs: Floats) -> tuple[Ints, Floats, int]:
    """The arrays of a draft, and its size: node i + 1 carries ``tokens[i]`` under node ``parents[i]``, with the
    conditional probability ``probs[i]``; siblings come in the order of their ranks."""
    ints, floats, _ = planted(root, len(tokens) + 1)
    ranks = np.zeros(len(tokens) + 1, np.int64)
    for i in range(len(tokens)):
        put(ints, floats, i + 1, parents[i], tokens[i], np.log(probs[i]), ranks[parents[i]], 1)
        ranks[parents[i]] += 1
    return ints, floats, len(tokens) + 1


@njit(cache=True)
def grow_level(
    ints: Ints, floats: Floats, size: int, frontier: Ints, counts: Ints, tokens: Ints, log_probs: NDArray[np.float32]
) -> int:  # fmt: skip
    """Adds below each node of ``frontier`` its first ``counts`` tokens, but none of probability 0; returns the size."""
    for i in range(len(frontier)):
        for rank in range(min(counts[i], tokens.shape[1])):
            if log_probs[i, rank] > -np.inf:
                put(ints, floats, size, frontier[i], tokens[i, rank], np.float64(log_probs[i, rank]), rank, 1)
                size += 1
    return size


@njit(cache=True)
def grow_best(
    ints: Ints, floats: Floats, size: int, frontier: Ints, counts: Ints, rows: Ints, logits: NDArray[np.float32],
    tokens: Ints, log_sums: NDArray[np.float32], token_map: Ints,
) -> int:  # fmt: skip
    """As `grow_level`, with what was found after rows of logits, best first: ``logits`` and ``tokens`` [rows, k], and
    ``log_sums`` [rows]. Node i of ``frontier`` has row ``rows[i]``. ``token_map`` has the draft's tokens for these,
    unless it is empty."""
    for i in range(len(frontier)):
        row = rows[i]
        for rank in range(min(counts[i], tokens.shape[1])):
            token, log_prob = tokens[row, rank], logits[row, rank] - log_sums[row]
            if log_prob > -np.inf:
                known = token_map[token] if len(token_map) else token
                put(ints, floats, size, frontier[i], known, np.float64(log_prob), rank, 1)
                size += 1
    return size


@njit(cache=True)
def grow_paths(
    ints: Ints, floats: Floats, size: int, tokens: Ints, ends: Ints, firsts: Floats, others: float
) -> int:  # fmt: skip
    """Adds paths from the root, which lie behind one another in ``tokens`` up to ``ends``, equal beginnings once;
    returns the size.

    Args:
        firsts, others: the log-probability of each path's first token, and of all others.
    """
    latest, before = links(ints, size, size + len(tokens))
    begin = 0
    for path in range(len(ends)):
        parent, log_prob = 0, firsts[path]
        for i in range(begin, ends[path]):
            node = child(ints, latest, before, parent, tokens[i])
            if not node:
                node = size
                size += 1
                rank = ints[RANK, latest[parent]] + 1 if latest[parent] else 0
                put(ints, floats, node, parent, tokens[i], log_prob, rank, 1)
                latest[parent], before[node] = node, latest[parent]
            parent, log_prob = node, others
        begin = ends[path]
    return size


@njit(cache=True)
def join(
    ints: Ints, floats: Floats, size: int, other_ints: Ints, other_floats: Floats, count: int, source: int
) -> int:  # fmt: skip
    """Adds the ``count`` nodes of another draft with the same root, equal paths joined: a node that is there keeps the
    higher probability and the lower rank. All scores are worked out anew. Returns the size."""
    latest, before = links(ints, size, size + count)
    where = np.zeros(count, np.int64)
    for other in range(1, count):
        parent = where[other_ints[PARENT, other]]
        token, rank = other_ints[TOKEN, other], other_ints[RANK, other]
        log_prob = other_floats[LOG_PROB, other]
        node = child(ints, latest, before, parent, token)
        if node:
            ints[SOURCES, node] |= source
            ints[RANK, node] = min(ints[RANK, node], rank)
            floats[LOG_PROB, node] = max(floats[LOG_PROB, node], log_prob)
        else:
            node = size
            size += 1
            put(ints, floats, node, parent, token, log_prob, rank, source)
            latest[parent], before[node] = node, latest[parent]
        where[other] = node
    for node in range(1, size):
        floats[LOG_SCORE, node] = floats[LOG_SCORE, ints[PARENT, node]] + floats[LOG_PROB, node]
    return size


@njit
def join_grown(
    ints: Ints, floats: Floats, size: int, source: int, tokens: Ints, parents: Ints, probs: Floats
) -> int:  # fmt: skip
    """`join` with the draft that `grown` makes of these."""
    other_ints, other_floats, count = grown(ints[TOKEN, 0], tokens, parents, probs)
    return join(ints, floats, size, other_ints, other_floats, count, source)


@njit(cache=True)
def take(ints: Ints, floats: Floats, size: int, nodes: Ints) -> tuple[Ints, Floats]:
    """The arrays of ``nodes`` alone, every parent among them."""
    where = np.full(size, -1, np.int64)
    new_ints, new_floats = np.empty((5, len(nodes)), np.int64), np.empty((2, len(nodes)), np.float64)
    for new in range(len(nodes)):
        where[nodes[new]] = new
    for new in range(len(nodes)):
        node = nodes[new]
        for row in range(5):
            new_ints[row, new] = ints[row, node]
        for row in range(2):
            new_floats[row, new] = floats[row, node]
        new_ints[PARENT, new] = where[ints[PARENT, node]] if node else -1
    return new_ints, new_floats


@njit(cache=True)
def take_marked(
    ints: Ints, floats: Floats, size: int, marks: NDArray[np.bool_], first: int
) -> tuple[Ints, Floats, int, int, bool]:
    """The arrays of the root, and of those nodes that are marked, and how many that are; then as `tree.check`.
    ``marks[first]`` is node 1's. Parents of marked nodes are marked."""
    nodes, count = np.zeros(size, np.int64), 1
    for node in range(1, size):
        if marks[first + node - 1]:
            nodes[count] = node
            count += 1
    new_ints, new_floats = take(ints, floats, size, nodes[:count])
    fault, is_chain = check(new_ints[TOKEN], new_ints[PARENT], new_ints[DEPTH])
    return new_ints, new_floats, count, fault, is_chain


@functools.cache
def compile_loops() -> None:
    """Compiles them, or loads them from the cache, before any request waits for it."""
    ints, floats = np.zeros((5, 4), np.int64), np.zeros((2, 4), np.float64)
    none, chance = np.zeros(0, np.int64), np.zeros((1, 1), np.float32)
    planted(0, 1)
    grown(0, none, none, floats[0, :0])
    grow_level(ints, floats, 1, none, none, np.zeros((1, 1), np.int64), chance)
    grow_best(ints, floats, 1, none, none, none, chance, np.zeros((1, 1), np.int64), chance[0], none)
    grow_paths(ints, floats, 1, none, none, floats[0, :0], 0.0)
    join(ints, floats, 1, ints, floats, 1, 1)
    take(ints, floats, 1, np.zeros(1, np.int64))
    take_marked(ints, floats, 1, np.zeros(0, np.bool_), 0)
