# numba gives every scalar a type of its own, and llvmlite is not typed:
# mypy: disable-error-code="no-untyped-def,no-untyped-call,no-any-return,untyped-decorator,attr-defined,call-arg"
"""Products with a weight matrix, made of the vector dot products of AVX-512: `llvm.x86.avx512bf16.dpbf16ps.512`.

A product of few rows takes as long as reading the weights does, if it can be computed while they arrive. Here each
pass over a block of 32 outputs keeps up to `TILE_ROWS` rows' sums in registers, so that a weight is loaded once for all
of them, and asks for the weights ahead. Up to 8 or 10 rows that costs no more than one row.

A row's sums are added up in one order, whatever rows go with it: its bits never change.

The instructions are spelled out in LLVM's language and compiled by numba, so no C compiler is needed. Threads are those
of torch's own pool.
"""

from __future__ import annotations

import ctypes
import functools
import sys
from pathlib import Path
from typing import Any

import llvmlite.binding
import numba
import torch
from llvmlite import ir
from numba.core import cgutils
from numba.extending import intrinsic

LANES = 16  # sums in a register
BLOCK = 2 * LANES  # outputs that are computed together
TILE_ROWS = 12  # sums of 12 rows fill 24 registers
AHEAD = 1024  # bytes, how far ahead weights are asked for
CHUNKS = 8  # shares per thread: the threads take them as they become free

I8, I16, I32, I64 = (ir.IntType(bits) for bits in (8, 16, 32, 64))
F32S, I32S, I16S = (ir.VectorType(kind, LANES) for kind in (ir.FloatType(), I32, I16))


class _BFloat(ir.Type):  # type: ignore[misc]
    """bfloat16, which llvmlite has no type for."""

    def _to_string(self) -> str:
        return "bfloat"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _BFloat)

    def __hash__(self) -> int:
        return hash(_BFloat)


PAIRS, BF16S = ir.VectorType(_BFloat(), 2 * LANES), ir.VectorType(_BFloat(), LANES)


# -- the kernel ----------------------------------------------------------------------------------------------------


@intrinsic
def _tile(typingctx, rows, weights, x, x_stride, start, y, y_stride, steps):
    """y[rows, BLOCK] = start[BLOCK] + x[rows, 2 * steps] @ weights[steps, BLOCK, 2]; addresses, and strides in bytes.

    One loop for each number of rows up to `TILE_ROWS`, with all sums in registers.
    """

    def generate(context, builder, signature, args):
        rows, *rest = args
        after = builder.append_basic_block("after")
        switch = builder.switch(rows, after)
        for count in range(1, TILE_ROWS + 1):
            with builder.goto_block(builder.append_basic_block(f"rows{count}")):
                switch.add_case(ir.Constant(I64, count), builder.block)
                _emit_tile(builder, count, *rest)
                builder.branch(after)
        builder.position_at_end(after)
        return context.get_dummy_value()

    return numba.void(*[numba.int64] * 8), generate


