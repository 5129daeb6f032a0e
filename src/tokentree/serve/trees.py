"""The trees of a request's steps, as an answer tells them."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from typing import Any

from tokentree.draft import Draft
from tokentree.sequence import Accepted, Sequence
from tokentree.serve.tokens import TokenTexts


@dataclass(frozen=True)
class Step:
    """What one step drafted, and what was accepted of it. Lists have an entry for each node; node 0 is the root."""

    tokens: list[int]
    parents: list[int]
    log_probs: list[float]
    sources: list[int]
    path: list[int]
    bonus: int


class TreeWatcher:
    """Keeps the trees of one request until they are told. It watches as `Sequence.watch` does."""

    def __init__(self) -> None:
        self._steps = deque[Step]()

    def __call__(self, seq: Sequence, draft: Draft, accepted: Accepted) -> None:
        self._steps.append(
            Step(draft.tokens, draft.parents, draft.log_probs, draft.sources, accepted.path, accepted.tokens[-1])
        )

    def take(self) -> list[Step]:
        """The steps since the last call."""
        return [self._steps.popleft() for _ in range(len(self._steps))]


def tree_json(step: Step, names: list[str], texts: TokenTexts) -> dict[str, Any]:
    """The tree of a step: its nodes, the root first and parents before children, and the token that the target added.

    Args:
        names: the proposers, in the order of the bits of ``step.sources``.
    """
    kept = set(step.path)
    nodes = [
        {
            "token": token,
            "text": texts.text(token),
            "parent": parent,
            "log_prob": log_prob,
            "drafters": [name for bit, name in enumerate(names) if sources >> bit & 1] if parent >= 0 else [],
            "accepted": node in kept,
        }
        for node, (token, parent, log_prob, sources) in enumerate(
            zip(step.tokens, step.parents, step.log_probs, step.sources, strict=True)
        )
    ]
    return {"nodes": nodes, "bonus": {"token": step.bonus, "text": texts.text(step.bonus)}}
