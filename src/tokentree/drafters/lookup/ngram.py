"""Prompt lookup: what followed the last few tokens where they stood before."""

from __future__ import annotations

import math
from collections import defaultdict

from tokentree.draft import Draft
from tokentree.drafters.base import Drafter
from tokentree.errors import OptionError
from tokentree.sequence import Sequence
from tokentree.shapes.base import Shape

END = -1  # parts a reference from the next text
OTHERS = math.log(0.9)  # the log-probability of each token but the first


class NGram(Drafter):
    """Matches the last n tokens in prompt, output and references, longest n first (inference with reference, Yang et
    al. 2023, arXiv:2304.04487; prompt lookup, Saxena 2023). Each place where they stood gives a branch, the most
    recent one first.

    The probabilities that it gives are rough: 1 - 1/(n + 1) for what followed a match of n tokens, half of that for
    each place further back, and 0.9 for each token after the first. The `cost` shape learns better ones.

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

    def prefill(self, seqs: list[Sequence], upto: int | None = None) -> None:
        for seq in seqs:
            self._index(seq, upto)

    def propose(self, seqs: list[Sequence], shape: Shape, sampled: bool) -> list[Draft]:
        return [self._lookup(seq, min(shape.max_depth, seq.room - 1)) for seq in seqs]

    def release(self, seqs: list[Sequence]) -> None:
        for seq in seqs:
            self._indexes.pop(seq.id, None)

    def _index(self, seq: Sequence, upto: int | None = None) -> _Index:
        """The index over all of ``seq`` as it stands, or its first tokens."""
        if seq.id not in self._indexes:
            self._indexes[seq.id] = _Index(self._min_n, self._max_n)
            for reference in seq.references:
                self._indexes[seq.id].append([*reference, END])
        index = self._indexes[seq.id]
        index.append(seq.tokens[index.own : upto], own=True)
        return index

    def _lookup(self, seq: Sequence, depth: int) -> Draft:
        index = self._index(seq)
        draft, places = Draft(seq.tokens[-1]), index.places(self._max_branches)
        if places and depth > 0:
            firsts = [math.log((1 - 1 / (n + 1)) * 0.5**place) for place, (n, _) in enumerate(places)]
            draft.add_paths([index.after(begin, depth) for _, begin in places], firsts, OTHERS)
        return draft


class _Index:
    """Where each n-gram of a growing text ended, the latest place last. References stand before the text."""

    def __init__(self, min_n: int, max_n: int) -> None:
        self.tokens: list[int] = []
        self.own = 0  # tokens of the text itself
        self._since = 0  # tokens since the last END
        self._sizes = range(min_n, max_n + 1)
        self._ends: defaultdict[tuple[int, ...], list[int]] = defaultdict(list)

    def append(self, tokens: list[int], own: bool = False) -> None:
        for token in tokens:
            self.tokens.append(token)
            self.own += own
            self._since = 0 if token == END else self._since + 1
            for n in self._sizes:
                if n <= self._since:
                    self._ends[tuple(self.tokens[-n:])].append(len(self.tokens))

    def after(self, begin: int, count: int) -> list[int]:
        """The tokens from there on, at most so many, up to the end of their text."""
        tokens = self.tokens[begin : begin + count]
        return tokens[: tokens.index(END)] if END in tokens else tokens

    def places(self, limit: int) -> list[tuple[int, int]]:
        """(n, where the continuation starts) of earlier matches of the text's end: longest first, then latest."""
        found: dict[int, int] = {}
        for n in reversed(self._sizes):
            for end in reversed(self._ends.get(tuple(self.tokens[-n:]), ())):
                if len(found) >= limit:
                    return [(n, end) for end, n in found.items()]
                if end < len(self.tokens) and self.tokens[end] != END:
                    found.setdefault(end, n)
        return [(n, end) for end, n in found.items()]
