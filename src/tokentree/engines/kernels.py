# numba gives every scalar a type of its own, and llvmlite is not typed:
# mypy: disable-error-code="no-untyped-def,no-untyped-call,no-any-return,untyped-decorator,attr-defined,call-arg"
"""Small matrix products that take as long as reading the matrix does, whatever rows go with a row.

Everything here rests on one loop, the *tile*: a few rows times a strip of `BLOCK` columns. The sums of up to
`TILE_ROWS` rows stay in registers, so that each number of the matrix is loaded once for all of them, and asked for
ahead. Up to several rows that costs no more than one row. A row's sums are added up in one order, so its bits never
depend on the others.

The loop is spelled out in LLVM's language and compiled by numba, so no C compiler is needed, and it takes the
instructions that the CPU has: AVX-512's dot products of bfloat16 and of 8 bits, or multiplications of numbers widened
first. Threads are those of torch's own pool.
"""

from __future__ import annotations

import functools

import llvmlite.binding
import numba
from llvmlite import ir
from numba.core import cgutils
from numba.extending import intrinsic


@functools.cache
def has(feature: str) -> bool:
    """Whether this CPU has that feature, by LLVM's name."""
    try:
        return bool(llvmlite.binding.get_host_cpu_features().get(feature, False))
    except RuntimeError:  # LLVM can't tell
        return False


# Sums in a register (or in two, where these are narrower), and as many rows as fill three quarters of all registers.
LANES, TILE_ROWS = (16, 12) if has("avx512bw") else (8, 6)
BLOCK = 2 * LANES  # columns that are computed together
AHEAD = 1024  # bytes, how far ahead weights are asked for
CHUNKS = 8  # shares per thread: the threads take them as they become free

I8, I16, I32, I64, F32 = *(ir.IntType(bits) for bits in (8, 16, 32, 64)), ir.FloatType()
F32S, I32S, I16S = (ir.VectorType(kind, LANES) for kind in (F32, I32, I16))
I16_PAIRS = ir.VectorType(I16, 2 * LANES)
I8_FOURS = I32S if llvmlite.binding.llvm_version_info[0] < 22 else ir.VectorType(I8, 4 * LANES)


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

    parts, sums, out_bytes = 1, F32S, 4

    @staticmethod
    def matrix_part(builder, words, part):
        """What `dot` takes of the matrix's words, in this part of them."""
        return words

    @staticmethod
    def dot(builder, sums, x, matrix):
        """``sums`` + what words of x and a part of the matrix's add to them."""
        name, x, matrix = f"llvm.fma.v{LANES}f32", builder.bitcast(x, F32S), builder.bitcast(matrix, F32S)
        return builder.call(_function(builder, name, F32S, F32S, F32S, F32S), [x, matrix, sums])

    @staticmethod
    def finish(builder, sums):
        """What is stored."""
        return sums


class _BFloat16(_Float32):
    """A word of the matrix is a pair of bfloat16, which become float32, as those of x are, by moving bits. The result
    is rounded to bfloat16."""

    parts, out_bytes = 2, 2

    @staticmethod
    def matrix_part(builder, words, part):
        return builder.and_(words, _all(-1 << 16)) if part else builder.shl(words, _all(16))

    @staticmethod
    def finish(builder, sums):
        bits = builder.bitcast(sums, I32S)
        even = builder.and_(builder.lshr(bits, _all(16)), _all(1))
        rounded = builder.add(builder.add(bits, _all(0x7FFF)), even)
        return builder.trunc(builder.lshr(rounded, _all(16)), I16S)


class _BFloat16Dots(_Float32):
    """A word is a pair of bfloat16, in both, which AVX-512 has dot products for."""

    out_bytes = 2

    @staticmethod
    def dot(builder, sums, x, matrix):
        dot = _function(builder, "llvm.x86.avx512bf16.dpbf16ps.512", F32S, F32S, PAIRS, PAIRS)
        return builder.call(dot, [sums, builder.bitcast(x, PAIRS), builder.bitcast(matrix, PAIRS)])

    @staticmethod
    def finish(builder, sums):
        narrow = _function(builder, "llvm.x86.avx512bf16.cvtneps2bf16.512", BF16S, F32S)
        return builder.bitcast(builder.call(narrow, [sums]), I16S)


