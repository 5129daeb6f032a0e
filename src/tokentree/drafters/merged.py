"""Several drafters, one tree (SpecInfer's collective drafting)."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from collections.abc import Sequence as SequenceOf
from pathlib import Path

from tokentree.draft import Draft
from tokentree.drafters.base import Drafter
from tokentree.engines.output import TargetOutput
from tokentree.errors import OptionError
from tokentree.sequence import Accepted, Sequence
from tokentree.shapes.base import Shape

MOST = 62  # drafters: who proposed a node is a bit of an int64


class Merged(Drafter):
    """Joins equal paths of all drafts. A node remembers who proposed it, and keeps the highest conditional probability
    and the first rank that any of them gave it. The loop then cuts the tree to one node budget.

    Args:
        drafters: at least one. Those of a merged one among them are taken singly.

    Raises:
        OptionError: if there is none.
    """

    name = "merged"

    def __init__(self, drafters: SequenceOf[Drafter]) -> None:
        if not drafters:
            raise OptionError("merged needs at least one drafter")
        self._drafters: list[Drafter] = [
            inner for drafter in drafters for inner in (drafter._drafters if isinstance(drafter, Merged) else [drafter])
        ]
        if len(self._drafters) > MOST:
            raise OptionError(f"merged takes at most {MOST} drafters, and these are {len(self._drafters)}")
        self._in_turn = sorted(enumerate(self._drafters), key=lambda one: one[1].by_levels)

    @property
    def drafters(self) -> list[Drafter]:
        """In the order of a node's source bits."""
        return list(self._drafters)

    @property
    def names(self) -> list[str]:
        return [drafter.name for drafter in self._drafters]

    @property
    def nbytes(self) -> int:
        return sum(drafter.nbytes for drafter in self._drafters)

    def prefill(self, seqs: list[Sequence], upto: int | None = None) -> None:
        for drafter in self._drafters:
            drafter.prefill(seqs, upto)

    def observe_prompt(self, seqs: list[Sequence], upto: int) -> None:
        for drafter in self._drafters:
            drafter.observe_prompt(seqs, upto)

    def propose(self, seqs: list[Sequence], shape: Shape, sampled: bool) -> list[Draft]:
        drafts = [Draft(seq.tokens[-1], paid=0) for seq in seqs]
        for turn, (number, drafter) in enumerate(self._in_turn):
            if drafter.by_levels and turn:  # a level is worth what it adds to what is there
                for seq, draft in zip(seqs, drafts, strict=True):
                    shape.beside(seq, draft)
            drafter.add_to(drafts, seqs, shape, 1 << number)
        return drafts

    def observe(self, seqs: list[Sequence], drafts: list[Draft], out: TargetOutput, accepted: list[Accepted]) -> None:
        for drafter in self._drafters:
            drafter.observe(seqs, drafts, out, accepted)

    def release(self, seqs: list[Sequence]) -> None:
        for drafter in self._drafters:
            drafter.release(seqs)

    def save(self, folder: Path) -> None:
        for drafter in self._drafters:
            drafter.save(folder)

    def merging(self, folder: Path) -> Iterator[Callable[[], None]]:
        for drafter in self._drafters:
            yield from drafter.merging(folder)

    def load(self, folder: Path) -> None:
        for drafter in self._drafters:
            drafter.load(folder)
