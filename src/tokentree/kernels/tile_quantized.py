# numba gives every scalar a type of its own, and llvmlite is not typed:
# mypy: disable-error-code="no-untyped-def,no-untyped-call,no-any-return,untyped-decorator,attr-defined,call-arg"
"""The tile on weights of 8 or 4 bits, numbers without a sign, with a scale and a least weight for each output and group
of inputs; x has 8 bits, with a scale for each row and group. Sums within a group are exact integers, and are added up
in float32 from group to group.

A strip of `BLOCK` outputs is kept as it is read: for each group its words, then scales and least weights in float16.
"""

from __future__ import annotations

import llvmlite.binding
import numba
from llvmlite import ir
from numba.extending import intrinsic

from tokentree.kernels.tile import (
    BLOCK,
    F32S,
    HALVES,
    I8,
    I16,
    I32,
    I32S,
    I64,
    LANES,
    emit_by_rows,
    emit_steps,
    every,
    everywhere,
    function,
    has,
    load,
    load_sums,
    number,
    store_sums,
)

F16S, I16_PAIRS = ir.VectorType(ir.HalfType(), LANES), ir.VectorType(I16, 2 * LANES)
I8_FOURS = I32S if llvmlite.binding.llvm_version_info[0] < 22 else ir.VectorType(I8, 4 * LANES)


class _Pairs:
    """Two weights at a time, of 16 bits, as those of x are, two in a word: a word of the matrix has the first pair in
    its even bytes, the second in the odd ones; with 4 bits, two more in the upper halves of these bytes."""

    sums = I32S

    def __init__(self, bits: int) -> None:
        self.bits, self.parts = bits, 16 // bits

    def matrix_part(self, builder, words, part):
        shift = 8 * (part % 2) + 4 * (part // 2)
        return builder.and_(builder.lshr(words, every(shift)), every(0x00FF00FF if self.bits == 8 else 0x000F000F))

    def dot(self, builder, sums, x, matrix):
        for shift in (16, 0):
            numbers = (builder.ashr(builder.shl(words, every(shift)), every(16)) for words in (x, matrix))
            sums = builder.add(sums, builder.mul(*numbers))
        return sums


class _PairDots(_Pairs):
    """With the dot products of pairs that AVX2 and AVX-512 have."""

    def dot(self, builder, sums, x, matrix):
        name = "llvm.x86.avx512.pmaddw.d.512" if LANES == 16 else "llvm.x86.avx2.pmadd.wd"
        pairs = builder.bitcast(x, I16_PAIRS), builder.bitcast(matrix, I16_PAIRS)
        sums = builder.add(sums, builder.call(function(builder, name, I32S, I16_PAIRS, I16_PAIRS), pairs))
        # hidden from LLVM, which would add up the parts of a word first, and run out of registers
        return builder.asm(ir.FunctionType(I32S, [I32S]), "", "=v,0", [sums], side_effect=False)


class _FourDots(_Pairs):
    """Four weights at a time, as AVX-512's VNNI has it: those of the matrix without a sign, those of x with one."""

    def __init__(self, bits: int) -> None:
        self.bits, self.parts = bits, 8 // bits

    def matrix_part(self, builder, words, part):
        if self.bits == 8:
            return words
        return builder.and_(builder.lshr(words, every(4 * part)), every(0x0F0F0F0F))

    def dot(self, builder, sums, x, matrix):
        dot = function(builder, "llvm.x86.avx512.vpdpbusd.512", I32S, I32S, I8_FOURS, I8_FOURS)
        return builder.call(dot, [sums, builder.bitcast(matrix, I8_FOURS), builder.bitcast(x, I8_FOURS)])


def _tile(kind):
    """An intrinsic: ``tile(rows, groups, steps, matrix, x, x_stride, scales, totals, by_row, y, y_stride)``.

    y[rows, BLOCK] += the sum over groups of scales[row, group] * matrix scales[group] * (x[row, group] @ matrix[group])
    + totals[row, group] * least weights[group], in float32. ``groups`` and ``steps``, the words of the matrix in a
    group, are at least 1; ``scales`` and ``totals`` (of a group of x, as the numbers that they stand for), both
    float32[rows, groups] with ``by_row`` bytes from one row to the next, are addresses, as are the others.
    """

    @intrinsic
    def tile(typingctx, rows, groups, steps, matrix, x, x_stride, scales, totals, by_row, y, y_stride):
        def generate(context, builder, signature, args):
            emit_by_rows(builder, args[0], lambda rows: _emit_tile(builder, kind, rows, *args[1:]))
            return context.get_dummy_value()

        return numba.void(*[numba.int64] * 11), generate

    return tile


def _emit_tile(builder, kind, rows, groups, steps, matrix, x, x_stride, scales, totals, by_row, y, y_stride) -> None:
    words_bytes = builder.mul(steps, number(4 * BLOCK))
    group_bytes = builder.add(words_bytes, number(4 * BLOCK))
    x_bytes = builder.mul(steps, number(4 * kind.parts))
    begin = load_sums(builder, rows, y, y_stride)
    entry = builder.block
    loop, done = builder.append_basic_block("groups"), builder.append_basic_block("summed")
    builder.branch(loop)

    builder.position_at_end(loop)
    group = builder.phi(I64)
    group.add_incoming(number(0), entry)
    old = [[builder.phi(F32S) for _ in HALVES] for _ in range(rows)]
    here = builder.add(matrix, builder.mul(group, group_bytes))
    at = builder.mul(group, number(4))
    places = [builder.add(builder.mul(by_row, number(row)), at) for row in range(rows)]
    zeros = [[every(0) for _ in HALVES] for _ in range(rows)]
    xs = builder.add(x, builder.mul(group, x_bytes))
    sums = emit_steps(builder, kind, zeros, steps, here, number(4 * BLOCK), xs, x_stride)
    behind, fma = builder.add(here, words_bytes), function(builder, f"llvm.fma.v{LANES}f32", F32S, F32S, F32S, F32S)
    for half in HALVES:
        outputs, least = (
            builder.fpext(load(builder, F16S, behind, number(2 * (part * BLOCK + LANES * half)), 2), F32S)
            for part in range(2)
        )
        for row in range(rows):
            scale, total = (
                builder.bitcast(everywhere(builder, load(builder, I32, of_rows, places[row])), F32S)
                for of_rows in (scales, totals)
            )
            exact = builder.sitofp(sums[row][half], F32S)
            new = builder.call(fma, [exact, builder.fmul(scale, outputs), old[row][half]])
            new = builder.call(fma, [total, least, new])
            old[row][half].add_incoming(begin[row][half], entry)
            old[row][half].add_incoming(new, builder.block)
            sums[row][half] = new
    following = builder.add(group, number(1))
    group.add_incoming(following, builder.block)
    builder.cbranch(builder.icmp_signed("<", following, groups), loop, done)

    builder.position_at_end(done)
    store_sums(builder, sums, y, y_stride)


_kind = _FourDots if LANES == 16 and has("avx512vnni") else _PairDots if has("avx2") else _Pairs
WIDE = _kind is not _FourDots  # whether x has 16 bits
tile_int8, tile_int4 = _tile(_kind(8)), _tile(_kind(4))
