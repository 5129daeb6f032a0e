"""KV that is reused for texts that begin alike."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

from tokentree.engines.kv import SequenceKV
from tokentree.tree import Ints

LEAST = 16  # shared tokens that are worth a copy


class PrefixCache:
    """Keeps the KV of finished sequences, the latest ones, for those that begin with the same tokens: the next turn of
    a chat, another question about the same document, the same instructions.

    Args:
        max_bytes: of all that is kept; with 0 nothing is kept, nor copied from live sequences.
    """

    def __init__(self, max_bytes: int) -> None:
        self._max_bytes = max_bytes
        self._entries: list[tuple[Ints, SequenceKV]] = []  # the last used one at the end

    def __len__(self) -> int:
        return len(self._entries)

    @property
    def nbytes(self) -> int:
        return sum(kv.nbytes for _, kv in self._entries)

    def clear(self) -> None:
        """Forgets all that is kept."""
        self._entries = []

    def keep(self, tokens: Ints, kv: SequenceKV) -> list[SequenceKV]:
        """Takes over ``kv``, or a copy of its committed rows, which belong to ``tokens``, where most of it is empty;
        returns what is not kept, or no more."""
        if len(tokens) < LEAST or kv.committed_nbytes > self._max_bytes:
            return [kv]
        if any(shared_length(known, tokens) == len(tokens) for known, _ in self._entries):
            return [kv]
        before = [*self._entries, (tokens, kv)]
        self._entries = [entry for entry in self._entries if shared_length(entry[0], tokens) < len(entry[0])]
        self._entries.append((tokens, kv.trimmed()))
        while self.nbytes > self._max_bytes:
            del self._entries[0]
        kept = {id(entry[1]) for entry in self._entries}
        return [entry[1] for entry in before if id(entry[1]) not in kept]

    def fill(self, kv: SequenceKV, tokens: Ints, live: Iterable[tuple[Ints, SequenceKV]] = ()) -> int:
        """Copies into the empty ``kv`` the rows of the longest beginning of ``tokens`` that is known, from what is kept
        or from ``live`` sequences; returns how many rows that are."""
        if not self._max_bytes:
            return 0
        best, rows = None, LEAST - 1
        for entry in [*live, *self._entries]:
            length = shared_length(entry[0], tokens)
            if length > rows:
                best, rows = entry, length
        if best is None:
            return 0
        kv.copy_rows(best[1], rows)
        self._entries.sort(key=lambda entry: entry is best)  # to the end
        return rows


def shared_length(one: Ints, other: Ints) -> int:
    """How many tokens both begin with."""
    length = min(len(one), len(other))
    differ = np.flatnonzero(one[:length] != other[:length])
    return int(differ[0]) if differ.size else length
