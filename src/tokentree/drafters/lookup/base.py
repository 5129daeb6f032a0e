"""The base class of drafters that look up what may follow a text."""

from __future__ import annotations

from abc import abstractmethod

from tokentree.draft import Draft
from tokentree.drafters.base import Drafter
from tokentree.sequence import Sequence
from tokentree.shapes.base import Shape


class Lookup(Drafter):
    """Finds nodes without a forward, and adds them to any draft in one compiled call."""

    @abstractmethod
    def look_up(self, seq: Sequence, draft: Draft, source: int, nodes: int, depth: int) -> None:
        """Joins what it finds to ``draft``, as proposed by ``source``: about ``nodes`` nodes, none deeper than
        ``depth``. Both are at least 1."""

    def propose(self, seqs: list[Sequence], shape: Shape, sampled: bool) -> list[Draft]:
        drafts = [Draft(seq.tokens[-1]) for seq in seqs]
        self.add_to(drafts, seqs, shape, 1)
        return drafts

    def add_to(self, drafts: list[Draft], seqs: list[Sequence], shape: Shape, source: int) -> None:
        nodes = shape.max_nodes - 1
        for seq, draft in zip(seqs, drafts, strict=True):
            depth = min(shape.max_depth, seq.room - 1)
            if nodes > 0 and depth > 0:
                self.look_up(seq, draft, source, nodes, depth)
