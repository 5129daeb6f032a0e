# numba gives every scalar a type of its own, which annotations can't follow:
# mypy: disable-error-code="no-untyped-def,no-untyped-call,untyped-decorator,attr-defined,call-arg,operator"
"""Recurrences over a tree's nodes, compiled: each node goes on from the state that its parent left.

A state is a matrix for each head: S = decay * S + key ⊗ change, and what is read of it is query @ S. What ``decay`` and
``change`` are tells recurrences apart. A node's numbers depend on its own row and its parent's state alone, and are
computed in one order. So its bits are those of decoding its path row by row.

A task is one head and a strip of `BLOCK` columns of its state, which stays in the nearest cache while all rows of a
sequence go over it. Columns don't depend on one another.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import numba
import numpy as np

from tokentree.jit import cfunc
from tokentree.kernels.bfloat16 import exponentials
from tokentree.kernels.copying import copy_into
from tokentree.kernels.records import record, record_at, records_at
from tokentree.kernels.threads import WORKER, address_of, claim, float32_at, int64_at, keep
from tokentree.kernels.tile import BLOCK, LANES, tile_float32


class RecurrenceCall(NamedTuple):
    """What `recur` is told of a call, beside its segments. A row holds, at these places in numbers: keys of all heads,
    values, decays, rates, and behind them what isn't stored, queries."""

    heads: int
    keys: int  # numbers of a key: rows of a state
    values: int  # numbers of a value: its columns
    group: int  # heads that share a key and a query
    value_at: int
    decay_at: int
    decays: int  # numbers of a head's decay
    rate_at: int
    query_at: int
    rows: int  # address of float32[rows of the forward, width]
    width: int
    results: int  # address of float32[rows of the forward, heads, values]
    constants: int  # address of what else a recurrence reads, or 0
    segments: int


class StateRows(NamedTuple):
    """What compiled loops are told of a segment's state and rows, at one recurrence.

    Stored rows are those that came behind the state: ``pending`` committed ones, then the tree's nodes before
    ``first``. Other nodes' rows are among those of the forward."""

    state: int  # address of float32[heads, strips, keys, BLOCK]
    stored: int  # address of the first stored row
    stride: int  # bytes from stored row to stored row
    pending: int
    first: int
    start: int  # the row of the forward that is node ``first``'s
    read: int  # 1 if all nodes are committed, so that the state moves behind them
    steps: int  # address of int64[num_steps, 3]: see `steps_of`
    num_steps: int
    slots: int  # states that are needed at a time
    windows: int  # address of int64[nodes - first, back]: see `windows_of`
    back: int
    nodes: int


CALL_BYTES, SEGMENT_BYTES = record(RecurrenceCall).itemsize, record(StateRows).itemsize
call_at, segments_at = record_at(RecurrenceCall), records_at(StateRows)


# -- what one row does -----------------------------------------------------------------------------------------------
# step(call, row, query, head, strip, source, target, result, scratch): ``row`` is the address of its numbers, ``query``
# of its queries, or 0; a strip goes on from the state at ``source`` to ``target``, or 0; ``result`` gets the strip's
# results. A state is float32[keys, BLOCK].


