"""The KV of one sequence, in storage allocated ahead."""

from __future__ import annotations

from collections.abc import Sequence as SequenceOf
from copy import copy
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from tokentree.engines.cpu.mapped import cloned, zeros
from tokentree.engines.recurrent import Recurrence, RecurrentStates
from tokentree.errors import ModelError
from tokentree.jit import njit
from tokentree.kernels.copying import copy_into
from tokentree.kernels.tile import BLOCK
from tokentree.tree import Ints

Floats32 = NDArray[np.float32]
SPARE = 16  # storages kept for the next sequences
SLACK = 64  # rows that a text may grow by before its first storage does
LEAST_FIXED = 1024  # rows of the smallest storage of a compiled graph


@dataclass(frozen=True)
class KVLayout:
    """How the rows of every layer are stored.

    Args:
        shapes: per layer, (KV heads, key width, value width).
        dtype, device: of the storage.
        blocked: as `BlockedKV` keeps it.
        fixed: as a compiled graph wants it: each layer in a tensor of its own, and few capacities, powers of two.
        states, width, state_dtype: how many hidden states of each row are kept too, how wide they are, and their type.
        recurrences: of a model with recurrent states.
        reads: which of these layers attention reads each time that a forward attends; the first time it is stored.
            Empty if each is read once, in order.
    """

    shapes: tuple[tuple[int, int, int], ...]
    dtype: torch.dtype
    device: torch.device
    blocked: bool = False
    fixed: bool = False
    states: int = 0
    width: int = 0
    state_dtype: torch.dtype = torch.float32
    recurrences: tuple[Recurrence, ...] = ()
    reads: tuple[int, ...] = ()

    def read_by(self, call: int) -> tuple[int, bool]:
        """The layer that is read when a forward attends for the ``call``-th time, and whether it is stored then."""
        if call >= len(self.reads):
            return call, True
        return self.reads[call], self.reads[call] not in self.reads[:call]

    def check(self, layer: int, heads: int, width: int) -> None:
        """Raises `ModelError` unless ``layer`` has so many KV heads, with keys and values of this width, as `BlockedKV`
        keeps them."""
        has = self.shapes[layer] if layer < len(self.shapes) else None
        if has != (heads, width, width) or not self.blocked:
            raise ModelError(f"layer {layer} stores KV of {heads} heads x {width}, and its storage is for {has}")

    def capacity(self, rows: int) -> int:
        """Of the smallest storage for so many rows."""
        return max(LEAST_FIXED, 1 << (rows - 1).bit_length()) if self.fixed else -(-rows // BLOCK) * BLOCK

    def first_rows(self, tokens: int, most: int) -> int:
        """Rows to begin with for a text of so many tokens, which may get ``most``. A fixed one has all of them at once:
        recordings belong to a storage."""
        return (most if self.fixed else tokens) + SLACK

    @property
    def row_nbytes(self) -> int:
        """Memory of one row in all layers, in bytes."""
        step = BLOCK if self.blocked else 1
        numbers = sum(heads * (key + -(-value // step) * step) for heads, key, value in self.shapes)
        return numbers * self.dtype.itemsize + self.states * self.width * self.state_dtype.itemsize

    @property
    def keeps(self) -> tuple[str, ...]:
        """See `EngineInfo`."""
        return tuple(name for name, kept in (("rows", self.shapes), ("states", self.recurrences)) if kept)

    @property
    def text_nbytes(self) -> int:
        """Memory of the recurrent states of a text, however long that is, in bytes."""
        return RecurrentStates.nbytes_of(self.recurrences)

    def make(self, rows: int) -> SequenceKV:
        """Storage for a sequence of so many rows; it grows when there are more."""
        return (BlockedKV if self.blocked else SequenceKV)(self, rows)


class SequenceKV:
    """Rows 0..length-1 are committed, one per position. Behind them lie the provisional rows of the current tree.

    Layers of equal shape share one tensor, so that moving rows takes a few calls, not a few per layer.

    Attributes:
        layout: how they are stored.
        length: committed rows.
        shift: what a row's rotary position is more than its number. See `PromptKV`.
        is_private: whether it came of more than the text's tokens, so that no other text may use it.
        states: [states, capacity, width], hidden states of the rows, for drafters that read them.
        recurrent: the recurrent states of the text, of a model that has any.
    """

    def __init__(self, layout: KVLayout, capacity: int) -> None:
        self.length, self.shift, self.is_private = 0, 0, False
        self.recurrent = RecurrentStates(layout.recurrences)
        self._addresses: dict[int, tuple[int, ...]] = {}
        self.layout = layout
        self._capacity = 0
        kinds = [(shape, layer if layout.fixed else 0) for layer, shape in enumerate(layout.shapes)]
        groups = sorted(set(kinds))
        self._where = [(groups.index(kind), kinds[:layer].count(kind)) for layer, kind in enumerate(kinds)]
        self._groups = [(kind[0], kinds.count(kind)) for kind in groups]
        self._keys: list[torch.Tensor] = []  # per group: [layers, heads, capacity, key width]
        self._values: list[torch.Tensor] = []  # per group: [layers, heads, capacity, value width]
        self.states = torch.empty(layout.states, 0, layout.width, dtype=layout.state_dtype, device=layout.device)
        self.reserve(capacity)

    def reserve(self, rows: int) -> None:
        """Makes room for ``rows`` rows, committed and provisional."""
        capacity = self.grown(rows)
        if capacity == self._capacity:
            return
        keys, values = [], []
        for (heads, key_width, value_width), layers in self._groups:
            keys.append(self._empty_keys(layers, heads, capacity, key_width))
            values.append(self._empty_values(layers, heads, capacity, value_width))
        if self._capacity:
            for new, old in zip(keys + values, self._keys + self._values, strict=True):
                new[:, :, : old.shape[2]] = old
        layout = self.layout
        states = zeros(layout.states, capacity, layout.width, dtype=layout.state_dtype, device=layout.device)
        states[:, : self.states.shape[1]] = self.states
        self._keys, self._values, self.states, self._capacity = keys, values, states, capacity
        self._addresses = {}

    def grown(self, rows: int) -> int:
        """The capacity with room for ``rows`` rows: as it is, or half as much again."""
        return self._capacity if rows <= self._capacity else self.layout.capacity(max(rows, self._capacity * 3 // 2))

    def _empty_keys(self, layers: int, heads: int, capacity: int, width: int) -> torch.Tensor:
        return zeros(layers, heads, capacity, width, dtype=self.layout.dtype, device=self.layout.device)

    _empty_values = _empty_keys

    def write(self, layer: int, row: int, keys: torch.Tensor, values: torch.Tensor) -> None:
        """Stores keys [heads, n, width] and values [heads, n, width] of ``layer`` from ``row`` on."""
        group, index = self._where[layer]
        self._keys[group][index, :, row : row + keys.shape[1]] = keys
        self._values[group][index, :, row : row + values.shape[1]] = values

    def layer(self, layer: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys [heads, capacity, width] and values [heads, capacity, width] of ``layer``, as they are stored."""
        group, index = self._where[layer]
        return self._keys[group][index], self._values[group][index]

    def addresses(self, layer: int) -> tuple[int, ...]:
        """Where the keys and the values of ``layer`` lie, and how far from those of the next one that has the same
        shape, in bytes."""
        if layer not in self._addresses:
            group, _ = self._where[layer]
            own, all_layers = self.layer(layer), (self._keys[group], self._values[group])
            steps = [stored.stride(0) * stored.element_size() for stored in all_layers]
            self._addresses[layer] = *(stored.data_ptr() for stored in own), *steps
        return self._addresses[layer]

    @property
    def num_layers(self) -> int:
        return len(self._where)

    def sizes(self, layer: int) -> tuple[int, int, int]:
        """KV heads, key width and value width of ``layer``.

        Raises:
            ModelError: if there is no such layer.
        """
        if not 0 <= layer < self.num_layers:
            raise ModelError(f"a forward attends in layer {layer}, and {self.num_layers} layers are stored")
        return self.layout.shapes[layer]

    @property
    def capacity(self) -> int:
        """Rows that there is room for."""
        return self._capacity

    @property
    def nbytes(self) -> int:
        """Memory of the storage, in bytes."""
        return sum(stored.nbytes for stored in [*self._keys, *self._values, self.states])

    def nbytes_of(self, first: int, end: int) -> int:
        """Memory of the blocks that hold rows ``first`` to ``end`` - 1, in bytes."""
        return self.nbytes * (-(-end // BLOCK) - first // BLOCK) * BLOCK // self._capacity

    def cut(self, first: int, end: int) -> SequenceKV:
        """A copy of the blocks that hold rows ``first`` to ``end`` - 1, in storage of just that room. Row ``first`` is
        row ``first % BLOCK`` of it, and those before have no meaning. It has the same layout, but is never one that a
        recording uses."""
        begin, blocks = first // BLOCK, self._capacity // BLOCK
        whole = -(-end // BLOCK) - begin

        def part(stored: torch.Tensor, dim: int) -> torch.Tensor:
            unit = stored.shape[dim] // blocks  # 1 where a block is one entry, otherwise `BLOCK`
            return cloned(stored.narrow(dim, begin * unit, whole * unit))

        small = copy(self)
        small._keys = [part(stored, 2) for stored in self._keys]
        small._values = [part(stored, 2) for stored in self._values]
        small.states = part(self.states, 1)
        small._capacity, small.length, small._addresses = whole * BLOCK, end - begin * BLOCK, {}
        small.recurrent = RecurrentStates(())
        return small

    def copy_rows(self, other: SequenceKV, rows: int, behind: int = 0) -> None:
        """Commits copies of rows up to ``rows``, from the first one that isn't committed. Row 0 of ``other``, which has
        the same layout, is row ``behind`` here, a multiple of `BLOCK`."""
        self.reserve(rows)
        self._copy(other, self.length, rows, behind)
        self.states[:, self.length : rows] = other.states[:, self.length - behind : rows - behind]
        self.length = rows

    def _copy(self, other: SequenceKV, first: int, end: int, behind: int) -> None:
        """Keys and values of rows ``first`` to ``end`` - 1, as `copy_rows`."""
        for new, old in zip(self._keys + self._values, other._keys + other._values, strict=True):
            new[:, :, first:end] = old[:, :, first - behind : end - behind]

    def commit(self, path: SequenceOf[int]) -> None:
        """Keeps the provisional rows ``path``, in that order, and drops the others."""
        self.keep(path, len(path))

    def keep(self, nodes: SequenceOf[int], committed: int) -> None:
        """Keeps the provisional rows ``nodes``, ascending, and drops the others; the first so many are committed."""
        self.recurrent.keep(self.length, nodes, committed)
        first = next((i for i, node in enumerate(nodes) if i != node), len(nodes))
        if first < len(nodes):
            rows, start = np.array([self.length + node for node in nodes[first:]]), self.length + first
            self._move(rows, start)
            if len(self.states):
                self.states[:, start : start + len(rows)] = self.states[:, rows]
        self.length += committed

    def _move(self, rows: Ints, start: int) -> None:
        """Copies ``rows``, ascending, to where rows ``start`` and on are, which lie before them."""
        index = torch.from_numpy(rows).to(self.layout.device)
        for stored in self._keys + self._values:
            stored[:, :, start : start + len(rows)] = stored.index_select(2, index)


class Storages:
    """Storage for sequences that come and go. Of a fixed layout, what one of them leaves is used again: recordings
    belong to it.

    Args:
        layout: of all.
    """

    def __init__(self, layout: KVLayout) -> None:
        self.layout = layout
        self._spare: list[SequenceKV] = []

    def take(self, rows: int) -> SequenceKV:
        """Empty storage for a sequence of so many rows, and no larger: each forward reads all of a fixed one."""
        for kv in self._spare:
            if kv.capacity == self.layout.capacity(rows):
                self._spare.remove(kv)
                kv.length, kv.shift, kv.is_private = 0, 0, False
                return kv
        return self.layout.make(rows)

    def give(self, unused: list[SequenceKV]) -> None:
        """Takes back what nobody uses."""
        if self.layout.fixed:
            self._spare = [*self._spare, *unused][-SPARE:]


class BlockedKV(SequenceKV):
    """Keys lie as `kernels` want a matrix: per block of `BLOCK` rows, [width, BLOCK]; values are padded with zeros to
    whole blocks of columns. All in float32 on a CPU.

    The storage is, per group, keys [layers, heads, blocks, key width, BLOCK] and values [layers, heads, capacity,
    padded value width].
    """

    def _empty_keys(self, layers: int, heads: int, capacity: int, width: int) -> torch.Tensor:
        return zeros(layers, heads, capacity // BLOCK, width, BLOCK, dtype=torch.float32, device=torch.device("cpu"))

    def _empty_values(self, layers: int, heads: int, capacity: int, width: int) -> torch.Tensor:
        columns = -(-width // BLOCK) * BLOCK
        return zeros(layers, heads, capacity, columns, dtype=torch.float32, device=torch.device("cpu"))

    def write(self, layer: int, row: int, keys: torch.Tensor, values: torch.Tensor) -> None:
        """See `SequenceKV.write`.

        Raises:
            ModelError: if that is not the size of what is stored, or there is no room for it.
        """
        heads, key_width, value_width = self.sizes(layer)
        end = row + keys.shape[1]
        if keys.shape != (heads, end - row, key_width) or values.shape != (heads, end - row, value_width):
            got = f"keys {tuple(keys.shape)} and values {tuple(values.shape)}"
            raise ModelError(f"layer {layer} stores {heads} heads of {key_width} and {value_width}, and got {got}")
        if not 0 <= row <= end <= self._capacity:
            raise ModelError(f"rows {row} to {end} of KV, and there is room for {self._capacity}")
        stored_keys, stored_values = self.layer(layer)
        _write(stored_keys.numpy(), stored_values.numpy(), row, keys.float().numpy(), values.float().numpy())

    def _copy(self, other: SequenceKV, first: int, end: int, behind: int) -> None:
        block, place = divmod(first, BLOCK)
        whole, last, skipped = -(-first // BLOCK), -(-end // BLOCK), behind // BLOCK
        for new, old in zip(self._keys, other._keys, strict=True):
            if place:
                new[:, :, block, :, place:] = old[:, :, block - skipped, :, place:]
            new[:, :, whole:last] = old[:, :, whole - skipped : last - skipped]
        for new, old in zip(self._values, other._values, strict=True):
            new[:, :, first:end] = old[:, :, first - behind : end - behind]

    def _move(self, rows: Ints, start: int) -> None:
        for keys, values in zip(self._keys, self._values, strict=True):
            if not _move(keys.numpy(), values.numpy(), rows, start):
                raise IndexError(f"rows {rows.tolist()} can't be moved to {start} and on, of {self.capacity}")


@njit(cache=True)
def _write(keys: Floats32, values: Floats32, row: int, new_keys: Floats32, new_values: Floats32) -> None:
    heads, count, width = new_keys.shape
    for head in range(heads):
        for i in range(count):
            block, place = (row + i) // BLOCK, (row + i) % BLOCK
            for column in range(width):
                keys[head, block, column, place] = new_keys[head, i, column]
            for column in range(new_values.shape[2]):
                values[head, row + i, column] = new_values[head, i, column]


@njit(cache=True)
def _move(keys: Floats32, values: Floats32, rows: Ints, start: int) -> bool:
    """Whether that can be done: nothing is, if a row lies outside."""
    layers, heads = keys.shape[:2]
    if not 0 <= start <= rows.min() <= rows.max() < values.shape[2]:
        return False
    for layer in range(layers):
        for head in range(heads):
            for i, row in enumerate(rows):
                to, place = keys[layer, head, (start + i) // BLOCK], (start + i) % BLOCK
                copy_into(to[:, place], keys[layer, head, row // BLOCK][:, row % BLOCK])
                copy_into(values[layer, head, start + i], values[layer, head, row])
    return True
