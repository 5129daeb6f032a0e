"""Trees of one fixed form: a branching factor per depth, or explicit rank paths."""

from __future__ import annotations

import math
from collections.abc import Iterable
from collections.abc import Sequence as SequenceOf
from itertools import product

import numpy as np

from tokentree.draft import Draft
from tokentree.errors import OptionError
from tokentree.sequence import Sequence
from tokentree.shapes.base import Shape, check_size

LARGEST = 1 << 21  # static tree: the depths of all nodes, added up
DEEPEST = 2000


class Static(Shape):
    """The same tree at every step: SpecInfer's expansion configuration, or Medusa's choices.

    Args:
        branching: children per node at each depth, as in ``(2, 2, 2)``; ``(1, 1, 1, 1)`` is a chain.
        paths: instead of it, rank paths such as ``[(0,), (0, 0), (1,)]``; prefixes are added.

    Raises:
        OptionError: if both or neither are given, or one of the numbers makes no tree.
    """

    def __init__(self, branching: SequenceOf[int] = (), paths: Iterable[SequenceOf[int]] = ()) -> None:
        if not all(isinstance(width, int | np.integer) for width in branching):
            raise OptionError(f"branching factors are whole numbers, and {list(branching)} are not")
        widths = [int(width) for width in branching]
        size = sum(depth * math.prod(widths[:depth]) for depth in range(1, len(widths[:DEEPEST]) + 1))
        if len(widths) > DEEPEST or size > LARGEST:
            raise OptionError(f"a tree of {'x'.join(map(str, widths[:8]))}… is too large to verify")
        choices = {tuple(path[: end + 1]) for path in paths for end in range(len(path))}
        if bool(branching) == bool(choices):
            raise OptionError(
                "a static shape takes a branching factor for at least one depth, or at least one rank path"
            )
        if any(width < 1 for width in branching):
            raise OptionError("a branching factor must be at least 1")
        if any(rank < 0 for path in choices for rank in path):
            raise OptionError("ranks count from 0")
        check_size(len(choices), len(branching), *branching)
        self.branching = tuple(branching)
        self.choices = frozenset(choices)
        self._ranks: dict[tuple[int, ...], list[int]] = {}  # the ranks below a rank path, where paths are explicit
        for path in sorted(choices):
            self._ranks.setdefault(path[:-1], []).append(path[-1])
        if branching:
            self.max_depth = len(branching)
            self.max_nodes = sum(math.prod(branching[:depth]) for depth in range(len(branching) + 1))
            check_size(self.max_nodes)
            ranks = [range(width) for width in branching]
            self.paths = tuple(path for depth in range(1, len(ranks) + 1) for path in product(*ranks[:depth]))
        else:
            self.max_depth = max(map(len, choices))
            self.max_nodes = 1 + len(choices)
            self.paths = tuple(sorted(choices, key=lambda path: (len(path), path)))
        self.branches = any(max(path) > 0 for path in self.paths)

    def counts(self, seq: Sequence, draft: Draft, frontier: SequenceOf[int]) -> list[int]:
        if self.branching:
            return [self.branching[draft.depths[node]] for node in frontier]
        ranks = [self._ranks.get(self._place(draft, node), []) for node in frontier]
        return [len(below) if draft.sampled is not None else max(below, default=-1) + 1 for below in ranks]

    def select(self, seq: Sequence, draft: Draft, level: SequenceOf[int]) -> list[int]:
        if self.branching:
            return [node for node in level if draft.depths[node] < self.max_depth]
        return [node for node in level if self._place(draft, node) in self._ranks]

    def prune(self, seq: Sequence, draft: Draft) -> Draft:
        if draft.sampled is not None:
            return draft
        scores = draft.log_scores
        kept: dict[int, tuple[int, ...]] = {0: ()}  # rank paths, ranks counted anew by score
        for node, children in enumerate(draft.tree.children):
            if node in kept:
                best = sorted(children, key=lambda child: -scores[child])
                ranked = {child: (*kept[node], rank) for rank, child in enumerate(best)}
                kept |= {child: path for child, path in ranked.items() if self._has(path)}
        return draft.take(sorted(kept))

    def _place(self, draft: Draft, node: int) -> tuple[int, ...]:
        """The rank path that ``node`` stands for: the i-th drawn child takes the place of the i-th rank there is."""
        if draft.sampled is None:
            return draft.rank_path(node)
        place: tuple[int, ...] = ()
        for rank in draft.rank_path(node):
            place += (self._ranks[place][rank],)
        return place

    def _has(self, path: tuple[int, ...]) -> bool:
        if self.branching:
            return len(path) <= self.max_depth and path[-1] < self.branching[len(path) - 1]
        return path in self.choices

    def __repr__(self) -> str:
        return "x".join(map(str, self.branching)) if self.branching else f"paths:{sorted(map(list, self.choices))}"
