# numba gives every scalar a type of its own:
# mypy: disable-error-code="no-untyped-def,no-untyped-call,no-any-return,untyped-decorator,attr-defined,call-arg"
"""Compiled loops in all of torch's threads at once, and arrays at addresses, which is how they get their work."""

from __future__ import annotations

import ctypes
import functools
import operator
import os
import platform
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numba
import torch
from llvmlite import ir
from numba.core import cgutils
from numba.extending import intrinsic

from tokentree.errors import ForkError, ModelError, OptionError

I64 = ir.IntType(64)
SPINS = 1000  # looks at what a thread waits for before it leaves its core to others: some 50 microseconds

_one_at_a_time = threading.RLock()
_used_in = set[int]()  # processes that have used a model


def forked() -> bool:
    """Whether this process was forked from one that had used a model: its threads don't exist here, and whoever waited
    for them, or for a lock that they held, would wait for ever."""
    return bool(_used_in) and os.getpid() not in _used_in


def check_fork() -> None:
    """Raises `ForkError` in a process that was `forked`."""
    if forked():
        raise ForkError(
            "this process was forked from one that had used a model already, whose threads it doesn't have: start it "
            "with multiprocessing's 'spawn' method, or fork before the first model is made"
        )


def use_here() -> None:
    """Notes that this process uses a model.

    Raises:
        ForkError: see `check_fork`.
    """
    if (process := os.getpid()) not in _used_in:
        check_fork()
        _used_in.add(process)


def check_threads(count: Any) -> int:
    """``count``, a whole number of any type, as an int.

    Raises:
        OptionError: unless so many threads can work at once.
    """
    try:
        known = 0 if isinstance(count, bool) else operator.index(count)
    except TypeError:
        known = 0
    if not 1 <= known <= most_threads():
        raise OptionError(f"threads={count!r}: choose from 1 to {most_threads()}; this machine has {_cores()} cores")
    return known


def set_threads(count: Any) -> None:
    """``torch.set_num_threads``, for numbers that make sense; None leaves it as it is.

    Raises:
        OptionError: for others.
    """
    if count is not None:
        torch.set_num_threads(check_threads(count))


def most_threads() -> int:
    """More than so many are no use to anyone: eight for each core, since a process may not see all of them."""
    return 8 * _cores()


@functools.cache
def _cores() -> int:
    """Asked once: the system may take longer to count them than a step takes to draft."""
    return os.cpu_count() or 1


def num_threads() -> int:
    """How many threads `run` uses: as many as torch does, and at most `most_threads`."""
    return min(torch.get_num_threads(), most_threads())


def run(worker: Any, arguments: Sequence[int]) -> None:
    """Calls ``worker``, a C function of one address, in `num_threads` threads at once, or in this one alone where
    torch's pool is unknown: with the address of ``arguments`` and, behind them, a counter that starts at 0.

    Several Python threads may call it: they take turns.

    Raises:
        ForkError: see `check_fork`.
    """
    use_here()
    packed = (ctypes.c_int64 * (len(arguments) + 1))(*arguments, 0)
    pool = _pool()
    with _one_at_a_time:
        if pool is None:
            worker.ctypes(packed)
        else:
            pool(worker.address, ctypes.addressof(packed), num_threads(), 0)


def address(tensor: torch.Tensor, dtype: torch.dtype, *sizes: int) -> int:
    """Where the numbers of ``tensor`` lie, for a compiled loop that reads or writes so many of them by address. Whoever
    asks keeps the tensor as long as the loop may run.

    Raises:
        ModelError: unless they are of this type and these sizes, on the CPU, and behind one another.
    """
    fits = tensor.dtype is dtype and tuple(tensor.shape) == sizes
    if not (fits and tensor.device.type == "cpu" and tensor.is_contiguous()):
        found = f"{tensor.dtype} {list(tensor.shape)} on {tensor.device}"
        raise ModelError(f"a compiled loop needs {dtype} {list(sizes)} on the CPU, and there is {found}")
    return tensor.data_ptr()


@functools.cache
def rest() -> int:
    """The address of a function by which a thread leaves its core to others for a while, or 0."""
    function = getattr(ctypes.CDLL(None), "sched_yield", None) if os.name == "posix" else None
    return 0 if function is None else ctypes.cast(function, ctypes.c_void_p).value or 0


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


def _added(amount):
    """A function that adds so much to the integer at an address, and returns what it was before, alone among all
    threads. What a thread wrote before its call, those see whose calls come later."""

    @intrinsic
    def add(typingctx, address):
        def generate(context, builder, signature, args):
            place = builder.inttoptr(args[0], I64.as_pointer())
            return builder.atomic_rmw("add", place, ir.Constant(I64, amount), "acq_rel")

        return numba.int64(numba.int64), generate

    return add


claim = enter = _added(1)
leave = _added(-1)


@intrinsic
def _look(typingctx, address):
    """The integer at an address, which other threads may change."""

    def generate(context, builder, signature, args):
        return builder.load_atomic(builder.inttoptr(args[0], I64.as_pointer()), "acquire", 8)

    return numba.int64(numba.int64), generate


PAUSES = {"x86_64": "llvm.x86.sse2.pause", "AMD64": "llvm.x86.sse2.pause"}  # by architecture


@intrinsic
def _pause(typingctx):
    """Tells the core that this thread is waiting, where it has a word for that."""

    def generate(context, builder, signature, args):
        if name := PAUSES.get(platform.machine()):
            kind = ir.FunctionType(ir.VoidType(), [])
            builder.call(cgutils.get_or_insert_function(builder.module, kind, name), [])
        return context.get_dummy_value()

    return numba.void(), generate


@intrinsic
def _call(typingctx, function):
    """Calls the C function without arguments at that address."""

    def generate(context, builder, signature, args):
        kind = ir.FunctionType(ir.IntType(32), [])
        builder.call(builder.inttoptr(args[0], kind.as_pointer()), [])
        return context.get_dummy_value()

    return numba.void(numba.int64), generate


@numba.njit
def wait(inside, rest):
    """Returns when all threads that called `enter` at the address ``inside`` have called `leave`; what they wrote, this
    one then sees. For a moment it looks on, since the others are about to finish; after that it calls the function at
    ``rest``, if that isn't 0, between two looks: a thread that is late has lost its core, and may need this one."""
    looks = 0
    while _look(inside):
        looks += 1
        if looks > SPINS and rest:
            _call(rest)
        else:
            _pause()


@intrinsic
def address_of(typingctx, pointer):
    """The address in a pointer."""

    def generate(context, builder, signature, args):
        return builder.ptrtoint(args[0], I64)

    return numba.int64(pointer), generate


@intrinsic
def keep(typingctx, arrays):
    """Has these arrays live until here. Compiled code frees an array behind its last use, and reading what lies at its
    address is none; what another thread allocates next may lie there then."""

    def generate(context, builder, signature, args):
        return context.get_dummy_value()

    return numba.void(arrays), generate


def arrays_at(kind):
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


float32_at, float64_at = (arrays_at(kind) for kind in (numba.float32, numba.float64))
int16_at, int32_at, int64_at = (arrays_at(kind) for kind in (numba.int16, numba.int32, numba.int64))
int8_at = arrays_at(numba.int8)
