"""EAGLE-2's dynamic tree."""

from __future__ import annotations

import math
from collections.abc import Sequence as SequenceOf

import numpy as np

from tokentree.draft import Draft
from tokentree.errors import OptionError
from tokentree.growing import DEPTH, LOG_SCORE
from tokentree.sequence import Sequence
from tokentree.shapes.base import Shape
from tokentree.tree import Ints


class Dynamic(Shape):
    """Expand the most probable nodes of each level, then keep the most probable nodes of all (EAGLE-2, Li et al.
    2024, arXiv:2406.16858, section 4).

    A node that could no longer be among the kept ones is not expanded, as its children couldn't be either. Beyond the
    paper, nodes and levels that aren't worth their time are left out; with both limits at 0 the tree is the paper's.

    Args:
        nodes: nodes of the tree, root included, that is, rows of the verify.
        depth: candidates on the longest path.
        top_k: children per expanded node, and expanded nodes per level.
        min_prob: leave out nodes that the drafter gives less joint probability. A node is worth its row of the verify
            where the probability times the time of a token exceeds the time of the row.
        min_reach: stop growing where the frontier's joint probabilities sum up to less, as the next level, a forward
            of its own, is hardly ever reached.

    Raises:
        OptionError: if a number is too small to make a tree, or a probability isn't one.
    """

    def __init__(
        self, nodes: int = 16, depth: int = 6, top_k: int = 4, min_prob: float = 0.08, min_reach: float = 0.5
    ) -> None:
        if nodes < 2 or depth < 1 or top_k < 1:
            raise OptionError("a dynamic shape needs nodes of at least 2, depth of at least 1 and top_k of at least 1")
        if not 0 <= min_prob < 1 or not 0 <= min_reach < 1:
            raise OptionError("min_prob and min_reach of a dynamic shape are probabilities below 1")
        self.max_nodes, self.max_depth, self.top_k = nodes, depth, top_k
        self.min_prob, self.min_reach = min_prob, min_reach

    def counts(self, seq: Sequence, draft: Draft, frontier: SequenceOf[int]) -> list[int]:
        if draft.sampled is None:
            return [min(self.top_k, self.max_nodes - 1)] * len(frontier)
        # Drawn children are never dropped, so the budget is spent in advance: what is left is spread over the levels
        # to come, and each level's share goes to its nodes one child at a time, the most probable node first.
        left = self.max_nodes - len(draft)
        share = -(-left // (self.max_depth - draft.depths[frontier[0]])) if frontier else 0
        scores = draft.log_scores
        counts = dict.fromkeys(sorted(frontier, key=lambda node: -scores[node]), 0)
        while share > 0 and min(counts.values()) < self.top_k:
            for node in list(counts)[:share]:
                counts[node] += 1
            share -= len(counts)
        return [min(counts[node], self.top_k) for node in frontier]

    def select(self, seq: Sequence, draft: Draft, level: SequenceOf[int]) -> list[int]:
        if not level or draft.depths[level[0]] >= self.max_depth:
            return []
        scores = draft.log_scores
        best = sorted(level, key=lambda node: -scores[node])[: self.top_k]
        if draft.sampled is None:
            kept = set(self._most_probable(draft).tolist())
            best = [node for node in best if node in kept]
        elif len(draft) >= self.max_nodes:
            best = []
        # one level holds at most one node of the true text, so its probabilities add
        reach = sum(math.exp(scores[node]) for node in best)
        return sorted(best) if reach >= self.min_reach else []

    def prune(self, seq: Sequence, draft: Draft) -> Draft:
        return draft if draft.sampled is not None else draft.take(np.sort(self._most_probable(draft)))

    def _most_probable(self, draft: Draft) -> Ints:
        least = math.log(self.min_prob) if self.min_prob else -math.inf
        scores, depths = draft.floats[LOG_SCORE, : len(draft)], draft.ints[DEPTH, : len(draft)]
        fit = np.flatnonzero((scores >= least) & (depths <= self.max_depth))
        return fit[np.argsort(-scores[fit], kind="stable")[: self.max_nodes]]  # stable: parents first

    def __repr__(self) -> str:
        text = f"dynamic:nodes={self.max_nodes},depth={self.max_depth},top_k={self.top_k}"
        return f"{text},min_prob={self.min_prob:g},min_reach={self.min_reach:g}"
