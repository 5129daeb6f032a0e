# numba gives every scalar a type of its own, which annotations can't follow:
# mypy: disable-error-code="arg-type,assignment,index,no-any-return,call-arg,var-annotated"
# mypy: allow-untyped-defs, allow-untyped-calls
"""The most probable tokens of rows of logits, each logit read once.

Floating-point numbers order as the integers with their sign and their other bits for a magnitude. So the search is one
over integers: per row, the maximum of each of many interleaved columns, which compiles to vector instructions, and then
a closer look at the few columns with the largest maxima, where the largest logits lie.
"""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from tokentree.jit import cfunc, njit
from tokentree.kernels.bfloat16 import exponentials, widen
from tokentree.kernels.copying import copy_into
from tokentree.kernels.threads import WORKER, address_of, claim, float32_at, int16_at, int64_at, run
from tokentree.tree import Ints

DEPTH = 32  # values in a column
LANES = 16  # sums that are added up side by side
STRETCH = 1024  # logits whose exponentials are taken at a time
INTEGERS = {
    torch.float64: torch.int64,
    torch.float32: torch.int32,
    torch.bfloat16: torch.int16,
    torch.float16: torch.int16,
}


def top_logits(logits: torch.Tensor, k: int) -> tuple[NDArray[np.float32], Ints]:
    """The k largest of each row of ``logits`` [n, vocab]: values float32[n, k] and ids int64[n, k], best first; of
    equal ones the lowest ids."""
    if logits.device.type != "cpu" or logits.dtype not in INTEGERS:
        best = (
            logits.sort(dim=-1, descending=True, stable=True) if logits.device.type == "cpu" else logits.topk(k, dim=-1)
        )
        return best.values[:, :k].float().cpu().numpy(), best.indices[:, :k].cpu().numpy()
    logits = logits.detach().contiguous()
    if logits.dtype == torch.bfloat16:
        values, ids, _ = _of_bfloat16(logits, k, None)
        return values, ids
    ids = _top(logits.view(INTEGERS[logits.dtype]).numpy(), k)
    return logits.gather(1, torch.from_numpy(ids)).float().numpy(), ids


def top_logprobs(
    logits: torch.Tensor, k: int, divisors: float | NDArray[np.float32] = 1.0
) -> tuple[NDArray[np.float32], Ints]:  # fmt: skip
    """The k most probable tokens of each row of ``logits`` [n, vocab], as `top_logits` has them, and their
    log-probabilities in softmax(logits / divisor), float32[n, k].

    Args:
        divisors: of all rows, or one of each.
    """
    each = np.array(np.broadcast_to(np.asarray(divisors, np.float32), len(logits)))
    if logits.device.type == "cpu" and logits.dtype == torch.bfloat16 and k > 0:
        values, ids, sums = _of_bfloat16(logits.detach().contiguous(), k, each)
    else:
        values, ids = top_logits(logits, k)
        sums = (logits.float() / torch.from_numpy(each).to(logits.device)[:, None]).logsumexp(-1).cpu().numpy()
    return values / each[:, None] - sums[:, None], ids


def greedy(logits: torch.Tensor) -> int:
    """The most probable token of ``logits`` [vocab]; equal logits take the lowest id."""
    if logits.device.type != "cpu":
        return int(logits.argmax())
    return int(_top(logits.detach().contiguous()[None].view(INTEGERS[logits.dtype]).numpy(), 1)[0, 0])


def _of_bfloat16(
    logits: torch.Tensor, k: int, divisors: NDArray[np.float32] | None
) -> tuple[NDArray[np.float32], Ints, NDArray[np.float32]]:
    """Values float32[n, k] and ids int64[n, k] of the most probable tokens, and, with ``divisors`` float32[n], the
    logarithm of each row's sum of exp(logit / divisor), float32[n]."""
    rows, vocab = logits.shape
    values, ids, sums = np.empty((rows, k), np.float32), np.empty((rows, k), np.int64), np.empty(rows, np.float32)
    places = [array.ctypes.data for array in (values, ids, sums)]
    run(_worker(), [logits.data_ptr(), rows, vocab, k, *places, 0 if divisors is None else divisors.ctypes.data])
    return values, ids, sums


