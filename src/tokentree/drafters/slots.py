"""Trees of tokens that are guessed for places ahead, all at once: what Medusa and block heads have in common."""

from __future__ import annotations

import numpy as np

from tokentree.draft import Draft
from tokentree.drafters.best_first import best_first
from tokentree.engines.drafting import Slots
from tokentree.jit import njit
from tokentree.shapes.base import Shape
from tokentree.tree import Floats, Ints

LEAST_PROB = 0.0005


def grown(slots: Slots, root: int, shape: Shape, depth: int) -> Draft:
    """A draft of at most ``depth`` places: the paths that a static shape names; otherwise the most probable nodes, best
    first."""
    if shape.paths:
        return _along(slots, root, shape, depth)
    return Draft.grown(root, *_grow(*slots, shape.max_nodes - 1, min(depth, len(slots.tokens))))


def compile_growth() -> None:
    """Before any request waits for it."""
    _grow(*Slots.independent(np.zeros((1, 1), np.int64), np.ones((1, 1))), 1, 1)


def _along(slots: Slots, root: int, shape: Shape, depth: int) -> Draft:
    draft = Draft(root)
    places, _, k = slots.tokens.shape
    where: dict[tuple[int, ...], tuple[int, int]] = {(): (0, 0)}  # nodes, and which candidate each is
    scores = np.log(np.maximum(slots.probs, 1e-30))
    for path in shape.paths:
        place, rank = len(path) - 1, path[-1]
        if place < min(places, depth) and rank < k and where.get(path[:-1], (0, -1))[1] >= 0:
            parent, before = where[path[:-1]]
            cell = place, before, rank
            node = draft.add(parent, int(slots.tokens[cell]), float(scores[cell]), rank)
            where[path] = node, int(slots.ranks[cell])
    return draft


@njit(cache=True)
def _grow(
    tokens: Ints, probs: Floats, ranks: Ints, max_nodes: int, max_depth: int
) -> tuple[Ints, Ints, Floats]:  # fmt: skip
    """See `best_first`."""
    return _best_first((tokens, probs, ranks), 0, 0, max_nodes, max_depth, LEAST_PROB, tokens.shape[2])


@njit
def _follow(
    source: tuple[Ints, Floats, Ints], first: int, second: int, depth: int, tokens: Ints, probs: Floats, firsts: Ints,
    seconds: Ints,
) -> int:  # fmt: skip
    if first < 0:
        return 0
    tokens[:], probs[:] = source[0][depth, first], source[1][depth, first]
    firsts[:], seconds[:] = source[2][depth, first], 0
    return len(tokens)


_best_first = best_first(_follow)
