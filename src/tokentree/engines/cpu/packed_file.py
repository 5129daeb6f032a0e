"""Packed weights are kept in a file, which is mapped into memory the next time, so that nothing is packed again."""

from __future__ import annotations

import logging
import os
import pickle
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import nn

from tokentree.cache import DIGEST, damaged, intact, outdated, private, replacing, seal, unkept
from tokentree.engines.cpu.checked import expect
from tokentree.engines.cpu.linear import PackedLinear
from tokentree.engines.cpu.packing import Packing
from tokentree.engines.cpu.quantized import QuantizedLinear
from tokentree.engines.self_check import ATTENDED, OWN, attended_before, said_before
from tokentree.errors import ModelError
from tokentree.kernels.tile import BFLOAT16_WIDE, LANES
from tokentree.kernels.tile_quantized import WIDE

logger = logging.getLogger(__name__)
VERSION = 10  # of the layouts of packed layers, and of the facts beside them


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
        if name in self._known and (found := self._found(name, layers, gated)) is not None:
            return found
        if self._own is None:
            logger.info("packing weights (once)")
            self._own = self._make()
        packed = self._own.pack(*layers, gated=gated)
        if all(id(layer) in self._names for layer in layers):
            self._known[name], self._complete = packed.state(), False
        return packed

    def _found(
        self, name: str, layers: tuple[nn.Linear, ...], gated: bool
    ) -> PackedLinear | QuantizedLinear | None:  # fmt: skip
        """What is kept under that name, if it is made of these layers."""
        sizes = layers[0].in_features, sum(layer.out_features for layer in layers) >> gated, gated
        try:
            found = self._kind.of_state(self._known[name])
            expect("a linear layer", (found.num_inputs, found.num_outputs, found.gated) == sizes)
        except ModelError:
            damaged(self._place.file)
            return None
        return found

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
        try:
            private(self._place.file.parent)
            with replacing(self._place.file) as part:
                torch.save({"about": self._about, "layers": self._known}, part)
                with part.open("rb+") as archive:  # its digest is the comment of an archive, whose length it ends with
                    archive.seek(-2, os.SEEK_END)
                    archive.write(DIGEST.to_bytes(2, "little"))
                seal(part)
        except (OSError, RuntimeError) as error:  # torch's, where a disk is full
            unkept("packed weights aren't", self._place.file.parent, error)


def kept(place: Place, dtype: torch.dtype) -> dict[str, dict[str, Any]]:
    """What is kept there of a model whose weights came in this type, by name: nothing if the file isn't there, is
    spoilt, or is about something else."""
    return _read(place.file, _about(place, dtype))


def _about(place: Place, dtype: torch.dtype) -> list[Any]:
    return [VERSION, LANES, BFLOAT16_WIDE, WIDE, version("transformers"), str(dtype), place.source]


def _unsealed(file: Path) -> bool:
    """Whether it is an archive without a digest, as versions before the fourth wrote them."""
    try:
        with file.open("rb") as archive:
            archive.seek(max(0, file.stat().st_size - 22))
            end = archive.read()
    except OSError:
        return False
    return end.startswith(b"PK\5\6") and end.endswith(b"\0\0")


def _read(file: Path, about: list[Any]) -> dict[str, dict[str, Any]]:
    if _unsealed(file):
        outdated(file)
        return {}
    if not intact(file):
        return {}
    try:
        found = torch.load(file, mmap=True, weights_only=True)
        if found["about"][0] != VERSION:
            outdated(file)
            return {}
        layers: dict[str, dict[str, Any]] = found["layers"] if found["about"] == about else {}
        known = isinstance(layers, dict) and (OWN not in layers or said_before(layers[OWN]))
        known = known and (ATTENDED not in layers or attended_before(layers[ATTENDED]))
        expect("a model", known, all(type(name) is str for name in layers))
    except (OSError, RuntimeError, ValueError, LookupError, TypeError, EOFError, pickle.UnpicklingError):
        damaged(file)  # ModelError is a ValueError
        return {}
    return layers
