"""The rows of one sequence in a forward: the nodes of a tree behind committed KV."""

from __future__ import annotations

from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass, field
from typing import Literal

import numpy as np

from tokentree.engines.kv import SequenceKV
from tokentree.jit import njit
from tokentree.kernels.attention import SegmentRows
from tokentree.kernels.recurrence import StateRows
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
        read: its rows are committed as soon as they are there, such as those of a prompt.
    """

    kv: SequenceKV
    tree: TokenTree
    first: int
    start: int
    read: bool = False
    windows: set[int | None] = field(default_factory=set, init=False)  # those that layers asked for
    _described: tuple[Ints, int, Ints, Ints] | None = field(default=None, init=False, repr=False)
    _order: tuple[Ints, int, Ints] | None = field(default=None, init=False, repr=False)

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
    def turns(self) -> np.ndarray:
        """int64[count]: their rotary positions."""
        return self.positions + self.kv.shift if self.kv.shift else self.positions

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
        if self._described is None:
            tree = self.tree
            self._described = _rows_of(tree.tokens, tree.parents, tree.depths, self.first, self.prefix, tree.is_chain)
        return self._described

    def described(self, layer: int) -> SegmentRows:
        """What `attend` is told of a segment, at ``layer``.

        Raises:
            IndexError: if its storage has no room for its tree.
        """
        prefix, nodes, capacity = self.prefix, len(self.tree), self.kv.capacity
        if prefix + nodes > capacity:
            raise IndexError(f"a tree ends at row {prefix + nodes}, and there is room for {capacity}")
        (keys, values, keys_step, values_step), (paths, paths_at, _, _) = self.kv.addresses(layer), self._rows
        return SegmentRows(
            keys=keys, values=values, capacity=capacity, prefix=prefix, rows=nodes - self.first, start=self.start,
            paths=paths_at, longest=paths.shape[1] - 1, chain=int(self.tree.is_chain), first=self.first,
            keys_layer=keys_step, values_layer=values_step,
        )  # fmt: skip

    def state_rows(self, number: int) -> StateRows:
        """What compiled loops are told of a segment, at recurrence ``number``."""
        states = self.kv.recurrent
        if self._order is None:
            parents = np.ascontiguousarray(self.tree.parents)
            steps, slots = steps_of(parents, self.first, self.read)
            self._order = steps, slots, windows_of(parents, self.first, states.back)
        (steps, slots, windows), stored = self._order, states.stored(number)
        state = states.state(number)
        return StateRows(
            state=state.data_ptr() if len(state) else 0, stored=stored.data_ptr() + 4 * states.back * states.width,
            stride=4 * states.width, pending=self.prefix - states.held[number], first=self.first, start=self.start,
            read=int(self.read), steps=steps.ctypes.data, num_steps=len(steps), slots=slots,
            windows=windows.ctypes.data, back=states.back, nodes=len(self.tree),
        )  # fmt: skip


def inputs_of(segments: SequenceOf[Segment], padding: int = 0) -> tuple[Ints, Ints]:
    """The tokens and rotary positions of all rows of a forward, int64[rows], and so many zeros behind them."""
    if len(segments) == 1 and not padding:
        return segments[0].tokens, segments[0].turns
    nothing = np.zeros(padding, np.int64)
    ids = np.concatenate([*(segment.tokens for segment in segments), nothing])
    return ids, np.concatenate([*(segment.turns for segment in segments), nothing])


def end_of(segments: SequenceOf[Segment]) -> int:
    """A rotary position behind those of all rows."""
    return max([segment.prefix + max(0, segment.kv.shift) + len(segment.tree) for segment in segments])


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


@njit(cache=True)
def steps_of(parents: Ints, first: int, read: bool) -> tuple[Ints, int]:
    """int64[steps, 3]: nodes in order, each with the slots of its parent's state and of its own, -1 where no state is
    kept; and how many slots there are. Slot 0 holds the committed state.

    Nodes before ``first`` are there only if a later one goes on from them. The last child takes its parent's slot, so
    a chain needs one. A leaf's state is kept only if it is committed, ``read``.
    """
    count = len(parents)
    children, wanted = np.zeros(count, np.int64), np.zeros(count, np.bool_)
    for node in range(count - 1, -1, -1):
        wanted[node] = node >= first or children[node] > 0
        if wanted[node] and node:
            children[parents[node]] += 1
    if read:
        children[count - 1] += 1
    steps, slots = np.empty((count, 3), np.int64), np.zeros(count + 1, np.int64)
    free, num_free, num_slots, num_steps = np.empty(count, np.int64), 0, 1, 0
    left = children.copy()
    for node in range(count):
        if not wanted[node]:
            continue
        parent = parents[node]
        source, last = 0, True
        if parent >= 0:
            left[parent] -= 1
            source, last = slots[parent], left[parent] == 0
        target = -1
        if children[node]:
            if last:
                target = source
            elif num_free:
                num_free -= 1
                target = free[num_free]
            else:
                target = num_slots
                num_slots += 1
            slots[node] = target
        elif last:
            free[num_free] = source
            num_free += 1
        steps[num_steps, 0], steps[num_steps, 1], steps[num_steps, 2] = node, source, target
        num_steps += 1
    return steps[:num_steps].copy(), num_slots


@njit(cache=True)
def windows_of(parents: Ints, first: int, back: int) -> Ints:
    """int64[nodes - first, back]: the ``back`` rows before each node on its path, the nearest last: a node of the tree,
    or -1 for the last committed row, -2 for the one before, and so on."""
    windows = np.empty((len(parents) - first, back), np.int64)
    for node in range(first, len(parents)):
        above = node
        for place in range(back - 1, -1, -1):
            above = parents[above] if above >= 0 else above - 1
            windows[node - first, place] = above
    return windows
