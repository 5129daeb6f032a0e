"""Prompt lookup: what followed the last few tokens the last time they stood in this text."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass, field

from tokentree.draft import Draft
from tokentree.drafters.base import Drafter
from tokentree.errors import OptionError
from tokentree.sequence import Sequence
from tokentree.shapes.base import Shape


class NGram(Drafter):
    """Matches the last n tokens in prompt and output, longest n first (LLMA, Yang et al. 2023, arXiv:2304.04487; prompt
    lookup, Saxena 2023). Each place where they stood gives a branch, the most recent one first.

    Args:
        max_n, min_n: the longest and the shortest match.
        max_branches: most places looked at.

    Raises:
        OptionError: unless ``1 <= min_n <= max_n`` and ``max_branches >= 1``.
    """

    name = "ngram"

    def __init__(self, max_n: int = 4, min_n: int = 2, max_branches: int = 4) -> None:
        if not 1 <= min_n <= max_n or max_branches < 1:
            raise OptionError("ngram needs 1 <= min_n <= max_n and max_branches of at least 1")
        self._max_n, self._min_n, self._max_branches = max_n, min_n, max_branches
        self._indexes: dict[int, _Index] = {}

    def propose(self, seqs: list[Sequence], shape: Shape, sampled: bool) -> list[Draft]:
        return [shape.prune(seq, self._lookup(seq, min(shape.max_depth, seq.room - 1))) for seq in seqs]

    def _lookup(self, seq: Sequence, depth: int) -> Draft:
        index = self._indexes.setdefault(seq.id, _Index(self._min_n, self._max_n))
        index.append(seq.tokens)
        draft = Draft(seq.tokens[-1])
        children: dict[tuple[int, int], int] = {}
        for branch, (n, place) in enumerate(index.places(self._max_branches)):
            node = 0
            for token in seq.tokens[place : place + depth]:
                if (node, token) not in children:
                    # no distribution is known; a longer match is surer, and an earlier branch goes first
                    log_prob = -0.5 / n if node else -(branch + 1) / n
                    rank = sum(parent == node for parent in draft.parents)
                    children[node, token] = draft.add(node, token, log_prob, rank)
                node = children[node, token]
        return draft

    def release(self, seqs: list[Sequence]) -> None:
        for seq in seqs:
            self._indexes.pop(seq.id, None)


@dataclass
class _Index:
    """Where each n-gram of a growing text ended, the latest place last."""

    min_n: int
    max_n: int
    tokens: list[int] = field(default_factory=list)
    ends: defaultdict[tuple[int, ...], list[int]] = field(default_factory=lambda: defaultdict(list))

    def append(self, tokens: list[int]) -> None:
        """Takes in what ``tokens`` has more than what is known."""
        for end in range(len(self.tokens) + 1, len(tokens) + 1):
            for n in range(self.min_n, min(self.max_n, end) + 1):
                self.ends[tuple(tokens[end - n : end])].append(end)
        self.tokens += tokens[len(self.tokens) :]

    def places(self, limit: int) -> list[tuple[int, int]]:
        """(n, where the continuation starts) of earlier matches of the text's end: longest first, then latest."""
        found: dict[int, int] = {}
        for n in range(min(self.max_n, len(self.tokens)), self.min_n - 1, -1):
            for end in reversed(self.ends[tuple(self.tokens[-n:])]):
                if end < len(self.tokens) and len(found) < limit:
                    found.setdefault(end, n)
                elif len(found) >= limit:
                    break
        return [(n, end) for end, n in found.items()]
