# numba gives every scalar a type of its own, and llvmlite is not typed:
# mypy: disable-error-code="no-untyped-def,no-untyped-call,no-any-return,untyped-decorator,attr-defined,call-arg"
"""Small matrix products that take as long as reading the matrix does, whatever rows go with a row.

Everything here rests on one loop, the *tile*: a few rows times a strip of `BLOCK` columns. The sums of up to
`TILE_ROWS` rows stay in registers, so that each number of the matrix is loaded once for all of them, and asked for
ahead. Up to 8 or 10 rows that costs no more than one row. A row's sums are added up in one order, so its bits never
depend on the others.

The loop is spelled out in LLVM's language and compiled by numba, so no C compiler is needed. For bfloat16 it is made of
AVX-512's dot products (`llvm.x86.avx512bf16.dpbf16ps.512`); for float32, of fused multiply-adds on any CPU. Threads are
those of torch's own pool.
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import llvmlite.binding
import numba
import torch
from llvmlite import ir
from numba.core import cgutils
from numba.extending import intrinsic

LANES = 16  # sums in a register
BLOCK = 2 * LANES  # columns that are computed together
TILE_ROWS = 12  # sums of 12 rows fill 24 registers
AHEAD = 1024  # bytes, how far ahead weights are asked for
CHUNKS = 8  # shares per thread: the threads take them as they become free

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
    """One number of x and of the matrix at a time, fused multiply-add."""

    out_bytes = 4

    @staticmethod
    def add(builder, old, x, weights):
        x, weights = (builder.bitcast(words, F32S) for words in (x, weights))
        return builder.call(_function(builder, "llvm.fma.v16f32", F32S, F32S, F32S, F32S), [x, weights, old])

    @staticmethod
    def finish(builder, sums):
        return sums


class _BFloat16:
    """A pair of numbers at a time, with float32 sums; the result is rounded."""

    out_bytes = 2

    @staticmethod
    def add(builder, old, x, weights):
        dot = _function(builder, "llvm.x86.avx512bf16.dpbf16ps.512", F32S, F32S, PAIRS, PAIRS)
        return builder.call(dot, [old, builder.bitcast(x, PAIRS), builder.bitcast(weights, PAIRS)])

    @staticmethod
    def finish(builder, sums):
        narrow = _function(builder, "llvm.x86.avx512bf16.cvtneps2bf16.512", BF16S, F32S)
        return builder.bitcast(builder.call(narrow, [sums]), I16S)


def _tile(kind):
    """An intrinsic: ``tile(rows, steps, matrix, matrix_stride, x, x_stride, start, start_stride, y, y_stride)``.

    y[rows, BLOCK] = start[rows, BLOCK] + x[rows, steps] @ matrix[steps, BLOCK], where numbers are what ``kind`` says:
    x and the matrix hold words of 4 bytes, ``start`` float32. All but ``rows``, up to `TILE_ROWS`, and ``steps``, at
    least 1, are addresses and strides in bytes.
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
        [builder.load(at(start, row_of(start_stride, row, number(4 * LANES * half)), F32S), align=4) for half in halves]
        for row in range(rows)
    ]
    entry = builder.block
    loop, done = builder.append_basic_block("loop"), builder.append_basic_block("done")
    builder.branch(loop)

    builder.position_at_end(loop)
    step = builder.phi(I64)
    step.add_incoming(number(0), entry)
    sums = [[builder.phi(F32S) for _ in halves] for _ in range(rows)]
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


tile_float32, tile_bfloat16 = _tile(_Float32), _tile(_BFloat16)


@intrinsic
def claim(typingctx, counter):
    """Adds one to the integer at that address, and returns what it was before, alone among all threads."""

    def generate(context, builder, signature, args):
        return builder.atomic_rmw("add", builder.inttoptr(args[0], I64.as_pointer()), ir.Constant(I64, 1), "monotonic")

    return numba.int64(numba.int64), generate


# -- memory ----------------------------------------------------------------------------------------------------------


@intrinsic
def address_of(typingctx, pointer):
    """The address in a pointer."""

    def generate(context, builder, signature, args):
        return builder.ptrtoint(args[0], I64)

    return numba.int64(pointer), generate


def _pointer(kind):
    @intrinsic
    def pointer(typingctx, address):
        def generate(context, builder, signature, args):
            return builder.inttoptr(args[0], context.get_value_type(signature.return_type))

        return numba.types.CPointer(kind)(numba.int64), generate

    return pointer


_to_float32, _to_float64, _to_int64 = (_pointer(kind) for kind in (numba.float32, numba.float64, numba.int64))