@functools.cache
def _worker() -> Any:
    """What each thread runs on rows of bfloat16: one after another, of those that no other thread has taken. It is
    told the address of the rows, how many they are and how long, k, the addresses of the results, and that of the
    divisors, or 0 where no sums are wanted."""

    @cfunc(WORKER, cache=True)
    def worker(arguments):
        start = address_of(arguments)
        logits, rows, vocab, k, values, ids, sums, divisors = int64_at(start, 8)
        x = np.empty(STRETCH, np.float32)
        row = claim(start + 64)
        while row < rows:
            bits, best = int16_at(logits + 2 * vocab * row, vocab), float32_at(values + 4 * k * row, k)
            most_probable(bits, best, int64_at(ids + 8 * k * row, k))
            if divisors:
                total = sum_of_powers(bits, best[0], float32_at(divisors + 4 * row, 1)[0], x)
                float32_at(sums + 4 * row, 1)[0] = total
            row = claim(start + 64)

    return worker


@njit
def sum_of_powers(bits, highest, divisor, x):
    """log(sum(exp(logit / divisor))), where ``highest`` is the largest of the logits; ``x`` is scratch of `STRETCH`
    numbers."""
    factor, total = np.float32(1) / divisor, np.float64(0)
    for first in range(0, len(bits), STRETCH):
        part = x[: min(STRETCH, len(bits) - first)]
        widen(bits[first : first + len(part)], part)
        for i in range(len(part)):
            part[i] = (part[i] - highest) * factor
        exponentials(part)
        total += sum_of(part)
    return np.float32(np.log(total)) + highest * factor


@njit
def most_probable(bits, values, ids):
    """Finds, of a row of bfloat16, as many of the most probable as there is room for: their values, float32, and which
    they are, best first."""
    copy_into(ids, _top(bits[None], len(ids))[0])
    widen(bits[ids], values)


@njit
def largest(x, k):
    """Which of float32 numbers are the k largest, int64[k], best first."""
    return _top(x.view(np.int32)[None], k)[0]


@njit
def sum_of(x):
    """The sum of float32 numbers."""
    lanes = np.zeros(LANES, np.float32)
    whole = len(x) // LANES * LANES
    for start in range(0, whole, LANES):
        for lane in range(LANES):
            lanes[lane] += x[start + lane]
    total = np.float32(0)
    for lane in range(LANES):
        total += lanes[lane]
    for i in range(whole, len(x)):
        total += x[i]
    return total


@njit(cache=True)
def _top(bits: NDArray[np.integer], k: int) -> Ints:
    rows, vocab = bits.shape
    below = np.iinfo(bits.dtype).max
    below = bits.dtype.type(below)
    width = vocab // DEPTH  # the last few logits lie in no column
    ids, keys = np.empty((rows, k), np.int64), np.empty(k, bits.dtype)
    highest = np.empty(width, bits.dtype)
    picked, peaks = np.empty(width, np.int64), np.empty(min(k, max(1, width)), bits.dtype)
    for row in range(rows):
        _column_maxima(bits[row], below, highest)
        found = 0
        for column in range(width):
            if found < len(peaks) or highest[column] > peaks[-1]:
                found = _insert(picked, peaks, found, column, highest[column])
        count = 0
        for column in range(width):  # all that hold one of the largest, as of equal values the lowest id is wanted
            if highest[column] >= peaks[found - 1]:
                picked[count] = column
                count += 1
        found = 0
        for start in range(0, DEPTH * width, max(1, width)):
            for column in picked[:count]:
                key = _key(bits[row, start + column], below)
                found = _insert(ids[row], keys, found, start + column, key)
        for token in range(DEPTH * width, vocab):
            found = _insert(ids[row], keys, found, token, _key(bits[row, token], below))
    return ids


@njit(cache=True)
def _column_maxima(bits: NDArray[np.integer], below: np.integer, highest: NDArray[np.integer]) -> None:
    width = len(highest)
    highest[:] = ~below
    for row in range(DEPTH):  # a constant: else the compiler must allow for indices below 0, and uses no vectors
        for column in range(width):
            highest[column] = max(highest[column], _key(bits[row * width + column], below))


@njit(cache=True)
def _key(bit: np.integer, below: np.integer) -> np.integer:
    """Orders as the floating-point numbers do whose bits these are: a sign, and a magnitude ``below`` it."""
    minus = -int(bit < 0)
    return type(below)(((bit & below) ^ minus) - minus)


@njit(cache=True)
def _insert(ids: Ints, keys: NDArray[np.integer], found: int, new: int, key: int) -> int:
    """Puts ``new`` where it belongs among the ``found`` best so far; of equal ones the first stays ahead."""
    if found < len(keys):
        found += 1
    elif keys[found - 1] >= key:
        return found
    place = found - 1
    while place > 0 and keys[place - 1] < key:
        keys[place], ids[place] = keys[place - 1], ids[place - 1]
        place -= 1
    keys[place], ids[place] = key, new
    return found
