# numba gives every scalar a type of its own, which annotations can't follow:
# mypy: disable-error-code="no-untyped-def,no-untyped-call,untyped-decorator,attr-defined,call-arg"
"""What an index says of keys, compiled: a score for each position on the path of a row.

A score is the sum over heads of a weight times the product of query and key, where that is positive. Products are
added up over a key's width, and heads one after another, each in one order. So a score has the same bits in any tree
and batch, and wherever the key lies in storage.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import numba
import numpy as np
from numpy.typing import NDArray

from tokentree.jit import cfunc, njit
from tokentree.kernels.attention import SEGMENT_BYTES, segments_at
from tokentree.kernels.records import record, record_at
from tokentree.kernels.threads import WORKER, address_of, claim, float32_at, keep
from tokentree.kernels.tile import BLOCK, TILE_ROWS, tile_float32

SHARE = 16  # blocks of keys that a thread takes at a time


class IndexCall(NamedTuple):
    """What `score` is told of a call, beside its segments."""

    queries: int  # address of float32[rows, heads, width]
    weights: int  # address of float32[rows, heads]
    scores: int  # address of float32[rows, columns]
    columns: int  # KV rows, in whole blocks, of the sequence that has most
    width: int
    heads: int
    segments: int


CALL_BYTES, call_at = record(IndexCall).itemsize, record_at(IndexCall)


@functools.cache
def score_worker() -> Any:
    """What each thread runs, compiled when first asked for. It is told, in integers, an `IndexCall` and `SegmentRows`
    of each segment, whose keys have one head."""

    @cfunc(WORKER, cache=True)
    def worker(arguments):
        start: int = address_of(arguments)
        call = call_at(start)
        table = segments_at(start + CALL_BYTES, call.segments)
        score(call, table, start + CALL_BYTES + SEGMENT_BYTES * call.segments)

    return worker


@numba.njit
def score(call, table, counter):
    """One thread's part: scores of some KV rows at a time, in the order of storage, as ``counter`` tells."""
    while True:
        task: int = claim(counter)
        for segment in table:
            blocks = -(-(segment.prefix + segment.first + segment.rows) // BLOCK)
            shares = -(-blocks // SHARE)
            if task < shares:
                _score(call, segment, task * SHARE, min((task + 1) * SHARE, blocks))
                break
            task -= shares
        else:
            return


@numba.njit
def _score(call, segment, first, end):
    """Of all rows of a segment, for blocks ``first`` to ``end`` of its keys."""
    width, heads = call.width, call.heads
    nothing, products = np.zeros(BLOCK, np.float32), np.empty((TILE_ROWS, BLOCK), np.float32)
    at_nothing, at_products = nothing.ctypes.data, products.ctypes.data
    for block in range(first, end):
        keys = segment.keys + 4 * block * width * BLOCK
        for row in range(segment.start, segment.start + segment.rows):
            sums = float32_at(call.scores + 4 * (row * call.columns + block * BLOCK), BLOCK)
            weights = float32_at(call.weights + 4 * row * heads, heads)
            sums[:] = 0
            for head in range(0, heads, TILE_ROWS):
                count = min(TILE_ROWS, heads - head)
                tile_float32(
                    count, width, keys, 4 * BLOCK, call.queries + 4 * width * (row * heads + head), 4 * width,
                    at_nothing, 0, at_products, 4 * BLOCK,
                )  # fmt: skip
                for i in range(count):
                    for place in range(BLOCK):
                        sums[place] += weights[head + i] * max(products[i, place], np.float32(0))
    keep((nothing, products))


@njit(cache=True)
def along_paths(scores: NDArray[np.float32], paths: NDArray[np.int64], prefix: int) -> None:
    """Puts scores float32[rows, columns], which are in the order of storage, where they are on the path of each row;
    ``paths`` is `Segment.paths` of a tree that is no chain."""
    for i in range(len(paths)):
        for t in range(paths[i, 0]):  # an ancestor never lies before its place on the path
            scores[i, prefix + t] = scores[i, paths[i, 1 + t]]
