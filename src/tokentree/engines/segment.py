"""The rows of one sequence in a forward: the nodes of a tree behind committed KV."""

from __future__ import annotations

from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass, field
from typing import Literal

import numpy as np

from tokentree.engines.kv import SequenceKV
from tokentree.jit import njit
from tokentree.kernels.attention import SegmentRows
from tokentree.tree import Ints, TokenTree

Upto = Literal["kv", "hidden", "logits"]  # how far a forward goes


@dataclass(eq=False)
class Segment:
    """The rows of one sequence in a forward.

    Args:
        kv: its KV; the rows of the tree's nodes follow the committed ones, node j at row ``kv.length + j``.
        tree: all nodes.
        first: the first node to compute; nodes before it have their KV already.
        start: its row in the forward's input.
    """

    kv: SequenceKV
    tree: TokenTree
    first: int
    start: int
    windows: set[int | None] = field(default_factory=set, init=False)  # those that layers asked for
    _read: tuple[Ints, int, Ints, Ints] | None = field(default=None, init=False, repr=False)

    @property
    def count(self) -> int:
        return len(self.tree) - self.first

    @property
    def prefix(self) -> int:
        return self.kv.length

    @property
    def positions(self) -> np.ndarray:
        """int64[count]: absolute positions of the computed nodes, prefix + depth."""
        return self._rows[3]

    @property
    def tokens(self) -> Ints:
        """int64[count]: the tokens of the computed nodes."""
        return self._rows[2]

    def visible(self, window: int | None, chunk: int | None = None) -> np.ndarray:
        """bool[count, prefix + nodes]: which KV rows each computed node sees; ``window`` and ``chunk`` count
        positions."""
        ancestors = self.tree.mask[self.first :]
        seen = np.concatenate([np.ones((self.count, self.prefix), np.bool_), ancestors], axis=1)
        row_positions = np.concatenate([np.arange(self.prefix), self.prefix + self.tree.depths])
        if window is not None:
            seen &= self.positions[:, None] - row_positions < window
        if chunk is not None:
            seen &= self.positions[:, None] // chunk == row_positions // chunk
        return seen

    @property
    def paths(self) -> Ints:
        """int64[count, 1 + longest]: how many nodes the path to each computed node has, then their KV rows; these are
        left out for a chain, whose rows lie where they will lie once committed."""
        return self._rows[0]

    @property
    def _rows(self) -> tuple[Ints, int, Ints, Ints]:
        """See `_rows_of`."""
        if self._read is None:
            tree = self.tree
            self._read = _rows_of(tree.tokens, tree.parents, tree.depths, self.first, self.prefix, tree.is_chain)
        return self._read

    def described(self, layer: int) -> SegmentRows:
        """What `attend` is told of a segment, at ``layer``.

        Raises:
            IndexError: if its storage has no room for its tree.
        """
        if self.prefix + len(self.tree) > self.kv.capacity:
            raise IndexError(
                f"a tree ends at row {self.prefix + len(self.tree)}, and there is room for {self.kv.capacity}"
            )
        (keys, values, keys_step, values_step), (paths, paths_at, _, _) = self.kv.addresses(layer), self._rows
        return SegmentRows(
            keys=keys, values=values, capacity=self.kv.capacity, prefix=self.prefix, rows=self.count,
            start=self.start, paths=paths_at, longest=paths.shape[1] - 1, chain=int(self.tree.is_chain),
            first=self.first, keys_layer=keys_step, values_layer=values_step,
        )  # fmt: skip


def inputs_of(segments: SequenceOf[Segment], padding: int = 0) -> tuple[Ints, Ints]:
    """The tokens and positions of all rows of a forward, int64[rows], and so many zeros behind them."""
    if len(segments) == 1 and not padding:
        return segments[0].tokens, segments[0].positions
    nothing = np.zeros(padding, np.int64)
    ids = np.concatenate([*(segment.tokens for segment in segments), nothing])
    return ids, np.concatenate([*(segment.positions for segment in segments), nothing])


def end_of(segments: SequenceOf[Segment]) -> int:
    """A position behind those of all rows."""
    return max(segment.prefix + len(segment.tree) for segment in segments)


@njit(cache=True)
def _rows_of(
    tokens: Ints, parents: Ints, depths: Ints, first: int, prefix: int, is_chain: bool
) -> tuple[Ints, int, Ints, Ints]:  # fmt: skip
    """`Segment.paths`, and where they lie; `Segment.tokens` and `Segment.positions`."""
    paths = np.zeros((len(parents) - first, 1 if is_chain else 2 + depths[first:].max()), np.int64)
    for node in range(first, len(parents)):
        own, ancestor = paths[node - first], node
        own[0] = depths[node] + 1
        while ancestor >= 0 and not is_chain:
            own[1 + depths[ancestor]] = prefix + ancestor
            ancestor = parents[ancestor]
    return paths, paths.ctypes.data, tokens[first:].copy(), prefix + depths[first:]
