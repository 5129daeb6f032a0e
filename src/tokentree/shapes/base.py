"""What every shape answers."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence as SequenceOf

from tokentree.draft import Draft
from tokentree.sequence import Accepted, Sequence


class Shape(ABC):
    """How a draft grows, level by level, and how it is cut in the end.

    A drafter that scores its candidates asks `counts` for the number of children of each frontier node, adds them,
    asks `select` which of them become the next frontier, and ends with `prune`. A drafter that comes with whole paths
    (a lookup) only calls `prune`.

    Attributes:
        max_depth: candidates on the longest path.
        max_nodes: nodes of the largest tree that one drafter makes in this shape, root included.
    """

    max_depth: int
    max_nodes: int

    @abstractmethod
    def counts(self, seq: Sequence, draft: Draft, frontier: SequenceOf[int]) -> list[int]:
        """How many children each node of ``frontier`` gets. Fixed before any is drawn or looked at."""

    @abstractmethod
    def select(self, seq: Sequence, draft: Draft, level: SequenceOf[int]) -> list[int]:
        """Which of the new nodes ``level`` are expanded next; none ends the growth."""

    @abstractmethod
    def prune(self, seq: Sequence, draft: Draft) -> Draft:
        """The draft cut to this shape. Drawn children are never dropped."""

    def observe(self, seqs: list[Sequence], drafts: list[Draft], accepted: list[Accepted], seconds: float) -> None:
        """Learns from a step; ``seconds`` is the time of its target forward."""
