# numba gives every scalar a type of its own, which annotations can't follow:
# mypy: disable-error-code="no-untyped-def,no-untyped-call,untyped-decorator,attr-defined,call-arg,operator"
"""Short convolutions over a tree's nodes, compiled: each node sees the rows before it on its own path."""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import numpy as np

from tokentree.jit import cfunc
from tokentree.kernels.records import record, record_at, records_at
from tokentree.kernels.recurrence import StateRows
from tokentree.kernels.threads import WORKER, address_of, claim, float32_at, int64_at, keep

SHARE = 256  # channels of a task


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
                float32_at(out, width)[:] = sums[:width]
        keep(sums)

    return worker