def _emit_tile(builder, rows, weights, x, x_stride, start, y, y_stride, steps) -> None:
    def at(address, offset, kind):
        return builder.inttoptr(builder.add(address, offset), kind.as_pointer())

    def number(value):
        return ir.Constant(I64, value)

    def function(name, result, *params):
        return cgutils.get_or_insert_function(builder.module, ir.FunctionType(result, params), name)

    dot = function("llvm.x86.avx512bf16.dpbf16ps.512", F32S, F32S, PAIRS, PAIRS)
    narrow = function("llvm.x86.avx512bf16.cvtneps2bf16.512", BF16S, F32S)
    prefetch = function("llvm.prefetch.p0", ir.VoidType(), I8.as_pointer(), I32, I32, I32)
    halves = range(BLOCK // LANES)

    begin = [builder.load(at(start, number(4 * LANES * half), F32S), align=4) for half in halves]
    entry = builder.block
    loop, done = builder.append_basic_block("loop"), builder.append_basic_block("done")
    builder.branch(loop)

    builder.position_at_end(loop)
    step = builder.phi(I64)
    step.add_incoming(number(0), entry)
    sums = [[builder.phi(F32S) for _ in halves] for _ in range(rows)]
    here = builder.add(weights, builder.mul(step, number(4 * BLOCK)))
    loaded = []
    for half in halves:
        place = number(4 * LANES * half)
        loaded.append(builder.bitcast(builder.load(at(here, place, I32S), align=64), PAIRS))
        ahead = at(here, number(4 * LANES * half + AHEAD), I8)
        builder.call(prefetch, [ahead, *(ir.Constant(I32, option) for option in (0, 3, 1))])  # to read, soon, data
    added = []
    for row, old in enumerate(sums):
        offset = builder.add(builder.mul(x_stride, number(row)), builder.mul(step, number(4)))
        pair = builder.load(at(x, offset, I32), align=4)
        undefined = ir.Constant(I32S, ir.Undefined)
        first = builder.insert_element(undefined, pair, ir.Constant(I32, 0))
        everywhere = builder.bitcast(builder.shuffle_vector(first, undefined, ir.Constant(I32S, [0] * LANES)), PAIRS)
        added.append([builder.call(dot, [old[half], everywhere, loaded[half]]) for half in halves])
        for half in halves:
            old[half].add_incoming(begin[half], entry)
            old[half].add_incoming(added[row][half], loop)
    following = builder.add(step, number(1))
    step.add_incoming(following, loop)
    builder.cbranch(builder.icmp_signed("<", following, steps), loop, done)

    builder.position_at_end(done)
    for row in range(rows):
        for half in halves:
            offset = builder.add(builder.mul(y_stride, number(row)), number(2 * LANES * half))
            builder.store(builder.bitcast(builder.call(narrow, [added[row][half]]), I16S), at(y, offset, I16S), align=2)


@intrinsic
def _claim(typingctx, counter):
    """Adds one to the integer at that address, and returns what it was before, alone among all threads."""

    def generate(context, builder, signature, args):
        return builder.atomic_rmw("add", builder.inttoptr(args[0], I64.as_pointer()), ir.Constant(I64, 1), "monotonic")

    return numba.int64(numba.int64), generate


@functools.cache
def _worker() -> Any:
    """What each thread runs, compiled when first asked for: ``worker(address of int64[11])``."""

    @numba.cfunc(numba.void(numba.types.CPointer(numba.int64)), cache=True)
    def worker(arguments):
        weights, x, x_stride, start, y, y_stride, steps, blocks, rows, share, counter = numba.carray(arguments, 11)
        while True:
            first = _claim(counter) * share
            if first >= blocks:
                return
            for block in range(first, min(first + share, blocks)):
                done = 0
                while done < rows:
                    passes = -(-(rows - done) // TILE_ROWS)
                    count = -(-(rows - done) // passes)
                    _tile(
                        count, weights + block * steps * 4 * BLOCK, x + done * x_stride, x_stride,
                        start + block * 4 * BLOCK, y + done * y_stride + block * 2 * BLOCK, y_stride, steps,
                    )  # fmt: skip
                    done += count

    return worker


# -- from Python -----------------------------------------------------------------------------------------------------


@functools.cache
def supported() -> bool:
    """Whether this CPU has the instructions, and this torch the pool of threads."""
    try:
        features = llvmlite.binding.get_host_cpu_features()
    except RuntimeError:  # LLVM can't tell
        return False
    return sys.platform == "linux" and features.get("avx512bf16", False) and _pool() is not None


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
    threads = torch.get_num_threads()
    counter = ctypes.c_int64(0)
    arguments = (ctypes.c_int64 * 11)(
        packed.data_ptr(), x.data_ptr(), 2 * inputs, start.data_ptr(), y.data_ptr(), 2 * blocks * BLOCK, steps, blocks,
        rows, -(-blocks // (CHUNKS * threads)), ctypes.addressof(counter),
    )  # fmt: skip
    pool = _pool()
    assert pool is not None
    pool(_worker().address, ctypes.addressof(arguments), threads, 0)
    return y


@functools.cache
def _pool() -> Any:
    """``GOMP_parallel(function, data, threads, flags)`` of the OpenMP library that torch itself runs on, or None."""
    for file in sorted((Path(torch.__file__).parent / "lib").glob("libgomp*.so*")):
        run = ctypes.CDLL(str(file)).GOMP_parallel
        run.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint]
        run.restype = None
        return run
    return None