@numba.njit
def floats(address, shape):
    """The float32 array of that shape at ``address``."""
    return numba.carray(_to_float32(address), shape)


@numba.njit
def doubles(address, shape):
    """The float64 array of that shape at ``address``."""
    return numba.carray(_to_float64(address), shape)


@numba.njit
def integers(address, shape):
    """The int64 array of that shape at ``address``."""
    return numba.carray(_to_int64(address), shape)


# -- threads ---------------------------------------------------------------------------------------------------------


def run(worker: Any, arguments: Sequence[int]) -> None:
    """Calls ``worker``, a C function of one address, in each of torch's threads at once, or in this one alone where
    torch's pool is unknown: with the address of ``arguments`` and, behind them, a counter that starts at 0."""
    packed = (ctypes.c_int64 * (len(arguments) + 1))(*arguments, 0)
    pool = _pool()
    if pool is None:
        worker.ctypes(ctypes.cast(packed, ctypes.c_void_p))
    else:
        pool(worker.address, ctypes.addressof(packed), torch.get_num_threads(), 0)


@functools.cache
def _pool() -> Any:
    """``GOMP_parallel(function, data, threads, flags)`` of the OpenMP library that torch itself runs on, or None."""
    for file in sorted((Path(torch.__file__).parent / "lib").glob("libgomp*.so*")):
        function = ctypes.CDLL(str(file)).GOMP_parallel
        function.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint]
        function.restype = None
        return function
    return None


WORKER = numba.void(numba.types.CPointer(numba.int64))  # the type of what threads run


# -- linear layers ---------------------------------------------------------------------------------------------------


@functools.cache
def _product_worker() -> Any:
    """Compiled when first asked for, as not every CPU has the instructions."""

    @numba.cfunc(WORKER, cache=True)
    def worker(arguments):
        weights, x, x_stride, start, y, y_stride, steps, blocks, rows, share = numba.carray(arguments, 10)
        counter = address_of(arguments) + 8 * 10
        while True:
            first = claim(counter) * share
            if first >= blocks:
                return
            for block in range(first, min(first + share, blocks)):
                done = 0
                while done < rows:
                    passes = -(-(rows - done) // TILE_ROWS)
                    count = -(-(rows - done) // passes)
                    tile_bfloat16(
                        count, steps, weights + block * steps * 4 * BLOCK, 4 * BLOCK, x + done * x_stride, x_stride,
                        start + block * 4 * BLOCK, 0, y + done * y_stride + block * 2 * BLOCK, y_stride,
                    )  # fmt: skip
                    done += count

    return worker


@functools.cache
def supported() -> bool:
    """Whether this CPU has the dot products."""
    try:
        features = llvmlite.binding.get_host_cpu_features()
    except RuntimeError:  # LLVM can't tell
        return False
    return bool(features.get("avx512bf16", False))


def fits(weight: torch.Tensor) -> bool:
    """Whether a weight [outputs, inputs] can be packed."""
    outputs, inputs = weight.shape
    return weight.dtype is torch.bfloat16 and outputs % BLOCK == 0 and inputs % 2 == 0 and supported()


def pack(weight: torch.Tensor) -> torch.Tensor:
    """int32[outputs / BLOCK, inputs / 2, BLOCK]: pairs of the inputs' weights, a block of outputs behind another, of a
    bfloat16 ``weight`` [outputs, inputs]."""
    outputs, inputs = weight.shape
    pairs = weight.detach().contiguous().view(torch.int32)
    return pairs.view(outputs // BLOCK, BLOCK, inputs // 2).transpose(1, 2).contiguous()


def product(x: torch.Tensor, packed: torch.Tensor, start: torch.Tensor) -> torch.Tensor:
    """bfloat16[rows, outputs]: ``start`` + ``x`` @ weight.T, rounded once.

    Args:
        x: bfloat16[rows, inputs].
        packed: the weight, from `pack`.
        start: float32[outputs], the bias or zeros.
    """
    x = x.contiguous()
    rows, inputs = x.shape
    blocks, steps, _ = packed.shape
    if inputs != 2 * steps or x.dtype is not torch.bfloat16:
        raise ValueError(f"a product of {x.dtype} {tuple(x.shape)} with weights for {2 * steps} inputs")
    y = torch.empty(rows, blocks * BLOCK, dtype=torch.bfloat16)
    share = -(-blocks // (CHUNKS * torch.get_num_threads()))
    run(
        _product_worker(),
        [packed.data_ptr(), x.data_ptr(), 2 * inputs, start.data_ptr(), y.data_ptr(), 2 * blocks * BLOCK, steps, blocks,
         rows, share],
    )  # fmt: skip
    return y
