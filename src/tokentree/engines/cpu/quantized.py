# numba gives every scalar a type of its own, which annotations can't follow:
# mypy: disable-error-code="no-untyped-def,no-untyped-call,untyped-decorator,attr-defined,call-arg,no-any-return"
"""Linear layers with weights of 8 or 4 bits, and inputs of 8 that are taken when they come."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any, NamedTuple

import numba
import numpy as np
import torch
from torch import nn

from tokentree.engines.cpu.checked import expect, is_count, is_tensor
from tokentree.engines.cpu.linear import (
    checked_once,
    holds,
    linear_of,
    parts_of,
    pass_of,
    restored,
    rows_of,
    store_rows,
    whole,
)
from tokentree.jit import cfunc, njit
from tokentree.kernels import rowwise as each
from tokentree.kernels.copying import copy_into
from tokentree.kernels.records import record, record_at
from tokentree.kernels.threads import WORKER, address, address_of, claim, float32_at, int64_at, keep, num_threads, run
from tokentree.kernels.tile import BLOCK, CHUNKS
from tokentree.kernels.tile_quantized import WIDE, tile_int4, tile_int8

ORDER = [0, 2, 1, 3] if WIDE else [0, 1, 2, 3]  # in which `quants` wants the bytes of a word
INPUTS = torch.int16 if WIDE else torch.int8  # what it takes of x
GROUP = 64  # inputs that share a scale where nothing else is given
AT_ONCE = 8192  # outputs that are packed at a time
STRETCH = 32  # groups that all rows meet before the next ones, so that these stay in the cache


class QuantizedProduct(NamedTuple):
    """What a product on few bits is told. Addresses are those of the first number; strides are bytes from row to
    row."""

    weight: int
    inputs: int
    inputs_stride: int
    results: int
    results_stride: int
    groups: int
    words: int  # of a weight in a group
    blocks: int  # of results
    gated: int  # 1 if blocks of outputs come in pairs, else 0
    scales: int  # addresses of the inputs' scales and totals, float32[rows, groups]
    totals: int
    start: int  # address of what sums start at


PRODUCT_BYTES, product_at = record(QuantizedProduct).itemsize, record_at(QuantizedProduct)


@dataclass(frozen=True)
class Groups:
    """A weight in few bits: numbers * scales + least.

    Args:
        numbers: uint8[outputs, groups, group], below 256 or 16.
        scales, least: float16[outputs, groups].
        bits: 8 or 4.
    """

    numbers: torch.Tensor
    scales: torch.Tensor
    least: torch.Tensor
    bits: int

    @classmethod
    def of(cls, weight: torch.Tensor, group: int = GROUP) -> Groups:
        """In 8 bits, from the least value of a group to its largest; ``weight`` [outputs, inputs]."""
        parts = [cls._of(part, group) for part in weight.detach().split(AT_ONCE)]
        numbers, scales, least = (torch.cat(tensors) for tensors in zip(*parts, strict=True))
        return cls(numbers, scales, least, 8)

    @staticmethod
    def _of(weight: torch.Tensor, group: int) -> tuple[torch.Tensor, ...]:
        padded = nn.functional.pad(weight.float(), (0, -weight.shape[1] % group)).unflatten(1, (-1, group))
        least = -_up(-padded.amin(-1))
        scales = _up((padded.amax(-1) - least.float()).clamp(min=1e-6) / 255)
        numbers = ((padded - least.float()[..., None]) / scales.float()[..., None]).round()
        return numbers.to(torch.uint8), scales, least

    @property
    def tensors(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        return self.numbers, self.scales, self.least

    def values(self) -> torch.Tensor:
        """float32[outputs, groups * group]"""
        return (self.numbers * self.scales.float()[..., None] + self.least.float()[..., None]).flatten(1)


def _up(values: torch.Tensor) -> torch.Tensor:
    """float16, not below ``values``."""
    near = values.half()
    return torch.where(near.float() < values, torch.nextafter(near, near.new_tensor(torch.inf)), near)


STATE = ("weight", "start", "gated", "num_outputs", "num_inputs", "groups", "group", "bits")  # what is kept of a layer


class QuantizedLinear(nn.Module):
    """A linear layer whose weights have few bits, and whose inputs get 8 bits and a scale for each row and group. A row
    has the same bits beside any others.

    The weight is kept as uint8[outputs / BLOCK, groups, bytes], as `quants` has it.

    Args:
        weight: `Groups`, or bfloat16[outputs, inputs], which is taken in 8 bits.
        bias, gated: as for `PackedLinear`.
        num_inputs: where the groups hold more than that.
    """

    def __init__(
        self, weight: Groups | torch.Tensor, bias: torch.Tensor | None, gated: bool = False,
        num_inputs: int | None = None,
    ) -> None:  # fmt: skip
        super().__init__()
        if isinstance(weight, torch.Tensor):
            weight, num_inputs = Groups.of(weight), weight.shape[1]
        outputs, self.groups, self.group = weight.numbers.shape
        self.bits, self.gated, self.num_outputs = weight.bits, gated, outputs >> gated
        self.num_inputs = self.groups * self.group if num_inputs is None else num_inputs
        parts = zip(*(whole(tensor).split(AT_ONCE) for tensor in weight.tensors), strict=True)
        self.weight = torch.cat([self._packed(*part) for part in parts])
        self.start = whole(torch.zeros(outputs, dtype=torch.float32) if bias is None else bias.detach().float())

    @property
    def width(self) -> int:
        """Of its inputs, with what fills up a group."""
        return self.groups * self.group

    @property
    def num_results(self) -> int:
        """How many numbers of a row it writes: its outputs, and what fills up a block."""
        return len(self.start) >> self.gated

    @staticmethod
    def fits(weight: torch.Tensor) -> bool:
        """Whether the type suits."""
        return weight.dtype is torch.bfloat16

    def _packed(self, numbers: torch.Tensor, scales: torch.Tensor, least: torch.Tensor) -> torch.Tensor:
        fours = numbers.unflatten(2, (-1, 8 // self.bits, 4))[..., ORDER]
        bytes_ = fours[:, :, :, 0] if self.bits == 8 else fours[:, :, :, 0] | fours[:, :, :, 1] << 4
        words = bytes_.contiguous().view(torch.int32)[..., 0]  # [outputs, groups, steps]
        parts = [words.unflatten(0, (-1, BLOCK)).permute(0, 2, 3, 1).flatten(2)]
        parts += [values.unflatten(0, (-1, BLOCK)).transpose(1, 2) for values in (scales, least)]
        return torch.cat([part.contiguous().view(torch.uint8) for part in parts], 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """``x`` [..., inputs] @ weight.T + bias.

        Raises:
            ValueError: if ``x`` is not bfloat16, or of another width.
        """
        rows = rows_of(x, self.num_inputs)
        inputs = torch.empty(len(rows), self.groups * self.group, dtype=INPUTS)
        scales, totals = (torch.empty(len(rows), self.groups, dtype=torch.float32) for _ in range(2))
        _prepare(rows.view(torch.int16).numpy(), self.group, inputs.numpy(), scales.numpy(), totals.numpy())
        y = torch.empty(len(rows), len(self.start) >> self.gated, dtype=torch.bfloat16)
        call = self.call(inputs.data_ptr(), scales.data_ptr(), totals.data_ptr(), y.data_ptr())
        worker = _int8_worker() if self.bits == 8 else _int4_worker()
        run(worker, [len(rows), num_threads(), *call])
        return y[:, : self.num_outputs].reshape(*x.shape[:-1], -1)

    def state(self) -> dict[str, Any]:
        """What `of_state` makes a layer of."""
        return {name: getattr(self, name) for name in STATE}

    @classmethod
    def of_state(cls, state: dict[str, Any]) -> QuantizedLinear:
        """A layer that is kept.

        Raises:
            ModelError: if its parts don't belong together.
        """
        weight, start, gated, outputs, inputs, groups, group, bits = parts_of(state, STATE)
        expect("a linear layer", type(gated) is bool, *map(is_count, (inputs, groups, group)), bits in (4, 8))
        expect("a linear layer", group in (32, 64, 96, 128), (groups - 1) * group < inputs <= groups * group)
        strip = group * bits // 8 * BLOCK + 4 * BLOCK  # the numbers of a group, scales and least values
        expect("a linear layer", is_tensor(weight, torch.uint8, None, groups, strip))
        expect("a linear layer", holds(start, len(weight), gated, outputs))
        return restored(cls, state)

    def call(self, inputs: int, scales: int, totals: int, results: int) -> QuantizedProduct:
        """What a product is told, with these addresses."""
        outputs, words = len(self.start) >> self.gated, self.group * self.bits // 32
        size = 4 * (words + 1) * BLOCK  # of a strip: its words, then scales and least weights
        weight, start = checked_once(self, lambda: (
            address(self.weight, torch.uint8, len(self.start) // BLOCK, self.groups, size),
            address(self.start, torch.float32, (outputs << self.gated) // BLOCK * BLOCK),
        ))  # fmt: skip
        return QuantizedProduct(
            weight=weight, inputs=inputs, inputs_stride=self.groups * self.group * INPUTS.itemsize, results=results,
            results_stride=2 * outputs, groups=self.groups, words=words, blocks=outputs // BLOCK,
            gated=int(self.gated), scales=scales, totals=totals, start=start,
        )  # fmt: skip


def draft_linear(weight: torch.Tensor, bias: torch.Tensor | None) -> nn.Module:
    """The fastest linear layer that there is for drafts, which needn't be exact: on CPUs in 8 bits."""
    fits = weight.device.type == "cpu" and QuantizedLinear.fits(weight)
    return QuantizedLinear(weight, bias) if fits else linear_of(weight, bias)


