"""The KV of one sequence, in storage allocated ahead."""

from __future__ import annotations

from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass

import torch

BLOCK = 64  # positions; attention reduces over whole blocks, and storage comes in whole blocks


@dataclass(frozen=True)
class KVLayout:
    """How the rows of every layer are stored.

    Args:
        shapes: per layer, (KV heads, key width, value width).
        dtype, device: of the storage.
        ones: constant columns of ones behind each value row; a product with them sums the attention weights.
    """

    shapes: tuple[tuple[int, int, int], ...]
    dtype: torch.dtype
    device: torch.device
    ones: int = 0


class SequenceKV:
    """Rows 0..length-1 are committed, one per position. Behind them lie the provisional rows of the current tree.

    Layers of equal shape share one tensor, so that moving rows takes a few calls, not a few per layer.
    """

    def __init__(self, layout: KVLayout, capacity: int) -> None:
        self.length = 0
        self._layout = layout
        self._capacity = 0
        groups = sorted(set(layout.shapes))
        self._where = [(groups.index(shape), layout.shapes[:i].count(shape)) for i, shape in enumerate(layout.shapes)]
        self._groups = [(shape, layout.shapes.count(shape)) for shape in groups]
        self._keys: list[torch.Tensor] = []  # per group: [layers, heads, capacity, key width]
        self._values: list[torch.Tensor] = []  # per group: [layers, heads, capacity, value width + ones]
        self.reserve(capacity)

    def reserve(self, rows: int) -> None:
        """Makes room for ``rows`` rows, committed and provisional."""
        if rows <= self._capacity:
            return
        capacity = -(-max(rows, self._capacity * 3 // 2) // BLOCK) * BLOCK
        dtype, device, ones = self._layout.dtype, self._layout.device, self._layout.ones
        keys, values = [], []
        for (heads, key_width, value_width), layers in self._groups:
            keys.append(torch.zeros(layers, heads, capacity, key_width, dtype=dtype, device=device))
            values.append(torch.zeros(layers, heads, capacity, value_width + ones, dtype=dtype, device=device))
            values[-1][..., value_width:] = 1
        for new, old in zip(keys + values, self._keys + self._values, strict=False):
            new[:, :, : self._capacity] = old
        self._keys, self._values, self._capacity = keys, values, capacity

    def write(self, layer: int, row: int, keys: torch.Tensor, values: torch.Tensor) -> None:
        """Stores keys [heads, n, width] and values [heads, n, width] of ``layer`` from ``row`` on."""
        group, index = self._where[layer]
        self._keys[group][index, :, row : row + keys.shape[1]] = keys
        self._values[group][index, :, row : row + values.shape[1], : values.shape[2]] = values

    def layer(self, layer: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys [heads, capacity, width] and values [heads, capacity, width + ones] of ``layer``."""
        group, index = self._where[layer]
        return self._keys[group][index], self._values[group][index]

    def commit(self, path: SequenceOf[int]) -> None:
        """Keeps the provisional rows ``path``, in that order, and drops the others."""
        first = next((i for i, node in enumerate(path) if i != node), len(path))
        if first < len(path):
            rows = torch.tensor([self.length + node for node in path[first:]], device=self._layout.device)
            start, end = self.length + first, self.length + len(path)
            for stored in self._keys + self._values:
                stored[:, :, start:end] = stored.index_select(2, rows)
        self.length += len(path)
