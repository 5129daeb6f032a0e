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
F32S, I32S = (ir.VectorType(kind, LANES) for kind in (F32, I32))


class _BFloat(ir.Type):  # type: ignore[misc]
    """bfloat16, which llvmlite has no type for."""

    def _to_string(self) -> str:
        return "bfloat"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _BFloat)

    def __hash__(self) -> int:
        return hash(_BFloat)


PAIRS = ir.VectorType(_BFloat(), 2 * LANES)


# -- the tile --------------------------------------------------------------------------------------------------------


def function(builder, name, result, *params):
    return cgutils.get_or_insert_function(builder.module, ir.FunctionType(result, params), name)


class _Float32:
    """A word is a number: fused multiply-add."""

    parts, sums = 1, F32S

    @staticmethod
    def matrix_part(builder, words, part):
        """What `dot` takes of the matrix's words, in this part of them."""
        return words

    @staticmethod
    def dot(builder, sums, x, matrix):
        """``sums`` + what words of x and a part of the matrix's add to them."""
        name, x, matrix = f"llvm.fma.v{LANES}f32", builder.bitcast(x, F32S), builder.bitcast(matrix, F32S)
        return builder.call(function(builder, name, F32S, F32S, F32S, F32S), [x, matrix, sums])


class _BFloat16(_Float32):
    """A word of the matrix is a pair of bfloat16, which become float32, as those of x are, by moving bits."""

    parts = 2

    @staticmethod
    def matrix_part(builder, words, part):
        return builder.and_(words, every(-1 << 16)) if part else builder.shl(words, every(16))


class _BFloat16Dots(_Float32):
    """A word is a pair of bfloat16, in both, which AVX-512 has dot products for."""

    @staticmethod
    def dot(builder, sums, x, matrix):
        dot = function(builder, "llvm.x86.avx512bf16.dpbf16ps.512", F32S, F32S, PAIRS, PAIRS)
        return builder.call(dot, [sums, builder.bitcast(x, PAIRS), builder.bitcast(matrix, PAIRS)])


def _tile(kind):
    """An intrinsic: ``tile(rows, steps, matrix, matrix_stride, x, x_stride, start, start_stride, y, y_stride)``.

    y[rows, BLOCK] = start[rows, BLOCK] + x[rows, steps] @ matrix[steps, BLOCK]. The matrix holds words of 4 bytes, x as
    many for each of them as ``kind`` has parts; ``start`` and y are float32. All but ``rows``, up to
    `TILE_ROWS`, and ``steps``, at least 1, are addresses and strides in bytes.
    """

    @intrinsic
    def tile(typingctx, rows, steps, matrix, matrix_stride, x, x_stride, start, start_stride, y, y_stride):
        def generate(context, builder, signature, args):
            emit_by_rows(builder, args[0], lambda rows: _emit_tile(builder, kind, rows, *args[1:]))
            return context.get_dummy_value()

        return numba.void(*[numba.int64] * 10), generate

    return tile


def _emit_tile(
    builder, kind, rows, steps, matrix, matrix_stride, x, x_stride, start, start_stride, y, y_stride
) -> None:  # fmt: skip
    begin = load_sums(builder, rows, start, start_stride)
    store_sums(builder, emit_steps(builder, kind, begin, steps, matrix, matrix_stride, x, x_stride), y, y_stride)


# -- what is emitted for it, and for `quants` --------------------------------------------------------------------------

HALVES = range(BLOCK // LANES)


def number(value):
    return ir.Constant(I64, value)


def every(value):
    """A constant in all lanes."""
    return ir.Constant(I32S, [value] * LANES)


def load(builder, kind, address, offset, align=4):
    pointer = builder.inttoptr(builder.add(address, offset), kind.as_pointer())
    return builder.load(pointer, align=align)


def load_sums(builder, rows, address, stride):
    """float32[rows, BLOCK] from there, by rows and halves."""
    return [
        [load(builder, F32S, address, _half_of(builder, stride, row, half)) for half in HALVES] for row in range(rows)
    ]


def store_sums(builder, sums, address, stride):
    for row, halves in enumerate(sums):
        for half, values in enumerate(halves):
            place = builder.add(address, _half_of(builder, stride, row, half))
            builder.store(values, builder.inttoptr(place, F32S.as_pointer()), align=4)


def _half_of(builder, stride, row, half):
    return builder.add(builder.mul(stride, number(row)), number(4 * LANES * half))


def emit_by_rows(builder, rows, emit):
    """What ``emit`` makes for each number of rows that there may be, chosen by ``rows``."""
    after = builder.append_basic_block("after")
    switch = builder.switch(rows, after)
    for count in range(1, TILE_ROWS + 1):
        with builder.goto_block(builder.append_basic_block(f"rows{count}")):
            switch.add_case(number(count), builder.block)
            emit(count)
            builder.branch(after)
    builder.position_at_end(after)


def everywhere(builder, word):
    """An i32 in all lanes."""
    undefined = ir.Constant(I32S, ir.Undefined)
    return builder.shuffle_vector(builder.insert_element(undefined, word, ir.Constant(I32, 0)), undefined, every(0))


def emit_steps(builder, kind, begin, steps, matrix, matrix_stride, x, x_stride):
    """The loop over words: returns ``begin``, sums of rows and halves, and what is added to them."""
    entry = builder.block
    loop, done = builder.append_basic_block("loop"), builder.append_basic_block("done")
    builder.branch(loop)
    builder.position_at_end(loop)
    step = builder.phi(I64)
    step.add_incoming(number(0), entry)
    sums = [[builder.phi(kind.sums) for _ in HALVES] for _ in begin]
    here = builder.add(matrix, builder.mul(step, matrix_stride))
    prefetch = function(builder, "llvm.prefetch.p0", ir.VoidType(), I8.as_pointer(), I32, I32, I32)
    for half in HALVES:
        ahead = builder.inttoptr(builder.add(here, number(4 * LANES * half + AHEAD)), I8.as_pointer())
        builder.call(prefetch, [ahead, *(ir.Constant(I32, option) for option in (0, 3, 1))])  # to read, soon, data
    added = [list(old) for old in sums]
    for part in range(kind.parts):  # one behind another, and read again for each, as registers are few
        if part:  # so that LLVM doesn't read them at once
            builder.asm(ir.FunctionType(ir.VoidType(), []), "", "~{memory}", [], side_effect=True)
        words = [load(builder, I32S, here, number(4 * LANES * half), 4 * LANES) for half in HALVES]
        columns = [kind.matrix_part(builder, half, part) for half in words]
        place = builder.add(builder.mul(step, number(4 * kind.parts)), number(4 * part))
        for row, old in enumerate(added):
            word = load(builder, I32, x, builder.add(builder.mul(x_stride, number(row)), place))
            for half in HALVES:
                old[half] = kind.dot(builder, old[half], everywhere(builder, word), columns[half])
    for old, first, last in zip(sums, begin, added, strict=True):
        for half in HALVES:
            old[half].add_incoming(first[half], entry)
            old[half].add_incoming(last[half], loop)
    following = builder.add(step, number(1))
    step.add_incoming(following, loop)
    builder.cbranch(builder.icmp_signed("<", following, steps), loop, done)
    builder.position_at_end(done)
    return added


_bfloat16 = _BFloat16Dots if LANES == 16 and has("avx512bf16") else _BFloat16
BFLOAT16_WIDE = _bfloat16.parts == 2  # whether x is float32
tile_float32, tile_bfloat16 = _tile(_Float32), _tile(_bfloat16)
