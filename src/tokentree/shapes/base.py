"""What every shape answers."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence as SequenceOf

from tokentree.draft import Draft
from tokentree.errors import OptionError
from tokentree.sequence import Accepted, Sequence

MOST_NODES = 4096


def check_size(*counts: int) -> None:
    """Raises `OptionError` if one of ``counts``, of nodes or levels, is more than any tree has."""
    if max(counts) > MOST_NODES:
        raise OptionError(f"a tree of more than {MOST_NODES} nodes is too large to verify")


class Shape(ABC):
    """How a draft grows, level by level, and how it is cut in the end.

    A drafter that pays for each level (a draft model) asks `select` whether to start, for the root alone; then `counts`
    for the number of children of each frontier node; adds them; and asks `select` which of them become the next
    frontier. A drafter that finds whole paths (a lookup) only heeds `max_nodes` and `max_depth`. The loop calls `rests`
    before, and `cut` after all that.

    Attributes:
        max_depth: candidates on the longest path.
        max_nodes: nodes that are worth proposing, root included.
        paths: where the tree is the same at every step, the rank path of each node below the root, parents first.
    """

    max_depth: int
    max_nodes: int
    paths: tuple[tuple[int, ...], ...] = ()

    @abstractmethod
    def counts(self, seq: Sequence, draft: Draft, frontier: SequenceOf[int]) -> list[int]:
        """How many children each node of ``frontier`` gets. Fixed before any is drawn or looked at."""

    @abstractmethod
    def select(self, seq: Sequence, draft: Draft, level: SequenceOf[int]) -> list[int]:
        """Which of the new nodes ``level`` are expanded next; none ends the growth."""

    def beside(self, seq: Sequence, draft: Draft) -> None:
        """Tells what others propose for this step, before a drafter that pays for each level is asked."""

    def rests(self, seqs: list[Sequence]) -> bool:
        """Whether this step goes without drafts, as drafting wouldn't pay for itself. The loop asks once a step."""
        return False

    @abstractmethod
    def prune(self, seq: Sequence, draft: Draft) -> Draft:
        """The draft cut to this shape. Drawn children are never dropped."""

    def cut(self, seqs: list[Sequence], drafts: list[Draft]) -> list[Draft]:
        """The drafts of a batch, each cut to this shape."""
        return [self.prune(seq, draft) for seq, draft in zip(seqs, drafts, strict=True)]

    def observe(
        self, seqs: list[Sequence], drafts: list[Draft], accepted: list[Accepted], draft_seconds: float,
        verify_seconds: float,
    ) -> None:  # fmt: skip
        """Learns from a step of the batch: what was accepted of the cut drafts, and what it took. The seconds of a
        forward that had other rows too are given as 0."""

    def branch(self, seq: Sequence, of: Sequence) -> None:
        """``seq`` goes on from ``of``, a text in the batch: what holds for that one holds for it."""

    def release(self, seqs: list[Sequence]) -> None:
        """Forgets what it keeps for ``seqs``."""
