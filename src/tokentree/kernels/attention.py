# numba gives every scalar a type of its own, which annotations can't follow:
# mypy: disable-error-code="no-untyped-def,no-untyped-call,untyped-decorator,attr-defined,call-arg"
"""Attention of a tree's rows over what each of them sees, compiled: the loops under `attention`.

A row sees the committed rows of its sequence and its own ancestors. Its sums, of scores over a key's width, of weights
and of weighted values over positions, are added up in an order that depends on nothing but absolute positions, each
for itself: whatever tree, batch or place in storage a row has, its bits are those of decoding its path alone.
"""

from __future__ import annotations

import functools
import math
from typing import Any, NamedTuple

import numba
import numpy as np

from tokentree.jit import cfunc
from tokentree.kernels.bfloat16 import exponentials, narrow
from tokentree.kernels.copying import copy_into
from tokentree.kernels.records import record, record_at, records_at
from tokentree.kernels.threads import (
    WORKER,
    address_of,
    claim,
    float32_at,
    float64_at,
    int16_at,
    int32_at,
    int64_at,
    keep,
)
from tokentree.kernels.tile import BLOCK, LANES, TILE_ROWS, tile_float32

HIDDEN = np.float32(-math.inf)


class AttentionCall(NamedTuple):
    """What `attend` is told of a call, beside its segments. Strides are in bytes."""

    queries: int  # address of float32[heads, rows, width]
    queries_head: int  # stride from head to head
    queries_row: int
    results: int  # address of [heads, rows, value width]
    results_head: int
    results_row: int
    width: int
    value_width: int
    group: int  # query heads per KV head
    window: int  # positions that are seen, or 0: all
    chunk: int  # positions of a chunk, of which a row sees its own alone, or 0: all
    biases: int  # address of float32[heads, positions], by the position of a key, or 0: none
    biases_head: int  # stride from head to head
    chosen: int  # address of int32[rows, most], positions that a row sees, ascending, or 0: all
    most: int
    relative: int  # address of float32[rows, heads, extent], biases by how far a key lies before a row, or 0: none
    extent: int  # positions that have such biases
    heads: int
    segments: int
    rounded: int  # 1 if results are bfloat16, 0 if they are float32


class SegmentRows(NamedTuple):
    """What `attend` is told of a segment: its KV, as `kv.BlockedKV` has it, and its rows."""

    keys: int  # addresses of the first layer's keys and values
    values: int
    capacity: int  # rows that there is room for
    prefix: int  # committed rows
    rows: int  # new rows
    start: int  # the first of these among the queries
    paths: int  # address of int64[rows, 1 + longest]: how long a row's path is, then the KV rows on it
    longest: int
    chain: int  # 1 if the tree is a chain, whose KV rows are not listed
    first: int  # nodes that were computed before
    keys_layer: int  # bytes from one layer's keys, and values, to the next's
    values_layer: int


CALL_BYTES, SEGMENT_BYTES = record(AttentionCall).itemsize, record(SegmentRows).itemsize
call_at, segments_at = record_at(AttentionCall), records_at(SegmentRows)


@numba.njit
def _soften(scores, scale, softcap, sink):
    """Turns scores into weights relative to the largest, in place, and returns their sum; hidden ones get 0. ``sink``
    is a score that belongs to no position, -inf where there is none."""
    lanes = np.full(LANES, HIDDEN, np.float32)
    for start in range(0, len(scores), LANES):
        for lane in range(LANES):
            score = scores[start + lane] * scale
            if softcap > 0:
                score = np.float32(math.tanh(score / softcap)) * softcap if score > HIDDEN else score
            scores[start + lane] = score
            lanes[lane] = max(lanes[lane], score)
    top = sink
    for lane in range(LANES):
        top = max(top, lanes[lane])
    for i in range(len(scores)):
        scores[i] -= top
    exponentials(scores)
    lanes[:] = 0
    for start in range(0, len(scores), LANES):
        for lane in range(LANES):
            lanes[lane] += scores[start + lane]
    total = np.float32(0)
    for lane in range(LANES):
        total += lanes[lane]
    if sink > HIDDEN:
        lanes[0] = sink - top
        exponentials(lanes[:1])
        total += lanes[0]
    return total


