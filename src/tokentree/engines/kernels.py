# numba gives every scalar a type of its own, and llvmlite is not typed:
# mypy: disable-error-code="no-untyped-def,no-untyped-call,no-any-return,untyped-decorator,attr-defined,call-arg"
"""Small matrix products that take as long as reading the matrix does, whatever rows go with a row.

Everything here rests on one loop, the *tile*: a few rows times a strip of `BLOCK` columns. The sums of up to
`TILE_ROWS` rows stay in registers, so that each number of the matrix is loaded once for all of them, and asked for
ahead. Up to 8 or 10 rows that costs no more than one row. A row's sums are added up in one order, so its bits never
depend on the others.

The loop is spelled out in LLVM's language and compiled by numba, so no C compiler is needed. For bfloat16 and int8 it
is made of AVX-512's dot products; for float32, of fused multiply-adds on any CPU. Threads are those of torch's own
pool.
"""

from __future__ import annotations

import functools
import math

import llvmlite.binding
import numba
import numpy as np
from llvmlite import ir
from numba.core import cgutils
from numba.extending import intrinsic

LANES = 16  # sums in a register
BLOCK = 2 * LANES  # columns that are computed together
TILE_ROWS = 12  # sums of 12 rows fill 24 registers
AHEAD = 1024  # bytes, how far ahead weights are asked for
CHUNKS = 8  # shares per thread: the threads take them as they become free

LOG2_E, LEAST, MOST = np.float32(math.log2(math.e)), np.float32(-126), np.float32(127)
# 2 ** x = 1 + x * (C1 + x * (C2 + ...)): the coefficients of Cephes' exp2f
C1, C2, C3, C4, C5, C6 = (
    np.float32(c)
    for c in (6.931472028550421e-1, 2.402264791363012e-1, 5.550332471162809e-2, 9.618437357674640e-3,
              1.339887440266574e-3, 1.535336188319500e-4)
)  # fmt: skip

I8, I16, I32, I64, F32 = *(ir.IntType(bits) for bits in (8, 16, 32, 64)), ir.FloatType()
F32S, I32S, I16S = (ir.VectorType(kind, LANES) for kind in (F32, I32, I16))


class _BFloat(ir.Type):  # type: ignore[misc]
    """bfloat16, which llvmlite has no type for."""

    def _to_string(self) -> str:
        return "bfloat"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _BFloat)

    def __hash__(self) -> int:
        return hash(_BFloat)


PAIRS, BF16S = ir.VectorType(_BFloat(), 2 * LANES), ir.VectorType(_BFloat(), LANES)


# -- the tile --------------------------------------------------------------------------------------------------------


def _function(builder, name, result, *params):
    return cgutils.get_or_insert_function(builder.module, ir.FunctionType(result, params), name)


class _Float32:
    """A word is a number: fused multiply-add."""

    sums, out_bytes = F32S, 4

    @staticmethod
    def add(builder, old, x, weights):
        x, weights = (builder.bitcast(words, F32S) for words in (x, weights))
        return builder.call(_function(builder, "llvm.fma.v16f32", F32S, F32S, F32S, F32S), [x, weights, old])

    @staticmethod
    def finish(builder, sums):
        return sums


class _BFloat16:
    """A word is a pair of bfloat16, sums are float32, the result is rounded to bfloat16."""

    sums, out_bytes = F32S, 2

    @staticmethod
    def add(builder, old, x, weights):
        dot = _function(builder, "llvm.x86.avx512bf16.dpbf16ps.512", F32S, F32S, PAIRS, PAIRS)
        return builder.call(dot, [old, builder.bitcast(x, PAIRS), builder.bitcast(weights, PAIRS)])

    @staticmethod
    def finish(builder, sums):
        narrow = _function(builder, "llvm.x86.avx512bf16.cvtneps2bf16.512", BF16S, F32S)
        return builder.bitcast(builder.call(narrow, [sums]), I16S)


class _Int8:
    """A word is four numbers, of x without a sign, of the matrix with one; sums are int32."""

    sums, out_bytes = I32S, 4

    @staticmethod
    def add(builder, old, x, weights):
        words = I32S if llvmlite.binding.llvm_version_info[0] < 22 else ir.VectorType(I8, 4 * LANES)
        dot = _function(builder, "llvm.x86.avx512.vpdpbusd.512", I32S, I32S, words, words)
        return builder.call(dot, [old, builder.bitcast(x, words), builder.bitcast(weights, words)])

    @staticmethod
    def finish(builder, sums):
        return sums


def _tile(kind):
    """An intrinsic: ``tile(rows, steps, matrix, matrix_stride, x, x_stride, start, start_stride, y, y_stride)``.

    y[rows, BLOCK] = start[rows, BLOCK] + x[rows, steps] @ matrix[steps, BLOCK], where x and the matrix hold words of 4
    bytes, which are what ``kind`` says, and ``start`` what it sums up in. All but ``rows``, up to `TILE_ROWS`, and
    ``steps``, at least 1, are addresses and strides in bytes.
    """

    @intrinsic
    def tile(typingctx, rows, steps, matrix, matrix_stride, x, x_stride, start, start_stride, y, y_stride):
        def generate(context, builder, signature, args):
            after = builder.append_basic_block("after")
            switch = builder.switch(args[0], after)
            for count in range(1, TILE_ROWS + 1):  # a loop for each number of rows
                with builder.goto_block(builder.append_basic_block(f"rows{count}")):
                    switch.add_case(ir.Constant(I64, count), builder.block)
                    _emit_tile(builder, kind, count, *args[1:])
                    builder.branch(after)
            builder.position_at_end(after)
            return context.get_dummy_value()

        return numba.void(*[numba.int64] * 10), generate

    return tile


