"""KV that is reused for texts that begin alike."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from tokentree.engines.kv import SequenceKV
from tokentree.engines.radix import RadixTree, shared_length
from tokentree.kernels.tile import BLOCK
from tokentree.tree import Ints

LEAST = 16  # shared tokens that are worth a copy
ROOM = 8  # storage of which less than one part of so many is unused isn't worth a copy


@dataclass(frozen=True)
class KVRun:
    """The KV of a run of tokens, in storage that nobody else has or writes to.

    Args:
        kv: the storage.
        first: the row of the first token. It has the same place in its block as in the whole text.
        length: rows, one for each token.
    """

    kv: SequenceKV
    first: int
    length: int

    def __len__(self) -> int:
        return self.length

    @property
    def nbytes(self) -> int:
        return self.kv.nbytes

    def split(self, at: int) -> tuple[KVRun, KVRun]:
        """See `Run.split`. The longer part stays in this storage where it fills that."""
        head, tail = KVRun(self.kv, self.first, at), KVRun(self.kv, self.first + at, self.length - at)
        return (head.copied(), tail.fitted()) if 2 * at <= self.length else (head.fitted(), tail.copied())

    def copied(self) -> KVRun:
        """The same rows in storage of their own."""
        return KVRun(self.kv.cut(self.first, self.first + self.length), self.first % BLOCK, self.length)

    def fitted(self) -> KVRun:
        """This run, or a copy where too much of its storage is unused."""
        unused = self.nbytes - self.kv.nbytes_of(self.first, self.first + self.length)
        return self.copied() if unused * ROOM >= self.nbytes else self


class PrefixCache:
    """Keeps the KV of finished sequences, the latest ones, for those that begin with the same tokens: the next turn of
    a chat, another question about the same document, the same instructions. What texts begin with in common is kept
    once.

    Args:
        max_bytes: of all that is kept; with 0 nothing is kept, nor copied from live sequences.
    """

    def __init__(self, max_bytes: int) -> None:
        self._max_bytes = max_bytes
        self.clear()

    def __len__(self) -> int:
        """Texts that are kept, without those that others go on from."""
        return sum(not node.children for node in self._tree.nodes())

    @property
    def nbytes(self) -> int:
        return self._tree.nbytes

    def clear(self) -> None:
        """Forgets all that is kept."""
        self._tree = RadixTree[KVRun]()

    def check(self) -> None:
        """See `RadixTree.check`."""
        self._tree.check()

    def keep(self, tokens: Ints, kv: SequenceKV) -> list[SequenceKV]:
        """Keeps the committed rows of ``kv``, which belong to ``tokens``, as far as they aren't known yet. Takes the
        storage over where they fill it, and else copies them. Returns what is not taken over: a fixed storage always,
        since recordings belong to it."""
        if len(tokens) < LEAST or kv.nbytes_of(0, kv.length) > self._max_bytes:
            return [kv]
        unused = [kv]

        def rows_from(start: int, end: int) -> KVRun:
            run = KVRun(kv, start, end - start)
            run = run.copied() if kv.layout.fixed else run.fitted()
            if run.kv is kv:
                unused.clear()
            return run

        self._tree.insert(tokens, rows_from)
        self._tree.evict(self.nbytes - self._max_bytes)
        return unused

    def fill(self, kv: SequenceKV, tokens: Ints, live: Iterable[tuple[Ints, SequenceKV]] = ()) -> int:
        """Copies into the empty ``kv`` the rows of the longest beginning of ``tokens`` that is known, from what is kept
        or from a ``live`` sequence; returns how many rows that are."""
        if not self._max_bytes:
            return 0
        path = self._tree.match(tokens)
        kept = rows = max(sum(length for _, length in path), LEAST - 1)
        best = None
        for known, other in live:
            length = shared_length(known, tokens)
            if length > rows:
                best, rows = other, length
        if best is not None:
            kv.copy_rows(best, rows)
        elif kept >= LEAST:
            last = path[-1][0]
            kv.reserve(rows)
            self._tree.lock(last)
            try:
                for node, length in path:
                    kv.copy_rows(node.rows.kv, kv.length + length, kv.length - node.rows.first)
            finally:
                self._tree.unlock(last)
        return kv.length
