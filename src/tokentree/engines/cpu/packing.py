"""How linear layers become packed ones: as they are, in 8 bits, or in the bits that a GGUF file has them in."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeGuard

import numpy as np
import torch
from torch import nn

from tokentree.engines.cpu.linear import PackedLinear
from tokentree.engines.cpu.quantized import Groups, QuantizedLinear
from tokentree.errors import ModelError
from tokentree.gguf.header import GgufError, read_header
from tokentree.kernels.tile import BLOCK

IN_GGUF = 32  # inputs that share a scale in most of GGUF's types


class Packing:
    """Packs layers by the weights that they have."""

    def __init__(self, kind: type[PackedLinear] | type[QuantizedLinear]) -> None:
        self._kind = kind

    def fits(self, *layers: nn.Module) -> bool:
        """Whether these are nothing but linear layers, of a type that suits."""
        return all(
            type(layer) is nn.Linear and is_plain(layer.weight) and self._kind.fits(layer.weight) for layer in layers
        )

    def pack(self, *layers: nn.Linear, gated: bool = False) -> PackedLinear | QuantizedLinear:
        """One layer for all of them, their outputs behind one another; or ``gated``, of two: see `PackedLinear`."""
        return self._kind(joined([layer.weight for layer in layers], gated), joined_biases(layers, gated), gated)

    def pack_halves(self, layer: nn.Linear) -> PackedLinear | QuantizedLinear:
        """A layer without biases, of which the first half of the outputs gates the second: see `PackedLinear`."""
        return self._kind(joined([*layer.weight.detach().chunk(2)], True), None, True)

    def recall(self, name: str, make: Callable[[], dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
        """What ``make`` gives, or gave when weights that are kept were packed."""
        return make()

    def remember(self, name: str, make: Callable[[], dict[str, Any] | None]) -> None:
        """Keeps what ``make`` gives, where weights are kept, instead of what is there under that name."""

    def keep(self) -> None:
        """All layers are packed now: see `kept`."""


def is_plain(weight: object) -> TypeGuard[nn.Parameter]:
    """Whether these are numbers as torch has them, and not as another library keeps them in a tensor of its own."""
    return type(weight) is nn.Parameter and type(weight.data) is torch.Tensor


class GgufPacking(Packing):
    """Packs layers in the bits that a GGUF file has them in: what it has in 4 stays as it is, and all else is kept in
    8, exactly where the file has that so. Scales are rounded to float16, and inputs get 8 bits: lossy against the
    file's weights in bfloat16.

    Args:
        file: the file that ``model`` was loaded from.

    Raises:
        ModelError: if the file can't be read, or is of another architecture.
    """

    def __init__(self, model: nn.Module, file: Path) -> None:
        super().__init__(QuantizedLinear)
        import gguf

        config: Any = model.config
        try:
            self._header = read_header(file)
            architecture = self._header.entries["general.architecture"]
            known = {name: arch for arch, name in gguf.MODEL_ARCH_NAMES.items()}
            names = gguf.get_tensor_name_map(known[architecture], config.num_hidden_layers)
        except (GgufError, KeyError, TypeError) as error:
            raise ModelError(f"can't read the GGUF file {str(file)!r}: {error}") from None
        self._names = {id(module): names.get_name(name) for name, module in model.named_modules()}
        self._turned = dict[str, int]()
        if architecture in ("llama", "granite"):
            self._turned = {"attn_q": config.num_attention_heads, "attn_k": config.num_key_value_heads}

    def pack(self, *layers: nn.Linear, gated: bool = False) -> QuantizedLinear:
        parts = [self._groups(layer) for layer in layers]
        weight = Groups(
            joined([part.numbers for part in parts], gated), joined([part.scales for part in parts], gated),
            joined([part.least for part in parts], gated), max(part.bits for part in parts),
        )  # fmt: skip
        return QuantizedLinear(weight, joined_biases(layers, gated), gated, layers[0].in_features)

    def _groups(self, layer: nn.Linear) -> Groups:
        name, tensors = self._names.get(id(layer)), self._header.tensors
        tensor = tensors.get(f"{name}.weight") or tensors.get("token_embd.weight" if name == "output" else "")
        if tensor is None or tensor.shape != (layer.out_features, layer.in_features):
            return Groups.of(layer.weight, IN_GGUF)
        found = _read(self._header.raw(tensor))
        heads = next((count for part, count in self._turned.items() if f".{part}" in f".{name}"), None)
        if heads is None:
            return found
        # llama.cpp has the two halves of a head that are turned together side by side
        numbers, scales, least = (
            part.unflatten(0, (heads, -1, 2)).transpose(1, 2).flatten(0, 2) for part in found.tensors
        )
        return Groups(numbers, scales, least, found.bits)


def _read(tensor: Any) -> Groups:
    """A GGUF tensor as groups of `IN_GGUF` inputs; the layout of its blocks is that of ggml's ``ggml-common.h``."""
    import gguf

    kind = gguf.GGMLQuantizationType
    readers: dict[Any, tuple[Callable[[np.ndarray], tuple[np.ndarray, ...]], int]] = {
        kind.Q4_0: (_q4_0, 4), kind.Q4_1: (_q4_1, 4), kind.Q4_K: (_q4_k, 4), kind.Q8_0: (_q8_0, 8),
    }  # fmt: skip
    if tensor.tensor_type not in readers:
        values = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
        return Groups.of(torch.from_numpy(np.array(values, np.float32)), IN_GGUF)
    read, bits = readers[tensor.tensor_type]
    outputs, (_, size) = len(tensor.data), gguf.GGML_QUANT_SIZES[tensor.tensor_type]
    numbers, scales, least = read(np.ascontiguousarray(tensor.data).reshape(-1, size))
    halves = [torch.from_numpy(part.astype(np.float16).reshape(outputs, -1)) for part in (scales, least)]
    return Groups(torch.from_numpy(numbers.reshape(outputs, -1, IN_GGUF)), halves[0], halves[1], bits)