def _emit_tile(
    builder, kind, rows, steps, matrix, matrix_stride, x, x_stride, start, start_stride, y, y_stride
) -> None:  # fmt: skip
    def number(value):
        return ir.Constant(I64, value)

    def at(address, offset, what):
        return builder.inttoptr(builder.add(address, offset), what.as_pointer())

    def row_of(stride, row, offset):
        return builder.add(builder.mul(stride, number(row)), offset)

    halves = range(BLOCK // LANES)
    begin = [
        [
            builder.load(at(start, row_of(start_stride, row, number(4 * LANES * half)), kind.sums), align=4)
            for half in halves
        ]
        for row in range(rows)
    ]
    entry = builder.block
    loop, done = builder.append_basic_block("loop"), builder.append_basic_block("done")
    builder.branch(loop)

    builder.position_at_end(loop)
    step = builder.phi(I64)
    step.add_incoming(number(0), entry)
    sums = [[builder.phi(kind.sums) for _ in halves] for _ in range(rows)]
    here, columns = builder.add(matrix, builder.mul(step, matrix_stride)), []
    prefetch = _function(builder, "llvm.prefetch.p0", ir.VoidType(), I8.as_pointer(), I32, I32, I32)
    for half in halves:
        columns.append(builder.load(at(here, number(4 * LANES * half), I32S), align=4 * LANES))
        ahead = at(here, number(4 * LANES * half + AHEAD), I8)
        builder.call(prefetch, [ahead, *(ir.Constant(I32, option) for option in (0, 3, 1))])  # to read, soon, data
    added = []
    for row, old in enumerate(sums):
        word = builder.load(at(x, row_of(x_stride, row, builder.mul(step, number(4))), I32), align=4)
        undefined = ir.Constant(I32S, ir.Undefined)
        first = builder.insert_element(undefined, word, ir.Constant(I32, 0))
        everywhere = builder.shuffle_vector(first, undefined, ir.Constant(I32S, [0] * LANES))
        added.append([kind.add(builder, old[half], everywhere, columns[half]) for half in halves])
        for half in halves:
            old[half].add_incoming(begin[row][half], entry)
            old[half].add_incoming(added[row][half], loop)
    following = builder.add(step, number(1))
    step.add_incoming(following, loop)
    builder.cbranch(builder.icmp_signed("<", following, steps), loop, done)

    builder.position_at_end(done)
    for row in range(rows):
        for half in halves:
            result = kind.finish(builder, added[row][half])
            place = row_of(y_stride, row, number(kind.out_bytes * LANES * half))
            builder.store(result, at(y, place, result.type), align=kind.out_bytes)


tile_float32, tile_bfloat16, tile_int8 = _tile(_Float32), _tile(_BFloat16), _tile(_Int8)


@functools.cache
def has(feature: str) -> bool:
    """Whether this CPU has that feature, by LLVM's name."""
    try:
        return bool(llvmlite.binding.get_host_cpu_features().get(feature, False))
    except RuntimeError:  # LLVM can't tell
        return False


# -- rows of numbers -------------------------------------------------------------------------------------------------


@numba.njit
def widen(bits, out):
    """bfloat16, given as int16, to float32."""
    words = out.view(np.int32)
    for i in range(len(bits)):
        words[i] = np.int32(bits[i]) << np.int32(16)


@numba.njit
def narrow(x, out):
    """float32 to bfloat16 as int16, rounded to the nearest, ties to even; not for what is no number."""
    bits = x.view(np.int32)
    for i in range(len(x)):
        out[i] = np.int16((bits[i] + np.int32(0x7FFF) + ((bits[i] >> np.int32(16)) & np.int32(1))) >> np.int32(16))


@numba.njit
def exponentials(x, powers):
    """Turns float32 x into exp(x), in place: 0 below 2 ** -126, and never above 2 ** 127; ``powers`` is int32 scratch
    of the same length.

    exp(x) = 2 ** whole * 2 ** part, the latter by a polynomial on [-0.5, 0.5] with a relative error below 1e-7.
    """
    for i in range(len(x)):
        power = min(x[i] * LOG2_E, MOST)
        power = power if power > LEAST else LEAST
        whole = np.floor(power + np.float32(0.5))
        part = power - whole
        powers[i] = (np.int32(whole) + np.int32(127)) << np.int32(23)
        root = part * (C1 + part * (C2 + part * (C3 + part * (C4 + part * (C5 + part * C6)))))
        x[i] = root + np.float32(1) if power > LEAST else np.float32(0)
    factors = powers.view(np.float32)
    for i in range(len(x)):
        x[i] *= factors[i]