class _Int8:
    """A word of the matrix is four numbers with a sign: the first pair in its even bytes, the second in the odd ones.
    They become 16 bits, as those of x are, two in a word. Sums are int32."""

    parts, sums, out_bytes = 2, I32S, 4

    @staticmethod
    def matrix_part(builder, words, part):
        eight, pairs = ir.Constant(I16_PAIRS, [8] * 2 * LANES), builder.bitcast(words, I16_PAIRS)
        return builder.bitcast(builder.ashr(pairs if part else builder.shl(pairs, eight), eight), I32S)

    @staticmethod
    def dot(builder, sums, x, matrix):
        for shift in (16, 0):
            numbers = (builder.ashr(builder.shl(words, _all(shift)), _all(16)) for words in (x, matrix))
            sums = builder.add(sums, builder.mul(*numbers))
        return sums

    @staticmethod
    def finish(builder, sums):
        return sums


class _Int8Pairs(_Int8):
    """With the dot products of pairs that AVX2 and AVX-512 have."""

    @staticmethod
    def dot(builder, sums, x, matrix):
        name = "llvm.x86.avx512.pmaddw.d.512" if LANES == 16 else "llvm.x86.avx2.pmadd.wd"
        pairs = builder.bitcast(x, I16_PAIRS), builder.bitcast(matrix, I16_PAIRS)
        sums = builder.add(sums, builder.call(_function(builder, name, I32S, I16_PAIRS, I16_PAIRS), pairs))
        # hidden from LLVM, which would add up the parts of a word first, and run out of registers
        return builder.asm(ir.FunctionType(I32S, [I32S]), "", "=v,0", [sums], side_effect=False)


class _Int8Dots(_Int8):
    """A word is four numbers, those of x without a sign: AVX-512's VNNI has dot products for them."""

    parts = 1

    @staticmethod
    def matrix_part(builder, words, part):
        return words

    @staticmethod
    def dot(builder, sums, x, matrix):
        dot = _function(builder, "llvm.x86.avx512.vpdpbusd.512", I32S, I32S, I8_FOURS, I8_FOURS)
        return builder.call(dot, [sums, builder.bitcast(x, I8_FOURS), builder.bitcast(matrix, I8_FOURS)])


def _all(value):
    return ir.Constant(I32S, [value] * LANES)


def _tile(kind):
    """An intrinsic: ``tile(rows, steps, matrix, matrix_stride, x, x_stride, start, start_stride, y, y_stride)``.

    y[rows, BLOCK] = start[rows, BLOCK] + x[rows, steps] @ matrix[steps, BLOCK]. The matrix holds words of 4 bytes, x as
    many for each of them as ``kind`` has parts, ``start`` what ``kind`` sums up in. All but ``rows``, up to
    `TILE_ROWS`, and ``steps``, at least 1, are addresses and strides in bytes.
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
    here = builder.add(matrix, builder.mul(step, matrix_stride))
    prefetch = _function(builder, "llvm.prefetch.p0", ir.VoidType(), I8.as_pointer(), I32, I32, I32)
    for half in halves:
        ahead = at(here, number(4 * LANES * half + AHEAD), I8)
        builder.call(prefetch, [ahead, *(ir.Constant(I32, option) for option in (0, 3, 1))])  # to read, soon, data
    added, undefined = [list(old) for old in sums], ir.Constant(I32S, ir.Undefined)
    for part in range(kind.parts):  # one behind another, and read again for each, as registers are few
        if part:  # so that LLVM doesn't read both parts at once
            builder.asm(ir.FunctionType(ir.VoidType(), []), "", "~{memory}", [], side_effect=True)
        columns = []
        for half in halves:
            words = builder.load(at(here, number(4 * LANES * half), I32S), align=4 * LANES)
            columns.append(kind.matrix_part(builder, words, part))
        offset = builder.add(builder.mul(step, number(4 * kind.parts)), number(4 * part))
        for row in range(rows):
            word, undefined = (
                builder.load(at(x, row_of(x_stride, row, offset), I32), align=4),
                ir.Constant(I32S, ir.Undefined),
            )
            first = builder.insert_element(undefined, word, ir.Constant(I32, 0))
            everywhere = builder.shuffle_vector(first, undefined, _all(0))
            for half in halves:
                added[row][half] = kind.dot(builder, added[row][half], everywhere, columns[half])
    for row, old in enumerate(sums):
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


_bfloat16 = _BFloat16Dots if LANES == 16 and has("avx512bf16") else _BFloat16
_int8 = _Int8Dots if LANES == 16 and has("avx512vnni") else _Int8Pairs if has("avx2") else _Int8
BFLOAT16_WIDE, INT8_WIDE = _bfloat16.parts == 2, _int8.parts == 2  # whether x is float32, or int16
tile_float32, tile_bfloat16, tile_int8 = _tile(_Float32), _tile(_bfloat16), _tile(_int8)
