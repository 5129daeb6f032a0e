"""The base class of shapes."""

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
    """Decides how a draft grows, and how it is cut.

    In each step the loop calls `rests` first, then the drafter, then `cut`.

    A drafter that grows level by level (a draft model) works so:

    1. It calls `select` with the root alone. An empty answer means that it shouldn't draft.
    2. It calls `counts` for the number of children of each frontier node, and adds these children.
    3. It calls `select` with them. The selected ones are the next frontier. It goes on with 2, until there are none.

    A drafter that finds whole paths (a lookup) reads only `max_nodes` and `max_depth`.

    Attributes:
        max_depth: the number of candidates on the longest path.
        max_nodes: the number of nodes that a drafter should propose, root included.
        paths: the rank path of each node below the root, parents first, if the tree is the same at every step. Empty
            otherwise.
        branches: whether a node may have more than one child. The rule ``block`` needs a shape without.
    """

    max_depth: int
    max_nodes: int
    paths: tuple[tuple[int, ...], ...] = ()
    branches: bool = True

    @abstractmethod
    def counts(self, seq: Sequence, draft: Draft, frontier: SequenceOf[int]) -> list[int]:
        """The number of children of each node of ``frontier``. It must not depend on what these children are."""

    @abstractmethod
    def select(self, seq: Sequence, draft: Draft, level: SequenceOf[int]) -> list[int]:
        """Those of the new nodes ``level`` that get children next. None of them ends the growth."""

    def beside(self, seq: Sequence, draft: Draft) -> None:
        """Tells the shape what other drafters propose, before a drafter that grows level by level begins."""

    def rests(self, seqs: list[Sequence], reading: int = 0) -> bool:
        """Whether this step should do without drafts, because they would cost more than they gain. The loop calls this
        once a step.

        Args:
            reading: the number of prompt tokens that go through the same forward.
        """
        return False

    @abstractmethod
    def prune(self, seq: Sequence, draft: Draft) -> Draft:
        """``draft``, cut to this shape. Drawn children are never dropped."""

    def cut(self, seqs: list[Sequence], drafts: list[Draft]) -> list[Draft]:
        """The drafts of a batch, each cut to this shape."""
        return [self.prune(seq, draft) for seq, draft in zip(seqs, drafts, strict=True)]

    def observe(
        self, seqs: list[Sequence], drafts: list[Draft], accepted: list[Accepted], draft_seconds: float,
        verify_seconds: float,
    ) -> None:  # fmt: skip
        """Learns from a step of the batch.

        Args:
            drafts: the cut drafts.
            accepted: what was accepted of each.
            draft_seconds, verify_seconds: how long drafting and the target's forward took. The latter is 0 if other
                rows, such as those of prompts, went through the same forward.
        """

    def branch(self, seq: Sequence, of: Sequence) -> None:
        """Copies the state of ``of``, a text in the batch, to ``seq``, which continues it."""

    def release(self, seqs: list[Sequence]) -> None:
        """Drops the state of ``seqs``."""
