"""What a forward gave: the logits after each node of its trees."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from numpy.typing import NDArray

from tokentree.errors import RequestError
from tokentree.growing import Best
from tokentree.kernels.topk import top_logits
from tokentree.sampling import NOT_NUMBERS
from tokentree.sequence import Accepted
from tokentree.tree import Ints, TokenTree

Logits = torch.Tensor | Callable[[], torch.Tensor]
KEPT = 8  # of the most probable tokens after each node, which the rules and Token Recycling read


def tensor_of(logits: Logits) -> torch.Tensor:
    """Logits that a forward returned."""
    return logits() if callable(logits) else logits


@dataclass(eq=False)
class TargetOutput:
    """The logits of one forward over the nodes of several trees.

    Args:
        given: its logits [rows, vocab], or a function that returns them: most steps read `top` alone. The rows of a
            tree are consecutive, and trees come in the order of the batch.
        starts: the first row of each tree.
        firsts: the node of each tree that its first row belongs to. Earlier nodes were computed by an earlier forward.
        seconds: how long the forward took.
        best_known: the result of `top`, if the engine has computed it already.
        log_sums: float32[rows], the log-sum-exp of each row of logits, if the engine has computed it.
        read: by `Sequence.id`, of each text whose `Sequence.scores_prompt` was set: the rows that follow its tokens
            that were read last.
    """

    given: Logits
    starts: list[int]
    firsts: list[int]
    seconds: float
    best_known: tuple[NDArray[np.float32], Ints] | None = field(default=None, repr=False)
    log_sums: NDArray[np.float32] | None = field(default=None, repr=False)
    read: Mapping[int, range] = field(default_factory=dict)

    @property
    def all_logits(self) -> torch.Tensor:
        """[rows, vocab]."""
        self.given = tensor_of(self.given)
        return self.given

    def logits(self, tree: int, node: int) -> torch.Tensor:
        """[vocab], the raw logits after ``node`` of tree number ``tree``."""
        return self.all_logits[self.row(tree, node)]

    def rows(self, tree: int, nodes: SequenceOf[int]) -> torch.Tensor:
        """[len(nodes), vocab], the raw logits after each of ``nodes``."""
        rows = [self.row(tree, node) for node in nodes]
        if rows == list(range(rows[0], rows[0] + len(rows))):
            return self.all_logits[rows[0] : rows[0] + len(rows)]
        return self.all_logits[rows]

    def top(self, k: int) -> tuple[NDArray[np.float32], Ints]:
        """The k most probable tokens after each row, best first: logits float32[rows, k] and ids int64[rows, k].

        The first call computes them. Later calls with the same or a smaller k reuse them.
        """
        if self.best_known is None or self.best_known[1].shape[1] < k:
            vocab = self.all_logits.shape[1]
            if self.best_known is None or self.best_known[1].shape[1] < min(k, vocab):
                self.best_known = top_logits(self.all_logits, min(max(k, KEPT), vocab))
        values, ids = self.best_known
        return (values, ids) if values.shape[1] == k else (values[:, :k], ids[:, :k])

    def best(self, tree: int, nodes: SequenceOf[int], k: int) -> Best | None:
        """The k most probable tokens after each of ``nodes``, or more. None if the engine hasn't computed them."""
        if self.best_known is None or self.log_sums is None or self.best_known[1].shape[1] < k:
            return None
        return np.array([self.row(tree, node) for node in nodes], np.int64), *self.best_known, self.log_sums

    def of(self, trees: SequenceOf[int]) -> TargetOutput:
        """The output of these ``trees`` alone. Tree ``trees[i]`` gets the number i."""
        if len(trees) == len(self.starts):
            return self
        return replace(self, starts=[self.starts[tree] for tree in trees], firsts=[self.firsts[tree] for tree in trees])

    def after(self, tree: int) -> _TreeLogits:
        """The logits of tree number ``tree``, as an acceptance rule reads them."""
        return _TreeLogits(self, tree)

    def row(self, tree: int, node: int) -> int:
        """The row of `all_logits` that follows ``node`` of tree number ``tree``.

        Raises:
            IndexError: if an earlier forward computed that node.
        """
        if node < self.firsts[tree]:
            raise IndexError(f"node {node} was computed by an earlier forward")
        return self.starts[tree] + node - self.firsts[tree]


class _TreeLogits:
    """`acceptance.NodeLogits` of one tree."""

    def __init__(self, out: TargetOutput, tree: int) -> None:
        self.out, self.tree = out, tree

    def __call__(self, node: int) -> torch.Tensor:
        return self.out.logits(self.tree, node)

    def follow(self, tree: TokenTree) -> Accepted:
        values, ids = self.out.top(KEPT)
        first = self.out.row(self.tree, 0)
        rows = slice(first, first + len(tree))
        largest, best = values[rows, 0].tolist(), ids[rows, 0].tolist()
        # a tree is small: in Python this takes less than the way into a compiled loop
        tokens, path, node, refused = tree.tokens.tolist(), [0], 0, False
        for other, parent in enumerate(tree.parents.tolist()):
            if parent == node:
                refused = tokens[other] != best[node]
                if not refused:
                    node = other
                    path.append(node)
        said = [best[node] for node in path]
        for place, node in enumerate(path):
            if math.isnan(largest[node]):
                return Accepted(path[:place], said[:place], error=RequestError(NOT_NUMBERS))
        return Accepted(path, said, refused)