@numba.njit
def _first_seen(end, window, chunk):
    """The first position that a row sees, which is the last one before ``end``."""
    if chunk:
        return (end - 1) // chunk * chunk
    return max(0, end - window) if window else 0


@numba.njit
def _span(path, prefix, window, chunk):
    """The first and the last KV row that any of these rows sees, as whole blocks."""
    first, last = 1 << 60, 0
    for i in range(len(path)):
        first = min(first, _first_seen(prefix + path[i, 0], window, chunk))
        last = max(last, prefix + path[i, 0], path[i, 1:].max() + 1 if path.shape[1] > 1 else 0)
    return first // BLOCK * BLOCK, -(-last // BLOCK) * BLOCK


@numba.njit
def _attend(call, numbers, segment, layer, head, together, first, count):
    """Rows ``first`` to ``first + count`` of a segment, for ``together`` heads of queries from ``head`` on, which read
    the same keys and values. What is by row here has the heads of a row behind one another."""
    query, query_head, query_row = call.queries, call.queries_head, call.queries_row
    out, out_head, out_row = call.results, call.results_head, call.results_row
    width, value_width, group, window, chunk = call.width, call.value_width, call.group, call.window, call.chunk
    capacity, prefix, start, chain = segment.capacity, segment.prefix, segment.start, segment.chain
    scale, softcap = np.float32(numbers[0]), np.float32(numbers[1])
    columns = -(-value_width // BLOCK) * BLOCK
    keys = segment.keys + layer * segment.keys_layer + head // group * capacity * width * 4
    values = segment.values + layer * segment.values_layer + head // group * capacity * columns * 4
    path = int64_at(segment.paths, (segment.rows, 1 + segment.longest))[first : first + count]
    behind = path[0, 0] - 1 if chain else 0  # rows of the tree that all of these see
    shared = prefix + behind
    begin, used = _span(path, prefix, window, chunk)

    rows = count * together
    queries = np.empty((rows, width), np.float32)
    scores = np.empty((rows, used - begin), np.float32)
    sums, totals = np.zeros((rows, columns), np.float32), np.empty(rows, np.float32)
    at_queries, at_scores, at_sums = queries.ctypes.data, scores.ctypes.data, sums.ctypes.data
    stride, wide = 4 * (used - begin), 4 * columns

    for i in range(rows):
        place = query + (head + i % together) * query_head + (start + first + i // together) * query_row
        copy_into(queries[i], float32_at(place, width))
    for block in range(begin // BLOCK, used // BLOCK):
        tile_float32(
            rows, width, keys + block * width * BLOCK * 4, BLOCK * 4, at_queries, 4 * width, at_sums, 0,
            at_scores + 4 * (block * BLOCK - begin), stride,
        )  # fmt: skip
    for i in range(rows):
        own, seen = scores[i], path[i // together]
        end = prefix + seen[0]
        if not chain:
            for t in range(max(0, begin - prefix), seen[0]):  # an ancestor never lies before its place on the path
                own[prefix + t - begin] = own[seen[1 + t] - begin]
        head_of, row_of = head + i % together, start + first + i // together
        factor = _biased(call, own[: end - begin], scale, head_of, row_of, begin)
        own[end - begin :] = HIDDEN
        own[: _first_seen(end, window, chunk) - begin] = HIDDEN
        if call.chosen:
            _hide_others(own[: end - begin], int32_at(call.chosen + 4 * call.most * row_of, call.most), begin)
        sink = np.float32(numbers[2 + head_of]) if len(numbers) > 2 else HIDDEN
        totals[i] = _soften(own, factor, softcap, sink)

    for column in range(0, columns, BLOCK):
        if shared > begin:
            tile_float32(
                rows, shared - begin, values + begin * wide + 4 * column, wide, at_scores, stride, at_sums + 4 * column,
                wide, at_sums + 4 * column, wide,
            )  # fmt: skip
        for i in range(rows):
            at_sum, seen = at_sums + i * wide + 4 * column, path[i // together]
            for t in range(max(behind, begin - prefix), seen[0]):
                row = prefix + t if chain else seen[1 + t]
                tile_float32(
                    1, 1, values + row * wide + 4 * column, 0, at_scores + i * stride + 4 * (prefix + t - begin), 0,
                    at_sum, 0, at_sum, 0,
                )  # fmt: skip
    for i in range(rows):
        sums[i] /= totals[i]
        place = out + (head + i % together) * out_head + (start + first + i // together) * out_row
        _store(sums[i, :value_width], place, call.rounded)
    keep((queries, scores, sums))


@numba.njit
def _biased(call, scores, scale, head, row, begin):
    """Scales scores, those of positions from ``begin`` to the row's own, and adds their biases, if there are any.
    Returns what they are still to be scaled by."""
    if not call.biases and not call.relative:
        return scale
    end = begin + len(scores)
    for i in range(len(scores)):
        scores[i] *= scale
    if call.biases:  # what the position of each key has more than the last one
        biases = float32_at(call.biases + head * call.biases_head, end)
        for i in range(len(scores)):
            scores[i] += biases[begin + i] - biases[-1]
    if call.relative:  # by how far each key lies before the last one
        near = float32_at(call.relative + 4 * call.extent * (row * call.heads + head), call.extent)
        for distance in range(min(len(scores), call.extent)):
            scores[-1 - distance] += near[distance]
    return np.float32(1)


@numba.njit
def _hide_others(scores, chosen, begin):
    """Hides the scores, of positions from ``begin`` on, of all but ``chosen``, ascending; none if that begins with less
    than 0."""
    if chosen[0] < 0:
        return
    place = 0
    for i in range(len(scores)):
        while place < len(chosen) and chosen[place] < begin + i:
            place += 1
        if place == len(chosen) or chosen[place] > begin + i:
            scores[i] = HIDDEN


@numba.njit
def _store(x, address, rounds):
    if rounds:
        narrow(x, int16_at(address, len(x)))
    else:
        copy_into(float32_at(address, len(x)), x)


@functools.cache
def attend_worker() -> Any:
    """What each thread runs, compiled when first asked for. It is told, in integers:

    - how many threads there are;
    - an `AttentionCall`, and `SegmentRows` of each segment;
    - the address of float64[2]: scale, and softcap or 0; behind them, where there are sinks, one for each head;
    - how many these are.
    """

    @cfunc(WORKER, cache=True)
    def worker(arguments):
        threads, start = int64_at(address_of(arguments), 1)[0], address_of(arguments) + 8
        call = call_at(start)
        table = segments_at(start + CALL_BYTES, call.segments)
        end = start + CALL_BYTES + SEGMENT_BYTES * call.segments
        at, count = int64_at(end, 2)
        attend(call, table, 0, float64_at(at, count), threads, end + 16)

    return worker


@numba.njit
def attend(call, table, layer, numbers, threads, counter):
    """One thread's part. The threads take some rows for some heads, as ``counter`` tells."""
    together = _together(call, table, threads)
    tasks = call.heads // together  # of one share of the rows
    while True:
        task: int = claim(counter)
        for segment in table:
            shares = _shares(segment, together)
            if task < shares * tasks:
                size = -(-segment.rows // shares)
                first, head = task // tasks * size, task % tasks * together
                _attend(call, numbers, segment, layer, head, together, first, min(size, segment.rows - first))
                break
            task -= shares * tasks
        else:
            return


@numba.njit
def _together(call, table, threads):
    """How many query heads to take at a time, of those that read the same keys and values: as many as leave enough
    shares of the work for all threads to be busy to its end."""
    group, heads = call.group, call.heads
    for together in range(min(group, TILE_ROWS), 1, -1):
        if group % together:
            continue
        tasks = 0
        for segment in table:
            tasks += _shares(segment, together) * (heads // together)
        if tasks >= 2 * threads:
            return together
    return 1


@numba.njit
def _shares(segment, together):
    """How many shares the rows of a segment come in, so that a share's rows for these heads fill a tile at most."""
    return -(-segment.rows // (TILE_ROWS // together))
