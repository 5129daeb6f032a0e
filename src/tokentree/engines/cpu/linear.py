# numba gives every scalar a type of its own, which annotations can't follow:
# mypy: disable-error-code="no-untyped-def,no-untyped-call,untyped-decorator,attr-defined,call-arg,no-any-return"
"""Linear layers on weights that are packed once."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar

import numba
import numpy as np
import torch
from torch import nn
from torch.nn.functional import pad

from tokentree.engines.cpu.checked import expect, is_count, is_tensor
from tokentree.jit import cfunc
from tokentree.kernels import rowwise as each
from tokentree.kernels.bfloat16 import narrow, widen
from tokentree.kernels.copying import copy_into
from tokentree.kernels.records import record, record_at
from tokentree.kernels.threads import (
    WORKER,
    address,
    address_of,
    claim,
    float32_at,
    int16_at,
    int64_at,
    keep,
    num_threads,
    run,
)
from tokentree.kernels.tile import BFLOAT16_WIDE, BLOCK, CHUNKS, TILE_ROWS, tile_bfloat16

STRETCH = 512  # words of a weight that all rows meet before the next ones, so that these stay in the cache
GATED_ROWS = 16  # that are gated together
X_WORD = 8 if BFLOAT16_WIDE else 4  # bytes of a row's inputs for a word of the weight


STATE = ("weight", "start", "gated", "num_outputs")  # what is kept of a layer


class Product(NamedTuple):
    """What `multiply_bfloat16` is told. Addresses are those of the first number; strides are bytes from row to row."""

    weight: int
    inputs: int
    inputs_stride: int
    start: int  # address of what sums start at
    results: int
    results_stride: int
    words: int  # of a row's inputs: pairs
    blocks: int  # of results
    gated: int  # 1 if blocks of outputs come in pairs, else 0


PRODUCT_BYTES, product_at = record(Product).itemsize, record_at(Product)


class PackedLinear(nn.Module):
    """A linear layer in bfloat16. A row has the same bits beside any others.

    The weight [outputs, inputs] is kept as int32[outputs / BLOCK, inputs / 2, BLOCK]: pairs of inputs' weights, a block
    of outputs behind another.

    Args:
        weight, bias: bfloat16[outputs, inputs], and [outputs] or None.
        gated: blocks of outputs come in pairs, g and u, and the layer gives silu(g) * u: half as many.
    """

    @property
    def num_inputs(self) -> int:
        """Width of its inputs."""
        return 2 * self.weight.shape[1]

    @property
    def width(self) -> int:
        """Of its inputs, with what fills them up."""
        return self.num_inputs

    @property
    def num_results(self) -> int:
        """How many numbers of a row it writes: its outputs, and what fills up a block."""
        return len(self.start) >> self.gated

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None, gated: bool = False) -> None:
        super().__init__()
        self.gated, self.num_outputs = gated, len(weight) >> gated
        self.weight = _blocks(whole(weight.detach()).view(torch.int32))
        self.start = whole(torch.zeros(len(weight), dtype=torch.float32) if bias is None else bias.detach().float())

    @staticmethod
    def fits(weight: torch.Tensor) -> bool:
        """Whether type and sizes suit."""
        return weight.dtype is torch.bfloat16 and not weight.shape[1] % 2

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """``x`` [..., inputs] @ weight.T + bias, summed up in float32 and rounded once.

        Raises:
            ValueError: if ``x`` is not bfloat16, or of another width.
        """
        rows = rows_of(x, self.num_inputs)
        rows = rows.float() if BFLOAT16_WIDE else rows
        y = torch.empty(len(rows), len(self.start) >> self.gated, dtype=torch.bfloat16)
        call = self.call(rows.data_ptr(), rows.stride(0) * rows.element_size(), y.data_ptr())
        run(_bfloat16_worker(), [len(rows), num_threads(), *call])
        return y[:, : self.num_outputs].reshape(*x.shape[:-1], -1)

    def state(self) -> dict[str, Any]:
        """What `of_state` makes a layer of."""
        return {name: getattr(self, name) for name in STATE}

    @classmethod
    def of_state(cls, state: dict[str, Any]) -> PackedLinear:
        """A layer that is kept.

        Raises:
            ModelError: if its parts don't belong together.
        """
        layer, (weight, start, gated, outputs) = restored(cls, state), parts_of(state, STATE)
        expect("a linear layer", is_tensor(weight, torch.int32, None, None, BLOCK), type(gated) is bool)
        expect("a linear layer", weight.shape[1] > 0, holds(start, len(weight), gated, outputs))
        return layer

    def call(self, inputs: int, stride: int, results: int) -> Product:
        """What `multiply_bfloat16` is told, with inputs and results at these addresses; ``stride``: bytes of a row."""
        outputs, words = len(self.start) >> self.gated, self.weight.shape[1]
        weight, start = checked_once(self, lambda: (
            address(self.weight, torch.int32, len(self.start) // BLOCK, words, BLOCK),
            address(self.start, torch.float32, (outputs << self.gated) // BLOCK * BLOCK),
        ))  # fmt: skip
        return Product(
            weight=weight, inputs=inputs, inputs_stride=stride, start=start, results=results,
            results_stride=2 * outputs, words=words, blocks=outputs // BLOCK, gated=int(self.gated),
        )  # fmt: skip


class PackedEmbedding(nn.Module):
    """The rows of a `PackedLinear`'s weight, for a model whose output layer is its embedding."""

    def __init__(self, layer: PackedLinear) -> None:
        super().__init__()
        self.weight, self.num_embeddings = layer.weight, layer.num_outputs

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        """bfloat16[..., width]"""
        return self.weight[ids // BLOCK, :, ids % BLOCK].contiguous().view(torch.bfloat16)


class ScaledEmbedding(nn.Module):
    """An embedding whose rows are multiplied by a number, as Gemma's.

    Args:
        table: of rows as they are.
        scale: bfloat16.
    """

    scale: torch.Tensor

    def __init__(self, table: nn.Embedding | PackedEmbedding, scale: torch.Tensor) -> None:
        super().__init__()
        self.table = table
        self.register_buffer("scale", scale, persistent=False)

    @classmethod
    def of(cls, own: Any) -> ScaledEmbedding:
        """Of one that `fits`; it shares the weight."""
        table = nn.Embedding(own.num_embeddings, own.embedding_dim, device="meta")
        table.weight = own.weight
        return cls(table, own.embed_scale.detach().to(own.weight.dtype))

    @staticmethod
    def fits(own: Any) -> bool:
        """Whether ``own`` is such a module of transformers'."""
        from transformers.models.gemma3.modeling_gemma3 import Gemma3TextScaledWordEmbedding  # takes seconds

        from tokentree.engines.foreign import same_forward

        return (
            isinstance(own, nn.Embedding)
            and own.weight.dtype is torch.bfloat16
            and own.max_norm is None
            and set(own._parameters) == {"weight"}
            and same_forward(own, Gemma3TextScaledWordEmbedding)
        )

    @property
    def num_embeddings(self) -> int:
        return int(self.table.num_embeddings)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        """bfloat16[..., width]"""
        rows: torch.Tensor = self.table(ids)
        return rows * self.scale


class OddLinear(nn.Module):
    """A `PackedLinear` for an odd number of inputs: one more makes them even, a zero whose weights are zeros."""

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None) -> None:
        super().__init__()
        self.even = PackedLinear(pad(weight.detach(), (0, 1)), bias)

    @staticmethod
    def fits(weight: torch.Tensor) -> bool:
        """Whether type and sizes suit."""
        return weight.dtype is torch.bfloat16 and weight.shape[1] % 2 == 1

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.even(pad(x, (0, 1)))
        return out


