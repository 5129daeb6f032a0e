# numba gives every scalar a type of its own, which annotations can't follow:
# mypy: disable-error-code="no-untyped-def,no-untyped-call"
"""Best-first growth, compiled: one loop for all drafters that know what may follow a node without a forward."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numba
import numpy as np

from tokentree.tree import Floats, Ints


def best_first(follow: Any) -> Callable[..., tuple[Ints, Ints, Floats]]:
    """The compiled function ``grow(source, first, second, max_nodes, max_depth, least_prob, width)``.

    It takes the most probable nodes, best first, of those with a joint probability of at least ``least_prob``. It
    returns their tokens int64[n], their parents int64[n] (0 is the root, node i is ``i + 1``), and their conditional
    probabilities float64[n]. Of equally probable nodes, the one that was found first is taken first.

    Args:
        follow: compiled. ``follow(source, first, second, depth, tokens, probs, firsts, seconds)`` says what may follow
            a node. ``source`` is whatever the drafter knows. ``first`` and ``second`` are two integers that say which
            node it is; ``depth`` is its depth. It writes the tokens and conditional probabilities of at most
            ``width`` children, best first, and the two integers of each. It returns how many there are.
    """

    @numba.njit
    def grow(source, first, second, max_nodes, max_depth, least_prob, width):
        room = (max_nodes + 1) * width  # candidates, in the order in which they are found
        token, parent, depth = np.empty(room, np.int64), np.empty(room, np.int64), np.empty(room, np.int64)
        firsts, seconds = np.empty(room, np.int64), np.empty(room, np.int64)
        prob, joint, waits = np.empty(room), np.empty(room), np.ones(room, np.bool_)
        taken, parents, probs = np.empty(max_nodes, np.int64), np.empty(max_nodes, np.int64), np.empty(max_nodes)
        size, count = 0, 0
        node_joint, node_depth = 1.0, 0
        while count < max_nodes:
            if node_depth < max_depth:
                end = size + width
                found = follow(
                    source, first, second, node_depth, token[size:end], prob[size:end], firsts[size:end],
                    seconds[size:end],
                )  # fmt: skip
                for _ in range(found):
                    if prob[size] <= 0 or node_joint * prob[size] < least_prob:
                        break
                    parent[size], depth[size], joint[size] = count, node_depth + 1, node_joint * prob[size]
                    size += 1
            best = _most_probable(joint, waits, size)
            if best < 0:
                break
            waits[best] = False
            taken[count], parents[count], probs[count] = token[best], parent[best], prob[best]
            count += 1
            first, second, node_joint, node_depth = firsts[best], seconds[best], joint[best], depth[best]
        return taken[:count], parents[:count], probs[:count]

    compiled: Callable[..., tuple[Ints, Ints, Floats]] = grow
    return compiled


@numba.njit
def _most_probable(joint, waits, size):
    """The first most probable of ``size`` candidates that still wait, or -1."""
    best = -1
    for i in range(size):
        if waits[i] and (best < 0 or joint[i] > joint[best]):
            best = i
    return best
