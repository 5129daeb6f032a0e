"""What every rule is, and what those share that read the drafter's distributions."""

from __future__ import annotations

from collections.abc import Iterator
from typing import ClassVar, Protocol

import torch
from torch.nn.functional import one_hot, pad

from tokentree.draft import Draft
from tokentree.sequence import Accepted, Sequence
from tokentree.tree import TokenTree


class NodeLogits(Protocol):
    """What the target says after the nodes of a tree."""

    def __call__(self, node: int) -> torch.Tensor:
        """[vocab], the raw logits after ``node``."""
        ...

    def follow(self, tree: TokenTree) -> Accepted:
        """The path of ``tree`` along the tokens with the largest of them, and one more such token; on a CPU, of equal
        ones the lowest. With an error where they are no numbers."""
        ...


class Acceptance(Protocol):
    """A rule: ``rule(seq, draft, logits)`` walks the tree and reads the target's ``logits`` at the nodes it visits.

    Where a request fails at a node, a lossless rule gives the tokens before it, as plain decoding would have, and the
    error; a lossy one may raise it.

    Attributes:
        lossy: whether texts have another distribution than the target's.
        draws_children: whether drafters that can draw children have to.
        takes_picked: whether children that were picked, not drawn, are right too.
        chains_only: whether a node may have one child at most.
    """

    lossy: ClassVar[bool]
    draws_children: ClassVar[bool]
    takes_picked: ClassVar[bool] = True
    chains_only: ClassVar[bool] = False

    def __call__(self, seq: Sequence, draft: Draft, logits: NodeLogits) -> Accepted: ...


def drawn_from(draft: Draft, node: int, target_probs: torch.Tensor) -> Iterator[tuple[int, torch.Tensor]]:
    """The children of ``node`` in the order in which they were drawn, and for each the ``draft_probs`` float64[vocab]
    that it was drawn from, given those before it. A child that was picked had probability 1.

    Args:
        target_probs: float64[vocab], whose vocabulary may be padded further than the drafter's.
    """
    tokens, children, place = draft.tree.tokens, draft.tree.children[node], target_probs.device
    if draft.sampled is None:
        for child in children:
            yield child, one_hot(torch.tensor(int(tokens[child])), len(target_probs)).double().to(place)
    elif children:
        drawn = draft.sampled[node]
        draft_probs = pad(drawn, (0, len(target_probs) - len(drawn))).to(place)
        for child in children:
            yield child, draft_probs
            draft_probs = draft_probs.index_fill(0, torch.tensor([int(tokens[child])], device=place), 0.0)
            total = float(draft_probs.sum())
            draft_probs = draft_probs / total if total > 0 else draft_probs


def left_over(
    mass: float, target_probs: torch.Tensor, draft_probs: torch.Tensor
) -> tuple[float, torch.Tensor]:  # fmt: skip
    """What is left of a node when a child that was drawn from ``draft_probs`` is refused.

    A node with ``mass`` may be emitted with that probability, and then the next token has to follow ``target_probs``.
    Children that are accepted have emitted ``min(mass * target_probs, draft_probs)`` of it. The rest is
    ``max(mass * target_probs - draft_probs, 0)``, of which the child's refusal happens with probability ``1 - mass +``
    its sum.

    Returns:
        The node's mass given that refusal, and its ``target_probs``. A mass of 1 stays 1.
    """
    rest = (mass * target_probs - draft_probs).clamp(min=0)
    total = float(rest.sum())
    if not total > 0:  # a mass of 1: the two are equal, and a child is refused by rounding alone
        return float(mass == 1), target_probs
    return total / (total + 1 - mass), rest / total
