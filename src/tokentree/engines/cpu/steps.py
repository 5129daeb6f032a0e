# numba gives every scalar a type of its own, which annotations can't follow:
# mypy: disable-error-code="no-untyped-def,no-untyped-call,untyped-decorator,attr-defined,call-arg,operator"
"""A whole forward in one compiled call.

A program is a list of steps: a norm, a product, turning queries and keys, attention, and so on, for each layer. Every
thread runs the list; in each step the threads take shares of the work as they become free, and go on when all shares
that were taken are done. A thread that comes late to a step finds nothing left, and nobody waits for it. Steps find
weights and the rows' intermediate results by address, so that no Python runs between them.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass
from typing import Any, Protocol

import numba
import numpy as np
import torch
from torch import nn

from tokentree.engines.cpu.fused import FusedNorm
from tokentree.engines.cpu.linear import BFLOAT16_CALL, PackedEmbedding, PackedLinear, multiply_bfloat16
from tokentree.engines.cpu.quantized import CALL as QUANTIZED_CALL
from tokentree.engines.cpu.quantized import QuantizedLinear, multiply_int4, multiply_int8
from tokentree.engines.kv import KVLayout
from tokentree.engines.segment import Segment
from tokentree.errors import ModelError
from tokentree.jit import cfunc, njit
from tokentree.kernels import rowwise as each
from tokentree.kernels.attention import CALL, SEGMENT, attend
from tokentree.kernels.bfloat16 import widen
from tokentree.kernels.threads import (
    WORKER,
    address,
    address_of,
    claim,
    enter,
    float32_at,
    float64_at,
    int8_at,
    int16_at,
    int32_at,
    int64_at,
    leave,
    num_threads,
    rest,
    run,
    wait,
)
from tokentree.kernels.tile import BFLOAT16_WIDE, BLOCK
from tokentree.kernels.tile_quantized import WIDE
from tokentree.kernels.topk import STRETCH, most_probable, sum_of_powers
from tokentree.tree import Ints

NORM, PREPARE, MULTIPLY, MULTIPLY_INT8, MULTIPLY_INT4, ROTARY, ATTEND, COPY, EMBED, BEST = range(10)
AS_IT_IS, WIDER, IN_8_BITS = range(3)  # how a product takes its inputs
HEADER, STEP = 12, 16  # integers that describe a forward, and each step
COUNTERS = 8  # integers of a step that threads count in, a whole line of the cache: shares taken, threads at work


class Heads(Protocol):
    """The sizes of an attention; `window` counts positions."""

    heads: int
    kv_heads: int
    width: int
    scale: float
    window: int | None


@dataclass(frozen=True)
class Rows:
    """Where a layer's intermediate results are, [rows, columns] each."""

    residual: torch.Tensor
    normed: torch.Tensor
    added: torch.Tensor
    inner: torch.Tensor
    qkv: torch.Tensor
    queries: torch.Tensor
    attended: torch.Tensor


@dataclass(frozen=True)
class Behind:
    """What a layer has behind its attention: its output, the norm in front of its gated MLP, and that."""

    o_proj: Any
    norm: FusedNorm
    gate_up: Any
    down_proj: Any


