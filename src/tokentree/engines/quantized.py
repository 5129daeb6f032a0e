# numba gives every scalar a type of its own, which annotations can't follow:
# mypy: disable-error-code="no-untyped-def,no-untyped-call,untyped-decorator,attr-defined,call-arg,no-any-return"
"""Linear layers with weights of 8 or 4 bits, and inputs of 8 that are taken when they come."""

from __future__ import annotations

import functools
from typing import Any, ClassVar

import numba
import numpy as np
import torch
from torch import nn

from tokentree.engines import rows as each
from tokentree.engines.kernels import BLOCK, CHUNKS
from tokentree.engines.linear import pass_of, rows_of, store_rows, whole
from tokentree.engines.quants import WIDE, tile_int4, tile_int8
from tokentree.threads import WORKER, address_of, claim, floats, integers, run

ORDER = [0, 2, 1, 3] if WIDE else [0, 1, 2, 3]  # in which `quants` wants the bytes of a word
INPUTS = torch.int16 if WIDE else torch.int8  # what it takes of x
AT_ONCE = 8192  # outputs that are quantised at a time
STRETCH = 32  # groups that all rows meet before the next ones, so that these stay in the cache
CALL = 12  # integers that describe a product


class QuantizedLinear(nn.Module):
    """A linear layer whose weights have few bits and a scale for each output and group of inputs, and whose inputs get
    8 bits and a scale for each row and group. A row has the same bits beside any others.

    The weight is kept as uint8[outputs / BLOCK, groups, bytes], as `quants` has it.

    Args:
        weight, bias, gated: as for `PackedLinear`.
    """

    bits: ClassVar[int]
    group: ClassVar[int]  # inputs that share a scale

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None, gated: bool = False) -> None:
        super().__init__()
        self.gated, self.num_outputs, self.num_inputs = gated, len(weight) >> gated, weight.shape[1]
        self.groups = -(-self.num_inputs // self.group)
        parts = whole(weight.detach()).split(AT_ONCE)
        self.weight = torch.cat([self._packed(part) for part in parts])
        self.start = whole(torch.zeros(len(weight)) if bias is None else bias.detach().float())

    @staticmethod
    def quantized(groups: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Numbers without a sign, int32, and bfloat16 scales [..., 1] for ``groups`` [..., group]."""
        raise NotImplementedError

    @staticmethod
    def fits(weight: torch.Tensor) -> bool:
        """Whether the type suits."""
        return weight.dtype is torch.bfloat16

    def _packed(self, weight: torch.Tensor) -> torch.Tensor:
        padded = nn.functional.pad(weight.float(), (0, self.groups * self.group - self.num_inputs))
        numbers, scales = self.quantized(padded.unflatten(1, (self.groups, self.group)))
        fours = numbers.unflatten(2, (-1, 8 // self.bits, 4))[..., ORDER].to(torch.uint8)
        bytes_ = fours[:, :, :, 0] if self.bits == 8 else fours[:, :, :, 0] | fours[:, :, :, 1] << 4
        words = bytes_.contiguous().view(torch.int32)[..., 0]  # [outputs, groups, steps]
        in_blocks = words.unflatten(0, (-1, BLOCK)).permute(0, 2, 3, 1).flatten(2).contiguous()
        in_order = scales[..., 0].unflatten(0, (-1, BLOCK)).transpose(1, 2).contiguous()
        return torch.cat([in_blocks.view(torch.uint8), in_order.view(torch.uint8)], 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """``x`` [..., inputs] @ weight.T + bias.

        Raises:
            ValueError: if ``x`` is not bfloat16, or of another width.
        """
        rows = rows_of(x, self.num_inputs)
        inputs = torch.empty(len(rows), self.groups * self.group, dtype=INPUTS)
        scales, offsets = torch.empty(len(rows), self.groups), torch.empty(len(rows), self.groups, dtype=torch.int32)
        _prepare(rows.view(torch.int16).numpy(), self.group, self.zero, inputs.numpy(), scales.numpy(), offsets.numpy())
        y = torch.empty(len(rows), len(self.start) >> self.gated, dtype=torch.bfloat16)
        prepared = inputs.data_ptr(), scales.data_ptr(), offsets.data_ptr()
        worker = _int8_worker() if self.bits == 8 else _int4_worker()
        run(worker, [len(rows), torch.get_num_threads(), *self.call(*prepared, y.data_ptr())])
        return y[:, : self.num_outputs].reshape(*x.shape[:-1], -1)

    @property
    def zero(self) -> int:
        """The number that stands for 0."""
        return 1 << (self.bits - 1)

    def call(self, inputs: int, scales: int, offsets: int, result: int) -> list[int]:
        """What a product is told, with these addresses."""
        outputs, words = len(self.start) >> self.gated, self.group * self.bits // 32
        return [
            self.weight.data_ptr(), inputs, self.groups * self.group * INPUTS.itemsize, result, 2 * outputs,
            self.groups, words, outputs // BLOCK, self.gated, scales, offsets, self.start.data_ptr(),
        ]  # fmt: skip


class Int8Linear(QuantizedLinear):
    """Symmetric: the largest absolute value of a group becomes 127."""

    bits, group = 8, 64

    @staticmethod
    def quantized(groups: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        scales = _up(groups.abs().amax(-1, keepdim=True).clamp(min=1e-12) / 127)
        return (groups / scales.float()).round().int() + 128, scales


class Int4Linear(QuantizedLinear):
    """The value of a group that lies furthest from 0 becomes -8, as in GGUF's Q4_0."""

    bits, group = 4, 32

    @staticmethod
    def quantized(groups: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        furthest = groups.gather(-1, groups.abs().argmax(-1, keepdim=True))
        scales = torch.where(furthest == 0, 1e-12, furthest / -8).bfloat16()
        return ((groups / scales.float()).round() + 8).clamp(0, 15).int(), scales


def _up(scales: torch.Tensor) -> torch.Tensor:
    """bfloat16, not below ``scales``, which are positive."""
    return (scales.view(torch.int32) + 0xFFFF >> 16).to(torch.int16).view(torch.bfloat16)


# -- the loops, compiled when first asked for --------------------------------------------------------------------------


@functools.cache
def _int8_worker() -> Any:
    @numba.cfunc(WORKER, cache=True)
    def worker(arguments):
        call = integers(address_of(arguments), 2 + CALL)
        multiply_int8(call[2:], call[0], call[1], address_of(arguments) + 8 * len(call))

    return worker


@functools.cache
def _int4_worker() -> Any:
    @numba.cfunc(WORKER, cache=True)
    def worker(arguments):
        call = integers(address_of(arguments), 2 + CALL)
        multiply_int4(call[2:], call[0], call[1], address_of(arguments) + 8 * len(call))

    return worker


def _multiply(tile):
    @numba.njit
    def multiply(call, rows, threads, counter):
        """One thread's part of a product. The threads take shares of the result's blocks, as ``counter`` tells.

        ``call`` has the address of the weight, address and stride in bytes of the inputs and of the results; groups,
        words of a weight in a group, blocks of results, and whether they are gated; the addresses of the inputs'
        scales and offsets, and of the bias.
        """
        weights, x, x_stride, y, y_stride, groups, steps, blocks, gated, scales, offsets, start = call[:CALL]
        strip = steps * 4 * BLOCK + 2 * BLOCK
        sums = np.empty((1 + gated, rows, BLOCK), np.float32)
        share = -(-blocks // (CHUNKS * threads))
        while True:
            first = claim(counter) * share
            if first >= blocks:
                return
            for block in range(first, min(first + share, blocks)):
                for part in range(1 + gated):
                    source = (1 + gated) * block + part
                    sums[part] = floats(start + 4 * BLOCK * source, BLOCK)
                    for begin in range(0, groups, STRETCH):
                        matrix, count = weights + (source * groups + begin) * strip, min(STRETCH, groups - begin)
                        done = 0
                        while done < rows:
                            more, place = pass_of(rows - done), 4 * (groups * done + begin)
                            inputs = x + done * x_stride + begin * (x_stride // groups)
                            tile(
                                more, count, steps, matrix, inputs, x_stride,
                                scales + place, offsets + place, 4 * groups, sums[part, done].ctypes.data, 4 * BLOCK,
                            )  # fmt: skip
                            done += more
                store_rows(sums, y + block * 2 * BLOCK, y_stride)

    return multiply


multiply_int8, multiply_int4 = _multiply(tile_int8), _multiply(tile_int4)


@numba.njit(cache=True)
def _prepare(bits, group, zero, inputs, scales, offsets):
    for row in range(len(bits)):
        each.quantize(bits[row], group, zero, inputs[row], scales[row], offsets[row])