@numba.njit
def delta_step(call, row, query, head, strip, source, target, result, scratch):
    """The delta rule: change = rate * (value - key @ (decay * S)). The decay is one number, or one for each of a key's.

    Source: gated delta networks, arXiv 2412.06464, and Kimi Delta Attention, arXiv 2510.26692.
    """
    keys = call.keys
    key, decay = _key_and_decay(call, row, head)
    spread = 1 if call.decays > 1 else 0
    products, sums, change = scratch[0], scratch[1], scratch[2]
    for i in range(keys):
        products[i] = key[i] * decay[i * spread]
    count = 1
    if query:
        asked = float32_at(query + 4 * (head // call.group) * keys, keys)
        for i in range(keys):
            products[keys + i] = asked[i] * decay[i * spread]
        count = 2
    sums[2 * BLOCK : 3 * BLOCK] = 0
    at_sums = scratch[1].ctypes.data
    tile_float32(count, keys, source, 4 * BLOCK, scratch[0].ctypes.data, 4 * keys, at_sums + 8 * BLOCK, 0, at_sums,
                 4 * BLOCK)  # fmt: skip
    rate = float32_at(row + 4 * (call.rate_at + head), 1)[0]
    _value(call, row, head, strip, change)
    for j in range(BLOCK):
        change[j] = (change[j] - sums[j]) * rate
    if query:
        _write(call, strip, sums[BLOCK : 2 * BLOCK], _dot(key, asked), change, result)
    if target:
        _move(keys, source, target, key, decay, spread, change)


@numba.njit
def linear_step(call, row, query, head, strip, source, target, result, scratch):
    """Linear attention: change = value. The decay is one number.

    Source: Mamba 2, arXiv 2405.21060, whose keys, queries and values are B, C and dt * x.
    """
    keys = call.keys
    key, decay = _key_and_decay(call, row, head)
    products, sums, change = scratch[0], scratch[1], scratch[2]
    _value(call, row, head, strip, change)
    if query:
        asked = float32_at(query + 4 * (head // call.group) * keys, keys)
        for i in range(keys):
            products[i] = asked[i] * decay[0]
        sums[2 * BLOCK : 3 * BLOCK] = 0
        at_sums = scratch[1].ctypes.data
        tile_float32(1, keys, source, 4 * BLOCK, scratch[0].ctypes.data, 0, at_sums + 8 * BLOCK, 0, at_sums, 0)
        _write(call, strip, sums, _dot(key, asked), change, result)
    if target:
        _move(keys, source, target, key, decay, 0, change)


@numba.njit
def _key_and_decay(call, row, head):
    key = float32_at(row + 4 * (head // call.group) * call.keys, call.keys)
    return key, float32_at(row + 4 * (call.decay_at + head * call.decays), call.decays)


@numba.njit
def _value(call, row, head, strip, result):
    """The strip's numbers of a value, and zeros behind them."""
    begin = strip * BLOCK
    width = min(BLOCK, call.values - begin)
    value = float32_at(row + 4 * (call.value_at + head * call.values + begin), width)
    for j in range(width):
        result[j] = value[j]
    for j in range(width, BLOCK):
        result[j] = 0


@numba.njit
def _write(call, strip, read, dot, change, result):
    """What a query reads of the state that is left: ``read`` of the one before, and the change."""
    width = min(BLOCK, call.values - strip * BLOCK)
    out = float32_at(result, width)
    for j in range(width):
        out[j] = read[j] + dot * change[j]


@numba.njit
def _move(keys, source, target, key, decay, spread, change):
    old, new = float32_at(source, (keys, BLOCK)), float32_at(target, (keys, BLOCK))
    for i in range(keys):
        number, factor = key[i], decay[i * spread]
        for j in range(BLOCK):
            new[i, j] = old[i, j] * factor + number * change[j]


@numba.njit
def _dot(x, y):
    lanes, total, whole = np.zeros(LANES, np.float32), np.float32(0), len(x) // LANES * LANES
    for start in range(0, whole, LANES):
        for lane in range(LANES):
            lanes[lane] += x[start + lane] * y[start + lane]
    for lane in range(LANES):
        total += lanes[lane]
    for i in range(whole, len(x)):
        total += x[i] * y[i]
    return total


@numba.njit
def selective_step(call, row, query, head, strip, source, target, result, scratch):
    """Mamba: change = value, and a decay exp(dt * A) for each number of the state. There is one head; the constants are
    A, float32[strips, keys, BLOCK].

    Source: arXiv 2312.00752, whose keys, queries and values are B, C and dt * x, and whose decays are dt.
    """
    keys, begin = call.keys, strip * BLOCK
    width = min(BLOCK, call.values - begin)
    key, value, dt = float32_at(row, keys), scratch[2], float32_at(row + 4 * (call.decay_at + begin), width)
    rates = float32_at(call.constants + 4 * strip * keys * BLOCK, (keys, BLOCK))
    old, sums, factors = float32_at(source, (keys, BLOCK)), scratch[1], scratch[0]
    _value(call, row, 0, strip, value)
    sums[:BLOCK] = 0
    asked = float32_at(query if query else row, keys)
    new = float32_at(target if target else scratch[3].ctypes.data, (keys, BLOCK))
    for i in range(keys):
        for j in range(width):
            factors[j] = rates[i, j] * dt[j]
        for j in range(width, BLOCK):
            factors[j] = 0
        exponentials(factors[:BLOCK])
        number, weight = key[i], asked[i]
        for j in range(BLOCK):
            new[i, j] = old[i, j] * factors[j] + number * value[j]
            sums[j] += weight * new[i, j]
    if query:
        copy_into(float32_at(result, width), sums[:width])


@numba.njit
def gated_step(call, row, query, head, strip, source, target, result, scratch):
    """A linear unit: S = decay * S + value, a number of each for each of the state's. The state itself is the result.

    Source: the RG-LRU of Griffin, arXiv 2402.19427.
    """
    begin = strip * BLOCK
    width = min(BLOCK, call.values - begin)
    value, decay = scratch[2], float32_at(row + 4 * (call.decay_at + begin), width)
    old, new = float32_at(source, BLOCK), float32_at(target if target else scratch[3].ctypes.data, BLOCK)
    _value(call, row, 0, strip, value)
    for j in range(width):
        new[j] = old[j] * decay[j] + value[j]
    if query:
        copy_into(float32_at(result, width), new[:width])


@numba.njit
def wkv_step(call, row, query, head, strip, source, target, result, scratch):
    """RWKV's: a weighted mean of values, in which this row's weight is exp(key + first), and that of a row before it
    exp(key + decay * rows between). A state is the weighted sum, the sum of weights, and the exponent that both are
    under; there is one head, keys stand in the place of decays, and the constants are decay and first,
    float32[strips, 2, BLOCK].

    Source: RWKV-4, arXiv 2305.13048, in the form that can't overflow.
    """
    begin = strip * BLOCK
    width = min(BLOCK, call.values - begin)
    key, value, factors = float32_at(row + 4 * (call.decay_at + begin), width), scratch[2], scratch[0]
    constants = float32_at(call.constants + 8 * strip * BLOCK, (2, BLOCK))
    old = float32_at(source, (3, BLOCK))
    new = float32_at(target if target else scratch[3].ctypes.data, (3, BLOCK))
    before = scratch[1]
    _value(call, row, 0, strip, value)
    for j in range(BLOCK):  # a state of no row has no weights, and so no exponent
        before[j] = old[2, j] if old[1, j] > 0 else np.float32(-1e38)
    if query:
        for j in range(width):
            now = key[j] + constants[1, j]
            most = max(before[j], now)
            factors[j], factors[BLOCK + j] = before[j] - most, now - most
        exponentials(factors[: 2 * BLOCK])
        out = float32_at(result, width)
        for j in range(width):
            kept, added = factors[j], factors[BLOCK + j]
            out[j] = (kept * old[0, j] + added * value[j]) / (kept * old[1, j] + added)
    factors[: 2 * BLOCK] = 0
    for j in range(width):
        decayed = before[j] + constants[0, j]
        most = max(decayed, key[j])
        factors[j], factors[BLOCK + j], before[BLOCK + j] = decayed - most, key[j] - most, most
    exponentials(factors[: 2 * BLOCK])
    for j in range(width):
        kept, added = factors[j], factors[BLOCK + j]
        new[0, j] = kept * old[0, j] + added * value[j]
        new[1, j] = kept * old[1, j] + added
        new[2, j] = before[BLOCK + j]
    new[:, width:] = 0


@numba.njit
def mlstm_step(call, row, query, head, strip, source, target, result, scratch):
    """The mLSTM: S = keep * S + write * key ⊗ value, where both gates are exponentials under one exponent. That stands
    in the last row of the state, and is what the last number of a result is. The decays are the logarithms of a write
    and of a keep.

    Source: xLSTM, arXiv 2405.04517.
    """
    keys, begin = call.keys - 1, strip * BLOCK
    width = min(BLOCK, call.values - begin)
    key, gates = _key_and_decay(call, row, head)
    value, factors, sums = scratch[2], scratch[0], scratch[1]
    old = float32_at(source, (keys + 1, BLOCK))
    new = float32_at(target if target else scratch[3].ctypes.data, (keys + 1, BLOCK))
    _value(call, row, head, strip, value)
    decayed = gates[1] + old[keys, 0]
    most = max(decayed, gates[0])
    factors[0], factors[1] = decayed - most, gates[0] - most
    exponentials(factors[:2])
    kept, added = factors[0], factors[1]
    asked = float32_at(query + 4 * (head // call.group) * call.keys if query else row, keys)
    sums[:BLOCK] = 0
    for i in range(keys):
        number, weight = added * key[i], asked[i]
        for j in range(BLOCK):
            new[i, j] = kept * old[i, j] + number * value[j]
            sums[j] += weight * new[i, j]
    new[keys] = most
    if query:
        out = float32_at(result, width)
        out[:] = sums[:width]
        if begin + width == call.values:
            out[width - 1] = most


# -- the loop --------------------------------------------------------------------------------------------------------


def loop_of(step):
    """The loop over all rows of a forward. A thread is told, in integers: a `RecurrenceCall`, and `StateRows` of each
    segment."""

    def recur(arguments):
        begin: int = address_of(arguments)
        call = call_at(begin)
        table = segments_at(begin + CALL_BYTES, call.segments)
        counter = begin + CALL_BYTES + SEGMENT_BYTES * call.segments
        strips = -(-call.values // BLOCK)
        tasks, size = call.heads * strips, call.keys * BLOCK
        scratch = np.zeros((4, max(2 * call.keys, 3 * BLOCK, size)), np.float32)
        while True:
            task: int = claim(counter)
            if task >= tasks * len(table):
                break
            segment, head, strip = table[task // tasks], task % tasks // strips, task % strips
            states = np.empty(segment.slots * size + 16, np.float32)
            at = states.ctypes.data + -states.ctypes.data % 64  # as tiles want a matrix
            kept, committed = float32_at(segment.state + 4 * size * (head * strips + strip), size), float32_at(at, size)
            committed[:] = kept
            for i in range(segment.pending):
                step(call, segment.stored + i * segment.stride, 0, head, strip, at, at, 0, scratch)
            if segment.pending:
                kept[:] = committed
            steps = int64_at(segment.steps, (segment.num_steps, 3))
            for i in range(segment.num_steps):
                node, source, target = steps[i, 0], at + 4 * size * steps[i, 1], at + 4 * size * steps[i, 2]
                if steps[i, 2] < 0:
                    target = 0
                if node < segment.first:
                    row = segment.stored + (segment.pending + node) * segment.stride
                    step(call, row, 0, head, strip, source, target, 0, scratch)
                else:
                    place = segment.start + node - segment.first
                    row = call.rows + 4 * place * call.width
                    result = call.results + 4 * ((place * call.heads + head) * call.values + strip * BLOCK)
                    step(call, row, row + 4 * call.query_at, head, strip, source, target, result, scratch)
            if segment.read:
                kept[:] = committed
            keep(states)
        keep(scratch)

    recur.__qualname__ = f"recur_{step.__name__}"  # kept code is linked by such names, and each loop needs its own
    return numba.njit(recur)


_delta, _linear, _selective, _gated, _wkv, _mlstm = (
    loop_of(step) for step in (delta_step, linear_step, selective_step, gated_step, wkv_step, mlstm_step)
)  # fmt: skip


@functools.cache
def delta_worker() -> Any:
    """What each thread runs for `delta_step`, compiled when first asked for."""

    @cfunc(WORKER, cache=True)
    def worker(arguments):
        _delta(arguments)

    return worker


@functools.cache
def linear_worker() -> Any:
    """Likewise, for `linear_step`."""

    @cfunc(WORKER, cache=True)
    def worker(arguments):
        _linear(arguments)

    return worker


@functools.cache
def selective_worker() -> Any:
    """Likewise, for `selective_step`."""

    @cfunc(WORKER, cache=True)
    def worker(arguments):
        _selective(arguments)

    return worker


@functools.cache
def gated_worker() -> Any:
    """Likewise, for `gated_step`."""

    @cfunc(WORKER, cache=True)
    def worker(arguments):
        _gated(arguments)

    return worker


@functools.cache
def wkv_worker() -> Any:
    """Likewise, for `wkv_step`."""

    @cfunc(WORKER, cache=True)
    def worker(arguments):
        _wkv(arguments)

    return worker


@functools.cache
def mlstm_worker() -> Any:
    """Likewise, for `mlstm_step`."""

    @cfunc(WORKER, cache=True)
    def worker(arguments):
        _mlstm(arguments)

    return worker