# -- the loops, compiled when first asked for --------------------------------------------------------------------------


@functools.cache
def _int8_worker() -> Any:
    @cfunc(WORKER, cache=True)
    def worker(arguments):
        rows, threads = int64_at(address_of(arguments), 2)
        call = address_of(arguments) + 16
        multiply_int8(product_at(call), rows, threads, call + PRODUCT_BYTES)

    return worker


@functools.cache
def _int4_worker() -> Any:
    @cfunc(WORKER, cache=True)
    def worker(arguments):
        rows, threads = int64_at(address_of(arguments), 2)
        call = address_of(arguments) + 16
        multiply_int4(product_at(call), rows, threads, call + PRODUCT_BYTES)

    return worker


def _multiply(tile):
    @numba.njit
    def multiply(product, rows, threads, counter):
        """One thread's part of a `QuantizedProduct`. The threads take shares of the result's blocks, as ``counter``
        tells."""
        weights, start, groups, steps = product.weight, product.start, product.groups, product.words
        x, x_stride, y, y_stride = product.inputs, product.inputs_stride, product.results, product.results_stride
        blocks, gated, scales, totals = product.blocks, product.gated, product.scales, product.totals
        strip = steps * 4 * BLOCK + 4 * BLOCK
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
                    for begin in range(0, groups, STRETCH):
                        matrix, count = weights + (source * groups + begin) * strip, min(STRETCH, groups - begin)
                        done = 0
                        while done < rows:
                            more, place = pass_of(rows - done), 4 * (groups * done + begin)
                            inputs = x + done * x_stride + begin * (x_stride // groups)
                            tile(
                                more, count, steps, matrix, inputs, x_stride, scales + place, totals + place,
                                4 * groups, sums[part, done].ctypes.data, 4 * BLOCK,
                            )  # fmt: skip
                            done += more
                store_rows(sums, y + block * 2 * BLOCK, y_stride)
        keep(sums)

    return multiply


multiply_int8, multiply_int4 = _multiply(tile_int8), _multiply(tile_int4)


@njit(cache=True)
def _prepare(bits, group, inputs, scales, totals):
    for row in range(len(bits)):
        each.quantize(bits[row], group, inputs[row], scales[row], totals[row])
