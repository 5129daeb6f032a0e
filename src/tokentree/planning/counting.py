"""The cost shape, which also keeps what became of all candidates."""

from __future__ import annotations

from collections.abc import Sequence as SequenceOf

import numpy as np

from tokentree.draft import Draft
from tokentree.planning.runs import Runs, Seen
from tokentree.sequence import Accepted, Sequence
from tokentree.shapes.cost import Cost
from tokentree.shapes.curve import CostCurve
from tokentree.shapes.rates import Tally


class Counting(Cost):
    """Decides as `Cost` does. Beside that it keeps all steps of each text: the draft as it was before the cut, and the
    tokens that came.

    Args:
        curve: T(n).
    """

    def __init__(self, curve: CostCurve) -> None:
        super().__init__(curve=curve)
        self._seen = dict[int, list[Seen]]()

    def observe(
        self, seqs: list[Sequence], drafts: list[Draft], accepted: list[Accepted], draft_seconds: float,
        verify_seconds: float,
    ) -> None:  # fmt: skip
        for seq, step in zip(seqs, accepted, strict=True):
            request = self._requests.get(seq.id)
            draft = None if request is None else request.draft
            if draft is not None and draft.sampled is not None:
                draft = None
            self._seen.setdefault(seq.id, []).append(Seen(draft, step.tokens, len(seqs)))
        super().observe(seqs, drafts, accepted, draft_seconds, verify_seconds)

    @property
    def resting(self) -> bool:
        """Whether no draft was asked for in the last step that decoded a text."""
        return self._resting

    def tally(self) -> Tally:
        """How often candidates were right until now."""
        found = Tally()
        for steps in self._seen.values():
            for step in steps:
                if step.draft is not None:
                    found.count(step.draft, np.array(step.tokens, np.int64))
        return found

    def runs(self, names: SequenceOf[str]) -> Runs:
        """The drafts of each text until now.

        Args:
            names: of the drafters.
        """
        return Runs.of(self._seen.values(), names)