class OneDNNLinear(nn.Module):
    """A linear layer on oneDNN's own weight layout. A row has the same bits beside any number of rows from 2 on."""

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None) -> None:
        super().__init__()
        self.weight = torch.ops.mkldnn._reorder_linear_weight(weight.detach(), 1)
        self.bias = None if bias is None else bias.detach().clone()

    @staticmethod
    def fits(weight: torch.Tensor) -> bool:
        """Whether this machine's torch can."""
        if weight.device.type != "cpu" or not torch.backends.mkldnn.is_available():
            return False
        bfloat16 = weight.dtype is torch.bfloat16 and torch.ops.mkldnn._is_mkldnn_bf16_supported()
        return weight.dtype is torch.float32 or bfloat16

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.ops.mkldnn._linear_pointwise(x, self.weight, self.bias, "none", [], "")


class ReadableLinear(nn.Linear):
    """A packed layer that still has its weight, for code that reads it, as adapters do."""

    def __init__(self, own: nn.Linear, packed: nn.Module) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features = own.in_features, own.out_features
        self.weight, self.bias, self.packed = own.weight, own.bias, packed

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.packed(x)
        return out


def weights_of(
    layer: nn.Module, ids: torch.Tensor, num_inputs: int, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """The weight [len(ids), inputs] and the bias [len(ids)], or None, of the outputs ``ids`` of a linear layer, however
    it keeps them: it is asked what it makes of ones and zeros."""
    with torch.inference_mode():
        start = layer(torch.zeros(1, num_inputs, dtype=dtype, device=ids.device))[0, ids]
        ones = torch.eye(num_inputs, dtype=dtype, device=ids.device).split(64)
        weight = torch.cat([layer(rows)[:, ids] - start for rows in ones]).t().contiguous()
    return weight.clone(), start.clone() if bool(start.any()) else None


PACKED: tuple[type[PackedLinear | OddLinear | OneDNNLinear], ...] = (PackedLinear, OddLinear, OneDNNLinear)


def packed_linear(weight: torch.Tensor, bias: torch.Tensor | None) -> PackedLinear | OddLinear | OneDNNLinear | None:
    """The fastest layer with weights packed for this CPU that there is for these, if there is any."""
    kind = next((kind for kind in PACKED if weight.device.type == "cpu" and kind.fits(weight)), None)
    return None if kind is None else kind(weight, bias)


def linear_of(weight: torch.Tensor, bias: torch.Tensor | None) -> nn.Module:
    """The fastest linear layer that there is for these."""
    if (packed := packed_linear(weight, bias)) is not None:
        return packed
    layer = nn.Linear(weight.shape[1], len(weight), bias is not None, device="meta")
    layer.weight = nn.Parameter(weight, requires_grad=False)
    if bias is not None:
        layer.bias = nn.Parameter(bias, requires_grad=False)
    return layer


L = TypeVar("L", bound=nn.Module)


def restored(kind: type[L], state: dict[str, Any]) -> L:
    """A layer with these attributes."""
    layer = kind.__new__(kind)
    nn.Module.__init__(layer)
    for name, value in state.items():
        setattr(layer, name, value)
    return layer


def parts_of(state: dict[str, Any], names: tuple[str, ...]) -> list[Any]:
    """What is kept under these names, and under no others."""
    expect("a linear layer", isinstance(state, dict), set(state) == set(names))
    return [state[name] for name in names]


def holds(start: Any, blocks: int, gated: bool, outputs: Any) -> bool:
    """Whether so many blocks hold so many outputs of a layer, whose sums start at ``start``."""
    results = blocks // 2 if gated else blocks
    return (
        is_tensor(start, torch.float32, blocks * BLOCK)
        and blocks == results << gated
        and is_count(outputs)
        and (results - 1) * BLOCK < outputs <= results * BLOCK
        and (not gated or outputs == results * BLOCK)
    )


def outputs_from(layer: L, first: int) -> L:
    """The packed ``layer`` of its outputs from ``first`` on, a multiple of `BLOCK`, in the same memory."""
    own: Any = layer
    parts = {"weight": own.weight[first // BLOCK :], "start": own.start[first:], "num_outputs": own.num_outputs - first}
    made: L = type(own).of_state(own.state() | parts)
    return made


def checked_once(layer: Any, look: Callable[[], tuple[int, int]]) -> tuple[int, int]:
    """The addresses of a layer's weight and start, which ``look`` gives and checks, as long as it has the same ones."""
    weight, start = layer.weight, layer.start
    known: Any = layer.__dict__.get("_checked")
    if known is None or known[0] is not weight or known[1] is not start or known[2] != (
        weight.data_ptr(), start.data_ptr()
    ):  # fmt: skip
        known = layer.__dict__["_checked"] = weight, start, look()
    found: tuple[int, int] = known[2]
    return found


def whole(values: torch.Tensor) -> torch.Tensor:
    """``values``, with zeros behind them that fill up a block of outputs."""
    missing = -len(values) % BLOCK
    return torch.cat([values, values.new_zeros(missing, *values.shape[1:])]) if missing else values.contiguous()


def _blocks(words: torch.Tensor) -> torch.Tensor:
    """int32[outputs / BLOCK, steps, BLOCK] of int32[outputs, steps]."""
    return words.view(-1, BLOCK, words.shape[1]).transpose(1, 2).contiguous()


def rows_of(x: torch.Tensor, inputs: int) -> torch.Tensor:
    if x.shape[-1] != inputs or x.dtype is not torch.bfloat16:
        raise ValueError(f"a layer for bfloat16 rows of {inputs} inputs got {x.dtype} {tuple(x.shape)}")
    return x.reshape(-1, inputs).contiguous()


# -- the loops, compiled when first asked for --------------------------------------------------------------------------


@functools.cache
def _bfloat16_worker() -> Any:
    @cfunc(WORKER, cache=True)
    def worker(arguments):
        rows, threads = int64_at(address_of(arguments), 2)
        call = address_of(arguments) + 16
        multiply_bfloat16(product_at(call), rows, threads, call + PRODUCT_BYTES)

    return worker


@numba.njit
def multiply_bfloat16(product, rows, threads, counter):
    """One thread's part of a `Product`. The threads take shares of the result's blocks, as ``counter`` tells."""
    weights, start, steps, blocks, gated = product.weight, product.start, product.words, product.blocks, product.gated
    x, x_stride, y, y_stride = product.inputs, product.inputs_stride, product.results, product.results_stride
    sums = np.empty((1 + gated, rows, BLOCK), np.float32)
    share = max(1, blocks // (CHUNKS * threads))
    while True:
        first = claim(counter) * share
        if first >= blocks:
            break
        for block in range(first, min(first + share, blocks)):
            for part in range(1 + gated):
                source = (1 + gated) * block + part
                for row in range(rows):
                    copy_into(sums[part, row], float32_at(start + 4 * BLOCK * source, BLOCK))
                for begin in range(0, steps, STRETCH):
                    matrix, count = weights + (source * steps + begin) * 4 * BLOCK, min(STRETCH, steps - begin)
                    done = 0
                    while done < rows:
                        more, place = pass_of(rows - done), sums[part, done].ctypes.data
                        inputs = x + done * x_stride + begin * X_WORD
                        tile_bfloat16(
                            more, count, matrix, 4 * BLOCK, inputs, x_stride, place, 4 * BLOCK, place, 4 * BLOCK
                        )  # fmt: skip
                        done += more
            store_rows(sums, y + block * 2 * BLOCK, y_stride)
    keep(sums)


@numba.njit
def pass_of(rows):
    """How many of the rows that are left to take in one pass: as many in each as can be."""
    passes = -(-rows // TILE_ROWS)
    return -(-rows // passes)


@numba.njit
def store_rows(sums, y, y_stride):
    """Writes ``sums`` float32[1, rows, BLOCK], rounded to bfloat16; or, of float32[2, rows, BLOCK], silu(g) * u, each
    step rounded, of several rows at a time: short loops take longer than their numbers do."""
    rows = sums.shape[1]
    if len(sums) == 1:
        for row in range(rows):
            narrow(sums[0, row], int16_at(y + row * y_stride, BLOCK))
        return
    size = min(rows, GATED_ROWS) * BLOCK
    scratch, rounded = np.empty(size, np.float32), np.empty(size, np.int16)
    for first in range(0, rows * BLOCK, size):
        count, place = min(size, rows * BLOCK - first), sums.ctypes.data + 4 * first
        g, u, bits = float32_at(place, count), float32_at(place + 4 * rows * BLOCK, count), rounded[:count]
        narrow(g, bits)
        widen(bits, g)
        narrow(u, bits)
        widen(bits, u)
        each.swiglu(g, u, scratch[:count], bits)
        for begin in range(0, count, BLOCK):
            result = int16_at(y + (first + begin) // BLOCK * y_stride, BLOCK)
            for i in range(BLOCK):
                result[i] = bits[begin + i]
