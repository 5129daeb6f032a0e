"""Adaptive width, dynamic depth: narrow where the drafter is sure, deep while a path is worth it."""

from __future__ import annotations

import math
from collections.abc import Sequence as SequenceOf

from tokentree.draft import Draft
from tokentree.errors import OptionError
from tokentree.sequence import Sequence
from tokentree.shapes.base import Shape


class Adaptive(Shape):
    """Each node keeps its most probable children until they hold ``mass`` of its probability: one after "2 + 2 =",
    several after "The meaning of life is". A path deepens while its joint probability is at least ``min_prob``.

    Drawn children are fixed in number before any is drawn: one below a node that was itself a sure choice, ``width``
    below any other.

    Args:
        mass: of a node's next-token probability, that its children should hold.
        width: most children per node.
        depth: most candidates on a path.
        min_prob: joint probability that a node needs to be worth its row.
        nodes: nodes of the tree, root included.

    Raises:
        OptionError: if a number is too small to make a tree, or a probability isn't one.
    """

    def __init__(
        self, mass: float = 0.8, width: int = 4, depth: int = 8, min_prob: float = 0.1, nodes: int = 16
    ) -> None:
        if width < 1 or depth < 1 or nodes < 2:
            raise OptionError("an adaptive shape needs width and depth of at least 1 and nodes of at least 2")
        if not 0 < mass <= 1 or not 0 <= min_prob < 1:
            raise OptionError("mass and min_prob of an adaptive shape are probabilities")
        self.mass, self.width, self.min_prob = mass, width, min_prob
        self.max_depth, self.max_nodes = depth, nodes

    def counts(self, seq: Sequence, draft: Draft, frontier: SequenceOf[int]) -> list[int]:
        if draft.sampled is None:
            return [self.width] * len(frontier)
        counts, left = list[int](), self.max_nodes - len(draft)
        for node in frontier:
            sure = node > 0 and draft.log_probs[node] >= math.log(self.mass)
            counts.append(max(0, min(left, 1 if sure else self.width)))
            left -= counts[-1]
        return counts

    def select(self, seq: Sequence, draft: Draft, level: SequenceOf[int]) -> list[int]:
        if not level or draft.depths[level[0]] >= self.max_depth:
            return []
        if draft.sampled is None:
            return sorted(set(self._kept(draft)) & set(level))
        if len(draft) >= self.max_nodes:
            return []
        scores = draft.log_scores
        return [node for node in level if self._deep_enough(scores[node])]

    def prune(self, seq: Sequence, draft: Draft) -> Draft:
        return draft if draft.sampled is not None else draft.take(sorted(self._kept(draft)))

    def _deep_enough(self, log_score: float) -> bool:
        return math.exp(log_score) >= self.min_prob

    def _kept(self, draft: Draft) -> list[int]:
        """The nodes of the tree: per node by mass, and of all these the most probable ones."""
        kept, children = [0], draft.tree.children
        depths, log_probs, scores = draft.depths, draft.log_probs, draft.log_scores
        for node in kept:  # grows while it is read
            if depths[node] < self.max_depth:
                held = 0.0
                for child in sorted(children[node], key=lambda child: -log_probs[child])[: self.width]:
                    if held >= self.mass:
                        break
                    held += math.exp(log_probs[child])
                    if self._deep_enough(scores[child]):
                        kept.append(child)
        return sorted(kept, key=lambda node: (-scores[node], node))[: self.max_nodes]

    def __repr__(self) -> str:
        text = f"adaptive:mass={self.mass:g},width={self.width},depth={self.max_depth}"
        return f"{text},min_prob={self.min_prob:g},nodes={self.max_nodes}"
