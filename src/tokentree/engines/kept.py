"""Packed weights are kept in a file, which is mapped into memory the next time, so that nothing is packed again."""

from __future__ import annotations

import contextlib
import logging
import os
import pickle
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import nn

from tokentree.engines.kernels import BFLOAT16_WIDE, LANES
from tokentree.engines.linear import PackedLinear
from tokentree.engines.packing import Packing
from tokentree.engines.quantized import QuantizedLinear
from tokentree.engines.quants import WIDE

logger = logging.getLogger(__name__)
VERSION = 3  # of the layouts of packed layers


@dataclass(frozen=True)
class Place:
    """Where the packed weights of a model are kept.

    Args:
        file: in which.
        source: what they were made from; a file that was made from something else is not read.
    """

    file: Path
    source: str


class KeptPacking(Packing):
    """Packs layers as another packing does, once.

    Args:
        kind: of packed layers.
        make: gives that other packing, if it is needed.
        model: whose layers are packed.
        place: where they are kept. A file that can't be written is no error.
    """

    def __init__(
        self, kind: type[PackedLinear] | type[QuantizedLinear], make: Callable[[], Packing], model: nn.Module,
        place: Place,
    ) -> None:  # fmt: skip
        super().__init__(kind)
        self._make, self._place = make, place
        self._own: Packing | None = None
        self._names = {id(module): name for name, module in model.named_modules()}
        self._about = _about(place, next(model.parameters()).dtype)
        self._known, self._complete = _read(place.file, self._about), True

    def pack(self, *layers: nn.Linear, gated: bool = False) -> PackedLinear | QuantizedLinear:
        name = ", ".join(self._names.get(id(layer), "") for layer in layers)
        if name in self._known:
            return self._kind.of_state(self._known[name])
        if self._own is None:
            logger.info("packing weights (once)")
            self._own = self._make()
        packed = self._own.pack(*layers, gated=gated)
        if all(id(layer) in self._names for layer in layers):
            self._known[name], self._complete = packed.state(), False
        return packed

    def recall(self, name: str, make: Callable[[], dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
        if name not in self._known:
            self._known[name], self._complete = make(), False
        return self._known[name]

    def remember(self, name: str, make: Callable[[], dict[str, Any] | None]) -> None:
        if (made := make()) is not None:
            self._known[name], self._complete = made, False

    def keep(self) -> None:
        if self._complete:
            return
        part = self._place.file.with_suffix(f".{os.getpid()}.part")
        try:
            part.parent.mkdir(parents=True, exist_ok=True)
            torch.save({"about": self._about, "layers": self._known}, part)
            part.replace(self._place.file)
        except (OSError, RuntimeError) as error:  # torch's, where a disk is full
            warnings.warn(f"packed weights aren't kept: {error}", stacklevel=2)
            with contextlib.suppress(OSError):
                part.unlink()


def kept(place: Place, dtype: torch.dtype) -> dict[str, dict[str, Any]]:
    """What is kept there of a model whose weights came in this type, by name: nothing if the file isn't there, is
    spoilt, or is about something else."""
    return _read(place.file, _about(place, dtype))


def _about(place: Place, dtype: torch.dtype) -> list[Any]:
    return [VERSION, LANES, BFLOAT16_WIDE, WIDE, version("transformers"), str(dtype), place.source]


def _read(file: Path, about: list[Any]) -> dict[str, dict[str, Any]]:
    try:
        found = torch.load(file, mmap=True, weights_only=True)
        layers: dict[str, dict[str, Any]] = found["layers"] if found["about"] == about else {}
    except (OSError, RuntimeError, ValueError, KeyError, TypeError, EOFError, pickle.UnpicklingError):
        return {}
    return layers