class RotaryTable:
    """Rotary positions, computed once for each position.

    Args:
        rotary: a transformers model's own module, or one like it.
    """

    def __init__(self, rotary: nn.Module) -> None:
        self._rotary: Any = rotary
        self._fixed = self.fixed(rotary)
        self._cos = self._sin = torch.empty(0, 0)

    @staticmethod
    def fixed(rotary: nn.Module) -> bool:
        """Whether they are the same for texts of any length."""
        kind = getattr(rotary, "rope_type", None)
        if kind == "longrope":
            own: Any = rotary
            return bool(own.config.rope_parameters["short_factor"] == own.config.rope_parameters["long_factor"])
        return kind != "dynamic"

    def at(self, positions: Ints, end: int) -> tuple[torch.Tensor, torch.Tensor, Ints]:
        """Cosines and sines, bfloat16[n, width], and which of them are those of ``positions`` int64[rows], all below
        ``end``."""
        if not self._fixed:
            return *self._computed(torch.from_numpy(positions)), np.arange(len(positions))
        if end > len(self._cos):
            self._cos, self._sin = self._computed(torch.arange(max(1024, 1 << (end - 1).bit_length())))
        return self._cos, self._sin, positions

    def _computed(self, positions: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        cos, sin = self._rotary(torch.empty(0, dtype=torch.bfloat16), positions[None])
        return cos[0].contiguous(), sin[0].contiguous()


class Steps:
    """A forward as a list of steps, and the memory that they share: the rows' intermediate results.

    A subclass says which steps there are, in `build`, whenever there must be room for more rows. Steps read memory by
    address. So the sizes of all that they read are checked when they are built, and those of KV and rows at each run;
    and tensors that they read are kept, whatever their owner does with them.

    Args:
        widest: numbers that the widest product takes of a row.
    """

    def __init__(self, widest: int) -> None:
        self._widest, self._capacity = -(-widest // 128) * 128, 0
        self._numbers: list[np.ndarray] = []
        self._memory: list[torch.Tensor] = []
        self._windows: set[int | None] = set()
        self._tokens = 0  # that there are, where a step looks them up
        self._stored: dict[int, tuple[int, int]] = {}  # by layer that a step stores or reads: KV heads, their width
        self._fitting: KVLayout | None = None  # one that has been checked against that

    def build(self) -> list[list[int]]:
        """The steps, in memory from `room`."""
        raise NotImplementedError

    def reserve(self, rows: int) -> None:
        """Makes room for so many rows."""
        if rows <= self._capacity:
            return
        self._capacity = max(64, 1 << (rows - 1).bit_length())
        self._numbers, self._memory, self._windows, self._fitting = [], [], set(), None
        self._prepared = self.room(self._widest, torch.float32)
        self._scales, self._totals = (self.room(self._widest // 32, torch.float32) for _ in range(2))
        steps = self.build()
        self._steps = np.zeros((len(steps), STEP), np.int64)
        for row, step in zip(self._steps, steps, strict=True):
            row[: len(step)] = step

    def room(self, columns: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
        """[rows, columns], kept as long as the steps are."""
        self._memory.append(torch.empty(self._capacity, columns, dtype=dtype))
        return self._memory[-1]

    def run(
        self, count: int, segments: SequenceOf[Segment], rotary: tuple[torch.Tensor, torch.Tensor, Ints],
        ids: Ints | None = None, first: int = 0,
    ) -> None:  # fmt: skip
        """Runs steps ``first`` to ``count`` on rows with these rotary positions, see `RotaryTable.at`.

        Args:
            ids: int64[rows], if a step reads the tokens.

        Raises:
            IndexError: if one of them is none of the embedding's, or a row or a position is none of those that there
                is room for.
            ModelError: if the KV of a segment has other sizes than the steps.
        """
        cos, sin, places = rotary
        rows = len(places)
        if rows > self._capacity or not _within(places, len(cos)):
            raise IndexError(f"there is room for {self._capacity} rows, and positions up to {len(cos)}")
        self._check(segments, rows)
        if ids is not None and self._tokens and not _within(ids, self._tokens):
            raise IndexError(f"a token id is outside the embedding of {self._tokens}")
        for segment in segments:
            segment.windows |= self._windows
        table = np.array([segment.described(0) for segment in segments], np.int64)
        counters = np.zeros((count, COUNTERS), np.int64)
        run(
            _worker(),
            [rows, num_threads(), rest(), count - first,
             self._steps.ctypes.data + first * self._steps.strides[0], counters.ctypes.data,
             table.ctypes.data, len(table), cos.data_ptr(), sin.data_ptr(), places.ctypes.data,
             0 if ids is None else ids.ctypes.data],
        )  # fmt: skip

    def _check(self, segments: SequenceOf[Segment], rows: int) -> None:
        """See `run`."""
        for segment in segments:
            if segment.start + segment.count > rows:
                raise IndexError(f"a segment ends at row {segment.start + segment.count} of {rows}")
            if segment.kv.layout is not self._fitting:
                for layer, sizes in self._stored.items():
                    segment.kv.layout.check(layer, *sizes)
                self._fitting = segment.kv.layout

    def _at(self, tensor: torch.Tensor, dtype: torch.dtype, *sizes: int) -> int:
        """The address of a tensor of these sizes, which is kept as long as the steps are."""
        self._memory.append(tensor.detach())  # of a parameter, not the parameter, which its owner may give other memory
        return address(tensor, dtype, *sizes)

    # -- the kinds of steps ----------------------------------------------------------------------------------------

    @staticmethod
    def embeds(embedding: Any) -> bool:
        """Whether `embed` can look up the rows of ``embedding``."""
        plain = type(embedding) is nn.Embedding and embedding.weight.dtype is torch.bfloat16
        return plain or type(embedding) is PackedEmbedding

    def embed(self, embedding: Any, result: torch.Tensor) -> list[list[int]]:
        """Looks up the rows' tokens."""
        self._tokens, width = int(embedding.num_embeddings), result.shape[1]
        packed = isinstance(embedding, PackedEmbedding)
        if packed:
            table = self._at(embedding.weight, torch.int32, -(-self._tokens // BLOCK), width // 2, BLOCK)
        else:
            table = self._at(embedding.weight, torch.bfloat16, self._tokens, width)
        return [[EMBED, table, width, packed, result.data_ptr(), result.stride(0)]]

    def norm(
        self, norm: FusedNorm, x: torch.Tensor, result: torch.Tensor, before: PackedLinear | QuantizedLinear | None,
        update: torch.Tensor | None = None,
    ) -> list[list[int]]:  # fmt: skip
        """Adds ``update`` to ``x``, norms it, and makes what the layer ``before`` which the norm comes takes."""
        form, width = [AS_IT_IS, 0] if before is None else self._form(before), x.shape[1]
        _same(width, result.shape[1], width if update is None else update.shape[1])
        weight = self._at(norm.weight, torch.float32, width)
        return [[
            NORM, x.data_ptr(), 0 if update is None else update.data_ptr(), width, weight,
            self._number(float(norm.eps)), result.data_ptr(), result.stride(0), *form,
        ]]  # fmt: skip

    def prepare(self, before: PackedLinear | QuantizedLinear, x: torch.Tensor) -> list[list[int]]:
        """Makes of ``x`` what the layer ``before`` which that comes takes."""
        form = self._form(before)
        return [[PREPARE, x.data_ptr(), x.shape[1], *form]] if form[0] != AS_IT_IS else []

    def multiply(
        self, layer: PackedLinear | QuantizedLinear, x: torch.Tensor, y: torch.Tensor | None
    ) -> list[list[int]]:
        """``layer`` of ``x``, which was prepared, into ``y``, or where it will be said."""
        result, prepared = 0 if y is None else y.data_ptr(), self._prepared.data_ptr()
        _same(layer.num_inputs, x.shape[1])
        _same(layer.num_results, layer.num_results if y is None else y.shape[1])
        self._memory += [layer.weight, layer.start]
        if isinstance(layer, QuantizedLinear):
            call = layer.call(prepared, self._scales.data_ptr(), self._totals.data_ptr(), result)
            return [[MULTIPLY_INT8 if layer.bits == 8 else MULTIPLY_INT4, *call]]
        source, word = (prepared, 4) if BFLOAT16_WIDE else (x.data_ptr(), 2)
        return [[MULTIPLY, *layer.call(source, word * x.shape[1], result)]]

    def rotary(self, index: int, sizes: Heads, qkv: torch.Tensor, queries: torch.Tensor) -> list[list[int]]:
        """Turns queries and keys, and stores keys and values as layer ``index``."""
        _same((sizes.heads + 2 * sizes.kv_heads) * sizes.width, qkv.shape[1])
        _same(sizes.heads * sizes.width, queries.shape[1])
        self._stored[index] = sizes.kv_heads, sizes.width
        return [[ROTARY, index, sizes.heads, sizes.kv_heads, sizes.width, qkv.data_ptr(), queries.data_ptr()]]

    def attend(self, index: int, sizes: Heads, queries: torch.Tensor, result: torch.Tensor) -> list[list[int]]:
        """Attention over what layer ``index`` has stored."""
        width, heads = sizes.width, sizes.heads
        _same(heads * width, queries.shape[1], result.shape[1])
        _same(heads % sizes.kv_heads, 0)
        self._windows.add(sizes.window)
        self._stored[index] = sizes.kv_heads, width
        return [[
            ATTEND, index, self._number(sizes.scale, 0.0), queries.data_ptr(), 4 * width, 4 * heads * width,
            result.data_ptr(), 2 * width, 2 * heads * width, width, width, heads // sizes.kv_heads, sizes.window or 0,
            heads, 0, 1,
        ]]  # fmt: skip

    def rows_of_a_layer(self, hidden: int, inner: int, sizes: Heads) -> Rows:
        """Room for a layer's intermediate results."""
        wide = sizes.heads * sizes.width
        return Rows(
            residual=self.room(hidden), normed=self.room(hidden), added=self.room(hidden), inner=self.room(inner),
            qkv=self.room(wide + 2 * sizes.kv_heads * sizes.width), queries=self.room(wide, torch.float32),
            attended=self.room(wide),
        )  # fmt: skip

    def after_rotary(self, index: int, sizes: Heads, layer: Behind, at: Rows) -> list[list[int]]:
        """A layer from its attention on; what its gated MLP gives is left in ``at.added``, for the next norm to add."""
        steps = self.attend(index, sizes, at.queries, at.attended)
        steps += self.prepare(layer.o_proj, at.attended)
        steps += self.multiply(layer.o_proj, at.attended, at.added)
        steps += self.norm(layer.norm, at.residual, at.normed, layer.gate_up, at.added)
        steps += self.multiply(layer.gate_up, at.normed, at.inner)
        steps += self.prepare(layer.down_proj, at.inner)
        return steps + self.multiply(layer.down_proj, at.inner, at.added)

    def copy(self, x: torch.Tensor, result: torch.Tensor) -> list[list[int]]:
        """Keeps ``x``."""
        _same(x.shape[1], result.shape[1])
        return [[COPY, x.data_ptr(), result.data_ptr(), x.shape[1]]]

    def _number(self, *numbers: float) -> int:
        """The address of these numbers, as float64."""
        self._numbers.append(np.array(numbers))
        address: int = self._numbers[-1].ctypes.data
        return address

    def _form(self, layer: PackedLinear | QuantizedLinear) -> list[int]:
        """How ``layer`` takes its inputs, and where."""
        _same(max(self._widest, layer.width), self._widest)
        if isinstance(layer, QuantizedLinear):
            _same(max(self._scales.shape[1], layer.groups), self._scales.shape[1])
            places = [self._scales.data_ptr(), self._totals.data_ptr()]
            return [IN_8_BITS, self._prepared.data_ptr(), layer.groups, layer.group, *places]
        return [WIDER if BFLOAT16_WIDE else AS_IT_IS, self._prepared.data_ptr()]


@njit(cache=True)
def _within(numbers: Ints, end: int) -> bool:
    """Whether there are any, all from 0 to below ``end``."""
    for number in numbers:
        if not 0 <= number < end:
            return False
    return len(numbers) > 0


def _same(*sizes: int) -> None:
    if len({*sizes}) > 1:
        raise ModelError(f"the sizes of this model's layers don't fit each other: {', '.join(map(str, sizes))}")


# -- the steps ---------------------------------------------------------------------------------------------------------


@functools.cache
def _worker() -> Any:
    @cfunc(WORKER, cache=True)
    def worker(arguments):
        header = int64_at(address_of(arguments), HEADER)
        rows, threads, yields, count, steps, counters, segments, num_segments, cos, sin, places, ids = header
        table, kv = int64_at(steps, (count, STEP)), int64_at(segments, (num_segments, SEGMENT))
        for i in range(count):
            kind, step, counter = table[i, 0], table[i, 1:], counters + 8 * COUNTERS * i
            enter(counter + 8)
            if kind == MULTIPLY:
                multiply_bfloat16(step[:BFLOAT16_CALL], rows, threads, counter)
            elif kind == MULTIPLY_INT8:
                multiply_int8(step[:QUANTIZED_CALL], rows, threads, counter)
            elif kind == MULTIPLY_INT4:
                multiply_int4(step[:QUANTIZED_CALL], rows, threads, counter)
            elif kind == ATTEND:
                attend(step[2 : 2 + CALL], kv, step[0], float64_at(step[1], 2), threads, counter)
            else:
                while True:
                    row = claim(counter)
                    if row >= rows:
                        break
                    _one_row(kind, step, kv, cos, sin, places, ids, row)
            leave(counter + 8)
            wait(counter + 8, yields)

    return worker


@numba.njit
def _one_row(kind, step, kv, cos, sin, places, ids, row):
    if kind == NORM:
        _norm(step, row)
    elif kind == PREPARE:
        _prepare(step[0], step[1], step[2:8], row)
    elif kind == COPY:
        int16_at(step[1] + 2 * step[2] * row, step[2])[:] = int16_at(step[0] + 2 * step[2] * row, step[2])
    elif kind == BEST:
        _best(step, row)
    elif kind == EMBED:
        _embed(step, int64_at(ids + 8 * row, 1)[0], row)
    else:
        place = 2 * step[3] * int64_at(places + 8 * row, 1)[0]
        _rotary(step, kv, cos + place, sin + place, row)


@numba.njit
def _best(step, row):
    """Finds a row's most probable tokens, and, where there is an address for that, the logarithm of the sum of its
    exponentials."""
    logits, stride, vocab, kept, values, tokens, sums = step[:7]
    bits, found = int16_at(logits + 2 * stride * row, vocab), float32_at(values + 4 * kept * row, kept)
    most_probable(bits, found, int64_at(tokens + 8 * kept * row, kept))
    if sums:
        scratch = np.empty(STRETCH, np.float32)
        float32_at(sums + 4 * row, 1)[0] = sum_of_powers(bits, found[0], np.float32(1), scratch)


@numba.njit
def _embed(step, token, row):
    """Looks up a row: of a table, or of blocks of pairs as `linear.PackedLinear` has them."""
    table, width, packed, result, stride = step[:5]
    if not packed:
        int16_at(result + 2 * stride * row, width)[:] = int16_at(table + 2 * width * token, width)
        return
    pairs, into = width // 2, int32_at(result + 2 * stride * row, width // 2)
    start = table + 4 * (token // BLOCK * pairs * BLOCK + token % BLOCK)
    for pair in range(pairs):
        into[pair] = int32_at(start + 4 * pair * BLOCK, 1)[0]


@numba.njit
def _norm(step, row):
    residual, update, width, weight, eps, normed, stride = step[:7]
    bits, result = int16_at(residual + 2 * width * row, width), int16_at(normed + 2 * stride * row, width)
    if update:
        each.add(bits, int16_at(update + 2 * width * row, width))
    each.normalize(bits, float32_at(weight, width), np.float32(float64_at(eps, 1)[0]), result)
    _prepare(normed, width, step[7:13], row)


@numba.njit
def _prepare(x, width, how, row):
    form, prepared, groups, group, scales, totals = how[:6]
    bits = int16_at(x + 2 * width * row, width)
    if form == WIDER:
        widen(bits, float32_at(prepared + 4 * width * row, width))
    elif form == IN_8_BITS:
        place, size = 4 * groups * row, groups * group
        into = float32_at(scales + place, groups), float32_at(totals + place, groups)
        if WIDE:
            each.quantize(bits, group, int16_at(prepared + 2 * size * row, size), *into)
        else:
            each.quantize(bits, group, int8_at(prepared + size * row, size), *into)


@numba.njit
def _rotary(step, kv, cos, sin, row):
    """Turns a row's queries and keys, by the cosines and sines at these addresses, and stores keys and values as
    `kv.BlockedKV` has them."""
    layer, heads, kv_heads, width, qkv, queries = step[:6]
    for segment in kv:
        if segment[5] <= row < segment[5] + segment[4]:
            break
    keys, values, capacity = segment[0] + layer * segment[10], segment[1] + layer * segment[11], segment[2]
    place, columns = segment[3] + segment[9] + row - segment[5], -(-width // BLOCK) * BLOCK
    scratch, rounded = np.empty((5, width), np.float32), np.empty(width, np.int16)
    c, s, x = scratch[2], scratch[3], scratch[4]
    widen(int16_at(cos, width), c)
    widen(int16_at(sin, width), s)
    qkv += row * (heads + 2 * kv_heads) * width * 2
    for head in range(heads):
        result = float32_at(queries + 4 * width * (row * heads + head), width)
        each.rotary(int16_at(qkv + 2 * width * head, width), c, s, result, scratch, rounded)
    for head in range(kv_heads):
        each.rotary(int16_at(qkv + 2 * width * (heads + head), width), c, s, x, scratch, rounded)
        block = float32_at(keys + 4 * width * (head * capacity + place // BLOCK * BLOCK), (width, BLOCK))
        for column in range(width):
            block[column, place % BLOCK] = x[column]
        bits = int16_at(qkv + 2 * width * (heads + kv_heads + head), width)
        widen(bits, float32_at(values + 4 * columns * (head * capacity + place), width))
