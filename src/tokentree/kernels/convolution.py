# numba gives every scalar a type of its own, which annotations can't follow:
# mypy: disable-error-code="no-untyped-def,no-untyped-call,untyped-decorator,attr-defined,call-arg,operator"
"""Short convolutions over a tree's nodes, compiled: each node sees the rows before it on its own path."""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import numba
import numpy as np

from tokentree.jit import cfunc
from tokentree.kernels.bfloat16 import narrow, widen
from tokentree.kernels.copying import copy_into
from tokentree.kernels.records import record, record_at, records_at
from tokentree.kernels.recurrence import StateRows
from tokentree.kernels.threads import WORKER, address_of, claim, float32_at, int16_at, int64_at, keep

SHARE = 256  # channels of a task, and those of a row that are gated at a time


class ConvolutionCall(NamedTuple):
    """What `convolution_worker` is told of a call, beside its segments."""

    channels: int
    taps: int
    weight: int  # address of float32[taps, channels]
    bias: int  # address of float32[channels]
    rows: int  # address of float32[rows of the forward, channels]
    results: int  # address of float32[rows of the forward, channels]
    segments: int


CALL_BYTES, SEGMENT_BYTES = record(ConvolutionCall).itemsize, record(StateRows).itemsize
call_at, segments_at = record_at(ConvolutionCall), records_at(StateRows)


@functools.cache
def convolution_worker() -> Any:
    """What each thread runs, compiled when first asked for. It is told, in integers: a `ConvolutionCall`, and
    `StateRows` of each segment."""

    @cfunc(WORKER, cache=True)
    def worker(arguments):
        start: int = address_of(arguments)
        call = call_at(start)
        table = segments_at(start + CALL_BYTES, call.segments)
        counter = start + CALL_BYTES + SEGMENT_BYTES * call.segments
        taps, channels, sums = call.taps, call.channels, np.empty(SHARE, np.float32)
        shares = -(-channels // SHARE)
        while True:
            task: int = claim(counter)
            if task >= shares * len(table):
                break
            segment, begin = table[task // shares], task % shares * SHARE
            width = min(SHARE, channels - begin)
            bias = float32_at(call.bias + 4 * begin, width)
            windows = int64_at(segment.windows, (segment.nodes - segment.first, segment.back))
            for i in range(segment.nodes - segment.first):
                sums[:width] = bias
                for tap in range(taps):
                    node = segment.first + i
                    if tap < taps - 1:
                        node = windows[i, segment.back - taps + 1 + tap]
                    if node < segment.first:
                        place = segment.stored + (segment.pending + node) * segment.stride
                    else:
                        place = call.rows + 4 * (segment.start + node - segment.first) * channels
                    weight = float32_at(call.weight + 4 * (tap * channels + begin), width)
                    x = float32_at(place + 4 * begin, width)
                    for c in range(width):
                        sums[c] += weight[c] * x[c]
                out = call.results + 4 * ((segment.start + i) * channels + begin)
                copy_into(float32_at(out, width), sums[:width])
        keep(sums)

    return worker


@numba.njit
def gated_convolution(gates, segment, node, weight, bias, taps, column, result):
    """A node's row of C * conv(B * x), each product and the sum of the taps rounded to bfloat16, and B * x stored.

    ``gates`` is the address of bfloat16[rows of the forward, 3 channels], B, C and x; ``segment`` is told as
    `StateRows` of the first recurrence, from whose stored numbers those of this one are ``column`` numbers away.
    ``weight`` is the address of float32[taps, channels], ``bias`` of float32[channels]; ``result`` is bfloat16, a
    number for each channel.
    """
    channels, first, back, row = len(result), segment.first, segment.back, segment.start - segment.first
    windows = int64_at(segment.windows, (segment.nodes - first, back))
    scratch, rounded = np.empty((3, SHARE), np.float32), np.empty(SHARE, np.int16)
    # where all nodes are committed, only the last rows are kept
    skipped = max(0, segment.nodes - back) if segment.read else 0
    stored = segment.stored + segment.pending * segment.stride + 4 * column
    for begin in range(0, channels, SHARE):
        width = min(SHARE, channels - begin)
        sums, x, y, bits = scratch[0, :width], scratch[1, :width], scratch[2, :width], rounded[:width]
        copy_into(sums, float32_at(bias + 4 * begin, width))
        for tap in range(taps):
            at = node if tap == taps - 1 else windows[node - first, back - taps + 1 + tap]
            if at < first:
                copy_into(x, float32_at(stored + at * segment.stride + 4 * begin, width))
            else:
                place = gates + 2 * (3 * channels * (row + at) + begin)
                widen(int16_at(place, width), x)
                widen(int16_at(place + 4 * channels, width), y)
                _product(x, y, bits)
                widen(bits, x)
            factors = float32_at(weight + 4 * (tap * channels + begin), width)
            for c in range(width):
                sums[c] += factors[c] * x[c]
        if node >= skipped:  # ``x`` is its own now
            copy_into(float32_at(stored + (node - skipped) * segment.stride + 4 * begin, width), x)
        narrow(sums, bits)
        widen(bits, x)
        widen(int16_at(gates + 2 * (channels * (3 * (row + node) + 1) + begin), width), y)
        _product(x, y, result[begin : begin + width])


@numba.njit
def _product(x, y, result):
    """x * y, rounded to bfloat16; ``x`` is lost."""
    for i in range(len(x)):
        x[i] *= y[i]
    narrow(x, result)
