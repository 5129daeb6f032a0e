"""A drafter in a package of its own: once it is installed, `LLM(model, drafter="echo")` finds it."""

from __future__ import annotations

from tokentree.draft import Draft
from tokentree.drafters.base import Drafter
from tokentree.sequence import Sequence
from tokentree.shapes.base import Shape


class Echo(Drafter):
    """Proposes that the text repeats its last two tokens."""

    name = "echo"

    def propose(self, seqs: list[Sequence], shape: Shape, sampled: bool) -> list[Draft]:
        drafts = []
        for seq in seqs:
            draft, node = Draft(seq.tokens[-1]), 0
            for token in seq.tokens[-2:]:
                node = draft.add(node, token, log_prob=-0.7, rank=0)
            drafts.append(draft)
        return drafts