def _q4_0(blocks: np.ndarray) -> tuple[np.ndarray, ...]:
    scales = blocks[:, :2].view(np.float16).astype(np.float32)
    return _nibbles(blocks[:, 2:]), scales, -8 * scales


def _q4_1(blocks: np.ndarray) -> tuple[np.ndarray, ...]:
    return _nibbles(blocks[:, 4:]), blocks[:, :2].view(np.float16), blocks[:, 2:4].view(np.float16)


def _q8_0(blocks: np.ndarray) -> tuple[np.ndarray, ...]:
    scales = blocks[:, :2].view(np.float16).astype(np.float32)
    return blocks[:, 2:] + np.uint8(128), scales, -128 * scales


def _q4_k(blocks: np.ndarray) -> tuple[np.ndarray, ...]:
    """256 numbers: 8 groups, whose scales and least values have 6 bits, and a scale of their own each."""
    scale, least = (blocks[:, at : at + 2].view(np.float16).astype(np.float32) for at in (0, 2))
    six, numbers = blocks[:, 4:16].reshape(-1, 3, 4), blocks[:, 16:].reshape(-1, 4, 32)
    low, high = six[:, :2] & 63, (six[:, :2] >> 6) << 4
    scales = np.concatenate([low[:, 0], (six[:, 2] & 15) | high[:, 0]], 1)
    leasts = np.concatenate([low[:, 1], (six[:, 2] >> 4) | high[:, 1]], 1)
    pairs = np.stack([numbers & 15, numbers >> 4], 2)  # [blocks, 4, 2, 32]
    return pairs, scale * scales, -least * leasts


def _nibbles(packed: np.ndarray) -> np.ndarray:
    return np.concatenate([packed & 15, packed >> 4], 1)


def joined(parts: Sequence[torch.Tensor], gated: bool) -> torch.Tensor:
    """Behind one another; or ``gated``, of two: a block of outputs of the first, one of the second, and so on."""
    if gated:
        return torch.stack([part.unflatten(0, (-1, BLOCK)) for part in parts], 1).flatten(0, 2)
    return torch.cat(list(parts)) if len(parts) > 1 else parts[0]


def joined_biases(layers: tuple[nn.Linear, ...], gated: bool) -> torch.Tensor | None:
    biases = [layer.bias for layer in layers if layer.bias is not None]
    return joined(biases, gated) if biases else None
