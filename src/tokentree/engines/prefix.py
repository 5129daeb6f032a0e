"""KV that is reused for texts that begin alike."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace

from tokentree.engines.kv import SequenceKV
from tokentree.engines.radix import Node, RadixTree, shared_length
from tokentree.engines.recurrent import Checkpoint, RecurrentStates
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
        checkpoints: recurrent states of the text, by how many rows of the run are in them, the fewest first.
    """

    kv: SequenceKV
    first: int
    length: int
    checkpoints: tuple[tuple[int, Checkpoint], ...] = ()

    def __len__(self) -> int:
        return self.length

    @property
    def nbytes(self) -> int:
        return self.kv.nbytes + sum(known.nbytes for _, known in self.checkpoints)

    def split(self, at: int) -> tuple[KVRun, KVRun]:
        """See `Run.split`. The longer part stays in this storage where it fills that."""
        before = tuple((rows, known) for rows, known in self.checkpoints if rows <= at)
        after = tuple((rows - at, known) for rows, known in self.checkpoints if rows > at)
        head = KVRun(self.kv, self.first, at, before)
        tail = KVRun(self.kv, self.first + at, self.length - at, after)
        return (head.copied(), tail.fitted()) if 2 * at <= self.length else (head.fitted(), tail.copied())

    def copied(self) -> KVRun:
        """The same rows in storage of their own."""
        kv = self.kv.cut(self.first, self.first + self.length)
        return KVRun(kv, self.first % BLOCK, self.length, self.checkpoints)

    def with_checkpoint(self, rows: int, known: Checkpoint) -> KVRun:
        """The same, and a checkpoint behind so many rows."""
        other = [(at, one) for at, one in self.checkpoints if at != rows]
        return replace(self, checkpoints=tuple(sorted([*other, (rows, known)], key=lambda one: one[0])))

    def fitted(self) -> KVRun:
        """This run, or a copy where too much of its storage is unused."""
        unused = self.kv.nbytes - self.kv.nbytes_of(self.first, self.first + self.length)
        return self.copied() if unused * ROOM >= self.kv.nbytes else self


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

    @property
    def keeps_any(self) -> bool:
        """Whether anything may be kept."""
        return self._max_bytes > 0

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

        checkpoints = kv.recurrent.all_checkpoints()
        self._tree.insert(tokens, rows_from)
        for known in checkpoints:
            if known.length <= len(tokens):  # a forward that failed may have moved the states beyond
                self._mark(tokens[: known.length], known)
        kv.recurrent = RecurrentStates(())
        self._tree.evict(self.nbytes - self._max_bytes)
        return unused

    def _mark(self, tokens: Ints, known: Checkpoint) -> None:
        """Keeps a checkpoint behind ``tokens``, whose rows are kept."""
        path = self._tree.match(tokens)
        if path and sum(length for _, length in path) == len(tokens):
            node, length = path[-1]
            self._tree.put(node, node.rows.with_checkpoint(length, known))

    def known(self, tokens: Ints, live: Iterable[tuple[Ints, SequenceKV]] = ()) -> int:
        """How many tokens other texts begin with too, whether or not they can be reused."""
        if not self._max_bytes:
            return 0
        kept = sum(length for _, length in self._tree.match(tokens))
        return max([kept, *(shared_length(known, tokens) for known, _ in live)])

    def fill(self, kv: SequenceKV, tokens: Ints, live: Iterable[tuple[Ints, SequenceKV]] = ()) -> int:
        """Copies into the empty ``kv`` the rows of the longest beginning of ``tokens`` that is known, from what is kept
        or from a ``live`` sequence; returns how many rows that are. Where there are recurrent states, a beginning ends
        at a checkpoint."""
        if not self._max_bytes:
            return 0
        path, states = self._tree.match(tokens), None
        if kv.recurrent.recurrences:
            path, states = _upto_checkpoint(path)
        kept = rows = max(sum(length for _, length in path), LEAST - 1)
        best = None
        for known, other in live:
            length = shared_length(known, tokens)
            if kv.recurrent.recurrences and length > rows:
                found = other.recurrent.latest(length)
                length = 0 if found is None else found.length
                states = found if length > rows else states
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
        if kv.length and states is not None:
            kv.recurrent.restore(states)
        return kv.length


def _upto_checkpoint(path: list[tuple[Node[KVRun], int]]) -> tuple[list[tuple[Node[KVRun], int]], Checkpoint | None]:
    """The part of ``path`` up to its last checkpoint, and that."""
    for place in range(len(path) - 1, -1, -1):
        node, length = path[place]
        for rows, known in reversed(node.rows.checkpoints):
            if rows <= length:
                return [*path[:place], (node, rows)], known
    return [], None
