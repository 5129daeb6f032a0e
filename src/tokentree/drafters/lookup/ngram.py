# numba gives every scalar a type of its own, which annotations can't follow:
# mypy: disable-error-code="index,assignment,no-any-return"
"""Prompt lookup: what followed the last few tokens where they stood before."""

from __future__ import annotations

import math
from collections.abc import Sequence as SequenceOf

import numpy as np
from numpy.typing import NDArray

from tokentree.draft import Draft
from tokentree.drafters.lookup.base import Lookup
from tokentree.errors import OptionError
from tokentree.growing import TOKEN, grow_paths, join, planted
from tokentree.jit import njit
from tokentree.sequence import Sequence
from tokentree.tree import Floats, Ints

END = -1  # parts a reference from the next text
OTHERS = math.log(0.9)  # the log-probability of each token but the first
HASH = 0x9E3779B1
SIZE, SINCE = range(2)  # what is counted of an index: tokens, and those since the last END

Int32s = NDArray[np.int32]


class NGram(Lookup):
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
        _Index(1, 1, [0, 0]).add_to(Draft(0), 1, [0], 1, 1)  # compiled before any request waits for it

    def prefill(self, seqs: list[Sequence], upto: int | None = None) -> None:
        for seq in seqs:
            index = self._index(seq)
            index.append(seq.tokens[index.own : upto])

    def look_up(self, seq: Sequence, draft: Draft, source: int, nodes: int, depth: int) -> None:
        index = self._index(seq)
        index.add_to(draft, source, seq.tokens[index.own :], self._max_branches, depth)

    def release(self, seqs: list[Sequence]) -> None:
        for seq in seqs:
            self._indexes.pop(seq.id, None)

    def _index(self, seq: Sequence) -> _Index:
        """The index over what was read of ``seq``."""
        index = self._indexes.get(seq.id)
        if index is None:
            before = [token for reference in seq.references for token in (*reference, END)]
            index = self._indexes[seq.id] = _Index(self._min_n, self._max_n, before)
        return index


class _Index:
    """Where each n-gram of a growing text ended.

    The ends of n-grams with one hash make a list, the latest first: ``latest`` int32[sizes, slots] has its first end,
    and ``before`` int32[sizes, room + 1] the one that follows an end, 0 where there is none.

    Args:
        min_n, max_n: sizes of the n-grams.
        before: references, each closed by `END`, which stand before the text.
    """

    def __init__(self, min_n: int, max_n: int, before: SequenceOf[int]) -> None:
        self._min_n, self._sizes = min_n, max_n + 1 - min_n
        self._references, self._size, self._arrays = len(before), 0, self._empty(256)
        self.append(before)

    @property
    def own(self) -> int:
        """Tokens of the text itself."""
        return self._size - self._references

    def append(self, new: SequenceOf[int]) -> None:
        size = self._reserve(len(new))
        _append(*self._arrays, self._min_n, np.array(new, np.int32))
        self._size = size

    def add_to(self, draft: Draft, source: int, new: SequenceOf[int], branches: int, depth: int) -> None:
        """As `append`; then joins to ``draft`` what followed the end of the text at so many places, in one call."""
        size = self._reserve(len(new))
        branches, depth, told = min(branches, size), min(depth, size), np.array(new, np.int32)
        draft.grow(_add, branches * depth, source, *self._arrays, self._min_n, told, branches, depth)
        self._size = size

    def _reserve(self, count: int) -> int:
        """Makes room for so many more tokens; returns how many there are then."""
        size = self._size + count
        if size > len(self._arrays[0]):
            arrays = self._empty(1 << size.bit_length())
            _append(*arrays, self._min_n, self._arrays[0][: self._size])
            self._arrays = arrays
        return size

    def _empty(self, room: int) -> tuple[Int32s, Int32s, Int32s, Ints]:
        """Arrays with room for so many tokens, a power of two."""
        latest, before = np.zeros((self._sizes, room), np.int32), np.empty((self._sizes, room + 1), np.int32)
        return np.empty(room, np.int32), latest, before, np.zeros(2, np.int64)


# -- the loops, compiled by numba --------------------------------------------------------------------------------------


@njit
def _slot(tokens: Int32s, end: int, n: int, slots: int) -> int:
    """Where the list of the n-gram begins that ends there."""
    mixed = 0
    for i in range(end - n, end):
        mixed = (mixed + tokens[i]) * HASH & 0xFFFFFFFF
    return (mixed ^ mixed >> 15) & (slots - 1)


@njit(cache=True)
def _append(tokens: Int32s, latest: Int32s, before: Int32s, counts: Ints, min_n: int, new: Int32s) -> None:
    for token in new:
        tokens[counts[SIZE]] = token
        counts[SIZE] += 1
        counts[SINCE] = 0 if token == END else counts[SINCE] + 1
        for row in range(min(len(latest), counts[SINCE] - min_n + 1)):
            slot = _slot(tokens, counts[SIZE], min_n + row, latest.shape[1])
            before[row, counts[SIZE]] = latest[row, slot]
            latest[row, slot] = counts[SIZE]


@njit
def _places(
    tokens: Int32s, latest: Int32s, before: Int32s, counts: Ints, min_n: int, limit: int
) -> tuple[Ints, Ints, int]:  # fmt: skip
    """Where earlier matches of the text's end are continued, longest first, then latest; their lengths; how many."""
    size, count = counts[SIZE], 0
    begins, lengths = np.empty(limit, np.int64), np.empty(limit, np.int64)
    for row in range(min(len(latest), counts[SINCE] - min_n + 1) - 1, -1, -1):
        n = min_n + row
        end = np.int64(latest[row, _slot(tokens, size, n, latest.shape[1])])
        while end and count < len(begins):
            goes_on = end < size and tokens[end] != END and not (begins[:count] == end).any()
            if goes_on and (tokens[end - n : end] == tokens[size - n : size]).all():
                begins[count], lengths[count] = end, n
                count += 1
            end = np.int64(before[row, end])
    return begins, lengths, count


@njit(cache=True)
def _add(
    ints: Ints, floats: Floats, size: int, source: int, tokens: Int32s, latest: Int32s, before: Int32s, counts: Ints,
    min_n: int, new: Int32s, branches: int, depth: int,
) -> int:  # fmt: skip
    """As `_Index.add_to`; see `Draft.grow`."""
    _append(tokens, latest, before, counts, min_n, new)
    begins, lengths, count = _places(tokens, latest, before, counts, min_n, branches)
    paths, ends, firsts, total = np.empty(count * depth, np.int64), np.empty(count, np.int64), np.empty(count), 0
    for place in range(count):
        for i in range(begins[place], min(begins[place] + depth, counts[SIZE])):
            if tokens[i] == END:
                break
            paths[total] = tokens[i]
            total += 1
        ends[place], firsts[place] = total, math.log((1 - 1 / (lengths[place] + 1)) * 0.5**place)
    found, chances, number = planted(ints[TOKEN, 0], total + 1)
    number = grow_paths(found, chances, number, paths[:total], ends, firsts, OTHERS)
    return join(ints, floats, size, found, chances, number, source)
