"""No drafter: plain decoding, one token per forward."""

from __future__ import annotations

from tokentree.draft import Draft
from tokentree.drafters.base import Drafter
from tokentree.sequence import Sequence
from tokentree.shapes.base import Shape


class NoDrafter(Drafter):
    """Proposes nothing, so that a step emits the bonus token alone."""

    name = "none"
    draws_children = True

    def propose(self, seqs: list[Sequence], shape: Shape, sampled: bool) -> list[Draft]:
        return [Draft(seq.tokens[-1], {} if sampled else None) for seq in seqs]
