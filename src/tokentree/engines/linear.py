# numba gives every scalar a type of its own, which annotations can't follow:
# mypy: disable-error-code="no-untyped-def,no-untyped-call,untyped-decorator,attr-defined,call-arg,no-any-return"
"""Linear layers on weights that are packed once: as they are, or quantised to 8 bits."""

from __future__ import annotations

import functools
from typing import Any

import numba
import numpy as np
import torch
from torch import nn

from tokentree.engines import rows as each
from tokentree.engines.kernels import BFLOAT16_WIDE, BLOCK, CHUNKS, INT8_WIDE, TILE_ROWS, tile_bfloat16, tile_int8
from tokentree.engines.numbers import narrow, widen
from tokentree.threads import WORKER, address_of, claim, floats, halves, integers, run

QUANTIZED_ROWS = 8192  # of a weight, quantised at a time
INT8_INPUTS = torch.int16 if INT8_WIDE else torch.uint8
BFLOAT16_CALL, INT8_CALL = 9, 12  # integers that describe a product


class PackedLinear(nn.Module):
    """A linear layer in bfloat16. A row has the same bits beside any others.

    The weight [outputs, inputs] is kept as int32[outputs / BLOCK, inputs / 2, BLOCK]: pairs of inputs' weights, a block
    of outputs behind another.

    Args:
        weight, bias: bfloat16[outputs, inputs], and [outputs] or None.
        gated: blocks of outputs come in pairs, g and u (`paired`), and the layer gives silu(g) * u: half as many.
    """

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None, gated: bool = False) -> None:
        super().__init__()
        self.gated = gated
        self.weight = _blocks(weight.detach().contiguous().view(torch.int32))
        self.start = torch.zeros(len(weight)) if bias is None else bias.detach().float()

    @property
    def num_outputs(self) -> int:
        return len(self.start) >> self.gated

    @staticmethod
    def fits(weight: torch.Tensor) -> bool:
        """Whether type and sizes suit."""
        return _suits(weight, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """``x`` [..., inputs] @ weight.T + bias, summed up in float32 and rounded once.

        Raises:
            ValueError: if ``x`` is not bfloat16, or of another width.
        """
        rows = _rows(x, 2 * self.weight.shape[1])
        rows = rows.float() if BFLOAT16_WIDE else rows
        y = torch.empty(len(rows), self.num_outputs, dtype=torch.bfloat16)
        run(_bfloat16_worker(), _call(rows, self.weight, self.start, y, self.gated))
        return y.view(*x.shape[:-1], -1)


class PackedEmbedding(nn.Module):
    """The rows of a `PackedLinear`'s weight, for a model whose output layer is its embedding."""

    def __init__(self, layer: PackedLinear) -> None:
        super().__init__()
        self.weight, self.num_embeddings = layer.weight, len(layer.start)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        """bfloat16[..., width]"""
        return self.weight[ids // BLOCK, :, ids % BLOCK].contiguous().view(torch.bfloat16)


class Int8Linear(nn.Module):
    """A linear layer in 8 bits: weights with a scale for each output, inputs with a scale for each row, taken when they
    come; both symmetric. Sums are exact integers. A row has the same bits beside any others.

    The weight is kept as int32[outputs / BLOCK, inputs / 4, BLOCK], four inputs' weights in each, in the order that
    `kernels` wants.

    Args:
        weight, bias, gated: as for `PackedLinear`.
    """

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None, gated: bool = False) -> None:
        super().__init__()
        self.gated = gated
        self.scales = weight.detach().abs().amax(1).float().clamp(min=1e-12) / 127
        parts = zip(weight.detach().split(QUANTIZED_ROWS), self.scales.split(QUANTIZED_ROWS), strict=True)
        quantized = torch.cat([(part.float() / scale[:, None]).round().to(torch.int8) for part, scale in parts])
        fours = quantized.unflatten(1, (-1, 4))[..., [0, 2, 1, 3]].flatten(1) if INT8_WIDE else quantized
        self.weight = _blocks(fours.view(torch.int32))
        # inputs get 128 added, so that they have no sign; this takes it off again
        self.start = quantized.sum(1, dtype=torch.int32) * -128
        self.bias = torch.zeros(len(weight)) if bias is None else bias.detach().float()

    @property
    def num_outputs(self) -> int:
        return len(self.start) >> self.gated

    @staticmethod
    def fits(weight: torch.Tensor) -> bool:
        """Whether type and sizes suit."""
        return _suits(weight, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """``x`` [..., inputs] @ weight.T + bias.

        Raises:
            ValueError: if ``x`` is not bfloat16, or of another width.
        """
        rows = _rows(x, 4 * self.weight.shape[1])
        quantized, scales = torch.empty(rows.shape, dtype=INT8_INPUTS), torch.empty(len(rows))
        _quantize(rows.view(torch.int16).numpy(), quantized.numpy(), scales.numpy())
        y = torch.empty(len(rows), self.num_outputs, dtype=torch.bfloat16)
        more = (scales.data_ptr(), self.scales.data_ptr(), self.bias.data_ptr())
        run(_int8_worker(), [*_call(quantized, self.weight, self.start, y, self.gated), *more])
        return y.view(*x.shape[:-1], -1)


class OneDNNLinear(nn.Module):
    """A linear layer on oneDNN's own weight layout. A row has the same bits beside any number of rows from 2 on."""

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None) -> None:
        super().__init__()
        self.weight = torch.ops.mkldnn._reorder_linear_weight(weight.detach(), 1)
        self.bias = None if bias is None else bias.detach()

    @staticmethod
    def fits(weight: torch.Tensor) -> bool:
        """Whether this machine's torch can."""
        if weight.device.type != "cpu" or not torch.backends.mkldnn.is_available():
            return False
        bfloat16 = weight.dtype is torch.bfloat16 and torch.ops.mkldnn._is_mkldnn_bf16_supported()
        return weight.dtype is torch.float32 or bfloat16

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.ops.mkldnn._linear_pointwise(x, self.weight, self.bias, "none", [], "")


def _suits(weight: torch.Tensor, inputs_per_word: int) -> bool:
    outputs, inputs = weight.shape
    return weight.dtype is torch.bfloat16 and not outputs % BLOCK and not inputs % inputs_per_word


def paired(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    """Both weights, or biases, of a gated layer as one: a block of ``gate``'s outputs, one of ``up``'s, and so on."""
    parts = torch.stack([gate.unflatten(0, (-1, BLOCK)), up.unflatten(0, (-1, BLOCK))], 1)
    return parts.flatten(0, 2)


def _blocks(words: torch.Tensor) -> torch.Tensor:
    """int32[outputs / BLOCK, steps, BLOCK] of int32[outputs, steps]."""
    return words.view(-1, BLOCK, words.shape[1]).transpose(1, 2).contiguous()


def _rows(x: torch.Tensor, inputs: int) -> torch.Tensor:
    if x.shape[-1] != inputs or x.dtype is not torch.bfloat16:
        raise ValueError(f"a layer for bfloat16 rows of {inputs} inputs got {x.dtype} {tuple(x.shape)}")
    return x.reshape(-1, inputs).contiguous()


def _call(x: torch.Tensor, weight: torch.Tensor, start: torch.Tensor, y: torch.Tensor, gated: bool) -> list[int]:
    """What both workers below are told: rows and threads, then what `multiply_bfloat16` is."""
    return [
        len(x), torch.get_num_threads(), weight.data_ptr(), x.data_ptr(), x.stride(0) * x.element_size(),
        start.data_ptr(), y.data_ptr(), y.stride(0) * y.element_size(), weight.shape[1], y.shape[1] // BLOCK, gated,
    ]  # fmt: skip


# -- the loops, compiled when first asked for, as not every CPU has the instructions -----------------------------------


@functools.cache
def _bfloat16_worker() -> Any:
    @numba.cfunc(WORKER, cache=True)
    def worker(arguments):
        call = integers(address_of(arguments), 2 + BFLOAT16_CALL)
        multiply_bfloat16(call[2:], call[0], call[1], address_of(arguments) + 8 * len(call))

    return worker


@functools.cache
def _int8_worker() -> Any:
    @numba.cfunc(WORKER, cache=True)
    def worker(arguments):
        call = integers(address_of(arguments), 2 + INT8_CALL)
        multiply_int8(call[2:], call[0], call[1], address_of(arguments) + 8 * len(call))

    return worker


@numba.njit
def multiply_bfloat16(call, rows, threads, counter):
    """One thread's part of a product. The threads take shares of the result's blocks, as ``counter`` tells.

    ``call`` has addresses and strides in bytes of the weight, of the inputs, of what sums start at, of the results;
    words of inputs, blocks of results, and whether they are gated.
    """
    weights, x, x_stride, start, y, y_stride, steps, blocks, gated = call[:BFLOAT16_CALL]
    pair = np.empty((2, TILE_ROWS, BLOCK), np.int16)
    share = -(-blocks // (CHUNKS * threads))
    while True:
        first = claim(counter) * share
        if first >= blocks:
            return
        for block in range(first, min(first + share, blocks)):
            done = 0
            while done < rows:
                count, result = _next(rows - done), y + done * y_stride + block * 2 * BLOCK
                for part in range(1 + gated):
                    source = (1 + gated) * block + part
                    tile_bfloat16(
                        count, steps, weights + source * steps * 4 * BLOCK, 4 * BLOCK, x + done * x_stride,
                        x_stride, start + source * 4 * BLOCK, 0, pair[part].ctypes.data if gated else result,
                        2 * BLOCK if gated else y_stride,
                    )  # fmt: skip
                if gated:
                    _gate(pair, count, result, y_stride)
                done += count


@numba.njit
def multiply_int8(call, rows, threads, counter):
    """As `multiply_bfloat16`; ``call`` goes on with the addresses of the rows' scales, of the outputs', of the bias."""
    weights, x, x_stride, start, y, y_stride, steps, blocks, gated = call[:BFLOAT16_CALL]
    row_scales, scales, bias = call[BFLOAT16_CALL:INT8_CALL]
    sums, pair = np.empty((TILE_ROWS, BLOCK), np.int32), np.empty((2, TILE_ROWS, BLOCK), np.int16)
    share = -(-blocks // (CHUNKS * threads))
    while True:
        first = claim(counter) * share
        if first >= blocks:
            return
        for block in range(first, min(first + share, blocks)):
            done = 0
            while done < rows:
                count, result = _next(rows - done), y + done * y_stride + block * 2 * BLOCK
                for part in range(1 + gated):
                    source = (1 + gated) * block + part
                    tile_int8(
                        count, steps, weights + source * steps * 4 * BLOCK, 4 * BLOCK, x + done * x_stride,
                        x_stride, start + source * 4 * BLOCK, 0, sums.ctypes.data, 4 * BLOCK,
                    )  # fmt: skip
                    _rescale(
                        sums, count, floats(row_scales + 4 * done, count),
                        floats(scales + 4 * BLOCK * source, BLOCK), floats(bias + 4 * BLOCK * source, BLOCK),
                        pair[part].ctypes.data if gated else result, 2 * BLOCK if gated else y_stride,
                    )  # fmt: skip
                if gated:
                    _gate(pair, count, result, y_stride)
                done += count


@numba.njit
def _next(rows):
    """How many of the rows that are left to take in one pass: as many in each as can be."""
    passes = -(-rows // TILE_ROWS)
    return -(-rows // passes)


@numba.njit
def _gate(pair, count, y, y_stride):
    """Writes silu(g) * u, each step rounded to bfloat16, for g and u in ``pair`` int16[2, rows, BLOCK]."""
    g, u, scratch = np.empty(BLOCK, np.float32), np.empty(BLOCK, np.float32), np.empty(BLOCK, np.float32)
    powers = np.empty(BLOCK, np.int32)
    for row in range(count):
        widen(pair[0, row], g)
        widen(pair[1, row], u)
        each.gate(g, u, scratch, powers, halves(y + row * y_stride, BLOCK))


@numba.njit
def _rescale(sums, count, row_scales, scales, bias, y, y_stride):
    """Writes bfloat16(sums * row scale * output scale + bias)."""
    exact = np.empty(BLOCK, np.float32)
    for row in range(count):
        for i in range(BLOCK):
            exact[i] = np.float32(sums[row, i]) * (row_scales[row] * scales[i]) + bias[i]
        narrow(exact, halves(y + row * y_stride, BLOCK))


@numba.njit(cache=True)
def _quantize(bits, quantized, scales):
    for row in range(len(bits)):
        scales[row] = each.quantize(bits[row], quantized[row])
