"""Traversal verification: a tree is judged from its leaves to its root."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import ClassVar

import torch

from tokentree.acceptance.base import Acceptance, NodeLogits, drawn_from, left_over
from tokentree.acceptance.match import Match
from tokentree.draft import Draft
from tokentree.errors import RequestError
from tokentree.sampling import to_probs
from tokentree.sequence import ACCEPT, Accepted, Sequence


class Traversal(Acceptance):
    """Traversal verification (Weng et al. 2025, arXiv:2505.12398): what `Block` does to a chain, for trees.

    The first leaf in the order of drawing is accepted with probability of its mass, see `Block`. If it is refused, it
    is taken off its parent, which gets another mass and other target_probs: those of `left_over`. Then it goes on with
    the leaf that now is the first: one below the parent's next child, or the parent itself. The root's mass is 1, so
    the walk ends. On a chain this is `Block`.

    Why it is lossless: a node and what is below it emit the text up to the node with probability of its mass, and
    behind it a token of its target_probs. If that holds for the children, a child emits min(draft_probs, mass *
    target_probs) in the mean over its draws, and `left_over` is what the rest has to emit where it doesn't.

    Children that were picked count as drawn from a distribution that has nothing else. Greedy requests are decided as
    by `Match`. All random numbers are those of the first new position, as in `Block`.
    """

    lossy: ClassVar[bool] = False
    draws_children: ClassVar[bool] = True

    def __init__(self) -> None:
        self._match = Match()

    def __call__(self, seq: Sequence, draft: Draft, logits: NodeLogits) -> Accepted:
        if seq.params.is_greedy:
            return self._match(seq, draft, logits)

        def target_probs(node: int) -> torch.Tensor:
            return to_probs(seq.processed(logits(node), tokens), seq.params)

        def reached(node: int, mass: float) -> _Node:
            if mass > 0 and not draft.tree.is_leaf(node):  # nothing is asked behind what can't be emitted
                try:
                    probs = target_probs(node)
                except RequestError:  # the request ends here, if the walk does
                    return _Node(node, mass)
                return _Node(node, mass, probs, drawn_from(draft, node, probs))
            return _Node(node, mass)

        tokens, noise = list[int](), seq.noise_after([], ACCEPT)
        line = [reached(0, 1.0)]  # from the root to where the walk is
        while True:
            last = line[-1]
            if (child := next(last.turns, None)) is not None:
                tokens.append(int(draft.tree.tokens[child[0]]))
                line.append(reached(child[0], last.drawn(tokens[-1], child[1])))
            elif noise.accepts(last.mass):
                break
            else:
                line.pop()
                tokens.pop()
                line[-1].refuse()
        path = [one.node for one in line]
        try:
            probs = target_probs(last.node) if last.target_probs is None else last.target_probs
        except RequestError as error:
            return Accepted(path[:-1], tokens, error=error)
        return Accepted(path, [*tokens, noise.choose(probs)], refused=not draft.tree.is_leaf(last.node))


@dataclass
class _Node:
    """A node that the walk has reached.

    Args:
        mass: the probability with which it is emitted, given what was refused before.
        target_probs: float64[vocab], what the next token has to follow then; None of a leaf.
        turns: its children that are left, each with its ``draft_probs``.
    """

    node: int
    mass: float
    target_probs: torch.Tensor | None = None
    turns: Iterator[tuple[int, torch.Tensor]] = field(default_factory=lambda: iter(()))
    draft_probs: torch.Tensor | None = None

    def drawn(self, token: int, draft_probs: torch.Tensor) -> float:
        """The mass of the child with ``token``, which is next."""
        assert self.target_probs is not None
        self.draft_probs = draft_probs
        return min(1.0, self.mass * float(self.target_probs[token] / draft_probs[token]))

    def refuse(self) -> None:
        """Takes off the child that was next."""
        assert self.target_probs is not None
        assert self.draft_probs is not None
        self.mass, self.target_probs = left_over(self.mass, self.target_probs, self.draft_probs)
