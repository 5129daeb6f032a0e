"""The cost shape, which also keeps what became of all candidates."""

from __future__ import annotations

import numpy as np

from tokentree.draft import Draft
from tokentree.sequence import Accepted, Sequence
from tokentree.shapes.cost import Cost
from tokentree.shapes.curve import CostCurve
from tokentree.shapes.rates import Tally


class Counting(Cost):
    """Decides as `Cost` does. Beside that it keeps each draft as it was before the cut, with the tokens that came.

    Args:
        curve: T(n).
    """

    def __init__(self, curve: CostCurve) -> None:
        super().__init__(curve=curve)
        self._kept = list[tuple[Draft, list[int]]]()

    def observe(
        self, seqs: list[Sequence], drafts: list[Draft], accepted: list[Accepted], draft_seconds: float,
        verify_seconds: float,
    ) -> None:  # fmt: skip
        for seq, step in zip(seqs, accepted, strict=True):
            request = self._requests.get(seq.id)
            if request is not None and request.draft is not None and request.draft.sampled is None:
                self._kept.append((request.draft, step.tokens))
        super().observe(seqs, drafts, accepted, draft_seconds, verify_seconds)

    @property
    def resting(self) -> bool:
        """Whether no draft was asked for in the last step that decoded a text."""
        return self._resting

    def tally(self) -> Tally:
        """How often candidates were right until now."""
        found = Tally()
        for draft, tokens in self._kept:
            found.count(draft, np.array(tokens, np.int64))
        return found
