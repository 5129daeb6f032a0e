# numba gives every scalar a type of its own:
# mypy: disable-error-code="no-untyped-def,no-untyped-call,no-any-return,untyped-decorator,attr-defined,call-arg"
"""Compiled loops in all of torch's threads at once, and arrays at addresses, which is how they get their work."""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numba
import torch
from llvmlite import ir
from numba.extending import intrinsic

I64 = ir.IntType(64)


def run(worker: Any, arguments: Sequence[int]) -> None:
    """Calls ``worker``, a C function of one address, in each of torch's threads at once, or in this one alone where
    torch's pool is unknown: with the address of ``arguments`` and, behind them, a counter that starts at 0."""
    packed = (ctypes.c_int64 * (len(arguments) + 1))(*arguments, 0)
    pool = _pool()
    if pool is None:
        worker.ctypes(packed)
    else:
        pool(worker.address, ctypes.addressof(packed), torch.get_num_threads(), 0)


@functools.cache
def barrier() -> int:
    """The address of a function that waits until all threads of `run` have come to call it, or 0 where there is one
    thread. What a thread wrote before, all see behind it."""
    library = _openmp()
    return 0 if library is None else ctypes.cast(library.GOMP_barrier, ctypes.c_void_p).value or 0


@functools.cache
def _pool() -> Any:
    """``GOMP_parallel(function, data, threads, flags)``, or None."""
    library = _openmp()
    if library is None:
        return None
    function = library.GOMP_parallel
    function.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint]
    function.restype = None
    return function


@functools.cache
def _openmp() -> Any:
    """The OpenMP library that torch itself runs on, or None where it is none of GCC's."""
    files = sorted((Path(torch.__file__).parent / "lib").glob("libgomp*.so*"))
    return ctypes.CDLL(str(files[0])) if files else None


WORKER = numba.void(numba.types.CPointer(numba.int64))  # the type of what threads run


@intrinsic
def claim(typingctx, counter):
    """Adds one to the integer at that address, and returns what it was before, alone among all threads."""

    def generate(context, builder, signature, args):
        return builder.atomic_rmw("add", builder.inttoptr(args[0], I64.as_pointer()), ir.Constant(I64, 1), "monotonic")

    return numba.int64(numba.int64), generate


@intrinsic
def call(typingctx, function):
    """Calls the C function without arguments at that address."""

    def generate(context, builder, signature, args):
        kind = ir.FunctionType(ir.VoidType(), [])
        builder.call(builder.inttoptr(args[0], kind.as_pointer()), [])
        return context.get_dummy_value()

    return numba.void(numba.int64), generate


@intrinsic
def address_of(typingctx, pointer):
    """The address in a pointer."""

    def generate(context, builder, signature, args):
        return builder.ptrtoint(args[0], I64)

    return numba.int64(pointer), generate


def _arrays(kind):
    """A function that gives the array of that kind and of a given shape at an address."""

    @intrinsic
    def pointer(typingctx, address):
        def generate(context, builder, signature, args):
            return builder.inttoptr(args[0], context.get_value_type(signature.return_type))

        return numba.types.CPointer(kind)(numba.int64), generate

    @numba.njit
    def array(address, shape):
        return numba.carray(pointer(address), shape)

    return array


floats, doubles = (_arrays(kind) for kind in (numba.float32, numba.float64))
halves, words, integers = (_arrays(kind) for kind in (numba.int16, numba.int32, numba.int64))
octets = _arrays(numba.int8)
