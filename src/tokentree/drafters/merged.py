"""Several drafters, one tree (SpecInfer's collective drafting)."""

from __future__ import annotations

from collections.abc import Sequence as SequenceOf
from pathlib import Path

from tokentree.draft import Draft
from tokentree.drafters.base import Drafter
from tokentree.engines.base import TargetOutput
from tokentree.errors import OptionError
from tokentree.sequence import Accepted, Sequence
from tokentree.shapes.base import Shape


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
        self.reads_hidden = any(drafter.reads_hidden for drafter in self._drafters)

    @property
    def names(self) -> list[str]:
        return [drafter.name for drafter in self._drafters]

    def prefill(self, seqs: list[Sequence]) -> None:
        for drafter in self._drafters:
            drafter.prefill(seqs)

    def propose(self, seqs: list[Sequence], shape: Shape, sampled: bool) -> list[Draft]:
        proposals: dict[int, list[Draft]] = {}
        for number in sorted(range(len(self._drafters)), key=lambda number: self._drafters[number].by_levels):
            if self._drafters[number].by_levels and proposals:  # a level is worth what it adds to what is there
                for place, seq in enumerate(seqs):
                    shape.beside(seq, self._merged(proposals, place))
            proposals[number] = self._drafters[number].propose(seqs, shape, sampled=False)
        return [self._merged(proposals, place) for place in range(len(seqs))]

    def observe(self, seqs: list[Sequence], drafts: list[Draft], out: TargetOutput, accepted: list[Accepted]) -> None:
        for drafter in self._drafters:
            drafter.observe(seqs, drafts, out, accepted)

    def release(self, seqs: list[Sequence]) -> None:
        for drafter in self._drafters:
            drafter.release(seqs)

    def save(self, folder: Path) -> None:
        for drafter in self._drafters:
            drafter.save(folder)

    def load(self, folder: Path) -> None:
        for drafter in self._drafters:
            drafter.load(folder)

    @staticmethod
    def _merged(proposals: dict[int, list[Draft]], place: int) -> Draft:
        """What was proposed for the sequence at ``place``, by the drafters' numbers."""
        drafts = [(number, proposals[number][place]) for number in sorted(proposals)]
        merged = Draft(drafts[0][1].root)
        merged.levels = max(draft.levels for _, draft in drafts)
        merged.paid = sum(1 << number for number, draft in drafts if draft.levels)
        if merged.levels:  # several draft models take turns: what they spent, per level
            merged.level_seconds = sum(draft.level_seconds * draft.levels for _, draft in drafts) / merged.levels
        children: dict[tuple[int, int], int] = {}
        for number, draft in drafts:
            bit, where = 1 << number, [0] * len(draft)
            for node in range(1, len(draft)):
                parent, token, log_prob = where[draft.parents[node]], draft.tokens[node], draft.log_probs[node]
                known = children.get((parent, token))
                if known is None:
                    known = merged.add(parent, token, log_prob, draft.ranks[node], bit)
                    children[parent, token] = known
                else:
                    merged.sources[known] |= bit
                    merged.ranks[known] = min(merged.ranks[known], draft.ranks[node])
                    merged.log_probs[known] = max(merged.log_probs[known], log_prob)
                where[node] = known
        merged.rescore()
        return merged
