"""Several drafters, one tree (SpecInfer's collective drafting)."""

from __future__ import annotations

from tokentree.draft import Draft
from tokentree.drafters.base import Drafter
from tokentree.engines.base import TargetOutput
from tokentree.errors import OptionError
from tokentree.sequence import Accepted, Sequence
from tokentree.shapes.base import Shape
from tokentree.tree import TokenTree


class Merged(Drafter):
    """Joins equal paths of all drafts; a node keeps the best score that it got, and who proposed it.

    Args:
        drafters: at least one; the first 32 are told apart.

    Raises:
        OptionError: if there is none.
    """

    name = "merged"

    def __init__(self, drafters: list[Drafter]) -> None:
        if not drafters:
            raise OptionError("merged needs at least one drafter")
        self._drafters = drafters

    @property
    def names(self) -> list[str]:
        return [drafter.name for drafter in self._drafters]

    def prefill(self, seqs: list[Sequence]) -> None:
        for drafter in self._drafters:
            drafter.prefill(seqs)

    def propose(self, seqs: list[Sequence], shape: Shape, sampled: bool) -> list[Draft]:
        proposals = [drafter.propose(seqs, shape, sampled=False) for drafter in self._drafters]
        return [self._merge(list(drafts)) for drafts in zip(*proposals, strict=True)]

    def observe(self, seqs: list[Sequence], drafts: list[Draft], out: TargetOutput, accepted: list[Accepted]) -> None:
        for drafter in self._drafters:
            drafter.observe(seqs, drafts, out, accepted)

    def release(self, seqs: list[Sequence]) -> None:
        for drafter in self._drafters:
            drafter.release(seqs)

    @staticmethod
    def _merge(drafts: list[Draft]) -> Draft:
        tree, maps = TokenTree.merge([draft.tree for draft in drafts])
        merged = Draft(drafts[0].root)
        best = [-float("inf")] * len(tree)
        sources = [0] * len(tree)
        for number, (draft, where) in enumerate(zip(drafts, maps, strict=True)):
            for node, new in enumerate(where.tolist()):
                best[new] = max(best[new], draft.log_scores[node])
                sources[new] |= (1 << number) if node else 0
        for node in range(1, len(tree)):
            parent = int(tree.parents[node])
            rank = tree.children[parent].index(node)
            merged.add(parent, int(tree.tokens[node]), 0.0, rank, sources[node])
        merged.log_scores = best
        return merged
