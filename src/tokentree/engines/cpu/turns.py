"""Rotary positions of a forward's rows, computed once for each position."""

from __future__ import annotations

from collections.abc import Sequence as SequenceOf
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import nn

from tokentree.tree import Ints

NOTHING = np.empty(0, np.int64)


class Turns(NamedTuple):
    """Rotary positions of the rows of a forward.

    Args:
        tables: cosines and sines, bfloat16[positions, width] each, for each of a model's rotaries.
        addresses: int64[tables, 2], where these begin.
        at: where the addresses lie.
        positions: that there are cosines and sines of.
        places: int64[rows], which of them are those of the rows.
    """

    tables: tuple[tuple[torch.Tensor, torch.Tensor], ...]
    addresses: Ints
    at: int
    positions: int
    places: Ints

    def of(self, rows: int) -> Turns:
        """Those of the first rows."""
        return self._replace(places=self.places[:rows])


class RotaryTables:
    """Tables of cosines and sines, which grow with the texts.

    Args:
        rotaries: a transformers model's own modules, or such as do the same.
    """

    def __init__(self, rotaries: SequenceOf[nn.Module]) -> None:
        self._rotaries, self._fixed = list(rotaries), all(map(fixed, rotaries))
        self._known = Turns((), NOTHING, 0, 0, NOTHING)

    def at(self, positions: Ints, end: int) -> Turns:
        """Of rows at ``positions`` int64[rows], all below ``end``."""
        if not self._fixed:
            return self._computed(torch.from_numpy(positions))._replace(places=np.arange(len(positions)))
        if end > self._known.positions:
            self._known = self._computed(torch.arange(max(1024, 1 << (end - 1).bit_length())))
        tables, addresses, at, known, _ = self._known
        return Turns(tables, addresses, at, known, positions)

    def _computed(self, positions: torch.Tensor) -> Turns:
        """Tables of these positions, and no rows."""
        like = torch.empty(0, dtype=torch.bfloat16)
        made = tuple(
            (cos[0].contiguous(), sin[0].contiguous())
            for cos, sin in (rotary(like, positions[None]) for rotary in self._rotaries)
        )
        addresses = np.array([[cos.data_ptr(), sin.data_ptr()] for cos, sin in made], np.int64)
        return Turns(made, addresses, addresses.ctypes.data, len(positions), NOTHING)


def fixed(rotary: nn.Module) -> bool:
    """Whether positions turn alike in texts of any length, by a module that has one kind of them."""
    own: Any = rotary
    kind = getattr(own, "rope_type", None)
    if kind == "longrope":
        rope = own.config.rope_parameters
        return bool(rope["short_factor"] == rope["long_factor"])
    return kind != "dynamic"
