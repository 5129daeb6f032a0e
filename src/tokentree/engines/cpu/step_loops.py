# numba gives every scalar a type of its own, which annotations can't follow:
# mypy: disable-error-code="no-untyped-def,no-untyped-call,untyped-decorator,attr-defined,call-arg,operator"
"""The compiled loop that runs a forward, and what each of its steps is told.

Every thread runs the list of steps. In a step the threads take shares of the work as they become free, and go on when
all shares that were taken are done. A thread that comes late to a step finds nothing left, and nobody waits for it.
Steps find weights and the rows' intermediate results by address, so that no Python runs between them.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import numba
import numpy as np

from tokentree.engines.cpu.linear import Product, multiply_bfloat16
from tokentree.engines.cpu.linear import product_at as bfloat16_product_at
from tokentree.engines.cpu.quantized import QuantizedProduct, multiply_int4, multiply_int8
from tokentree.engines.cpu.quantized import product_at as quantized_product_at
from tokentree.jit import cfunc
from tokentree.kernels import rowwise as each
from tokentree.kernels.attention import SEGMENT_BYTES, AttentionCall, attend, segments_at
from tokentree.kernels.bfloat16 import widen
from tokentree.kernels.convolution import gated_convolution
from tokentree.kernels.copying import copy_into
from tokentree.kernels.following import follow
from tokentree.kernels.records import record, record_at
from tokentree.kernels.recurrence import SEGMENT_BYTES as STATE_BYTES
from tokentree.kernels.recurrence import segments_at as states_at
from tokentree.kernels.threads import (
    WORKER,
    address_of,
    claim,
    enter,
    float32_at,
    float64_at,
    int8_at,
    int16_at,
    int32_at,
    int64_at,
    leave,
    wait,
)
from tokentree.kernels.tile import BLOCK
from tokentree.kernels.tile_quantized import WIDE
from tokentree.kernels.topk import STRETCH, most_probable, sum_of_powers

MULTIPLY, MULTIPLY_INT8, MULTIPLY_INT4, ATTEND = range(4)  # whose work is shared out in other ways than by rows
NORM, NORM_ONCE, NORM_HEADS, NORM_HEADS_ONCE, PREPARE, GATE, ROTARY, COPY, EMBED, SCALE, BEST, CONVOLVE, FOLLOW = range(
    4, 17
)
AS_IT_IS, WIDER, IN_8_BITS = range(3)  # how a product takes its inputs
STEP = 32  # numbers of 64 bits that a step has in the table: its kind, its fields, and nothing behind them
COUNTERS = 8  # integers of a step that threads count in, a whole line of the cache: shares taken, threads at work


# -- what is told, each field in 64 bits; what isn't a count or a width is the address of the first number -------------


class ForwardCall(NamedTuple):
    """What a thread is told of a forward."""

    rows: int
    threads: int
    rest: int  # see `threads.rest`
    num_steps: int
    steps: int  # int64[num_steps, STEP]
    counters: int  # int64[num_steps, COUNTERS], zeros
    num_segments: int
    turns: int  # int64[tables, 2]: where cosines and sines are, bfloat16[positions, width] each
    places: int  # int64[rows]: which of the positions are those of the rows
    ids: int  # int64[rows], or 0
    num_states: int  # as there are segments, or 0


class InputForm(NamedTuple):
    """How a product takes its inputs, and where these are made."""

    kind: int = AS_IT_IS
    prepared: int = 0  # float32[rows, width], or what `tile_quantized` takes
    groups: int = 0
    group: int = 0  # inputs that share a scale
    scales: int = 0  # float32[rows, groups]
    totals: int = 0  # float32[rows, groups]


class NormStep(NamedTuple):
    """Adds ``update`` to ``residual``, norms the sum, and makes what the next product takes. The norm is Llama's, or
    Gemma's, which rounds once."""

    residual: int  # bfloat16[rows, width]
    update: int  # bfloat16[rows, width], or 0
    width: int
    weight: int  # float32[width]
    eps: float
    result: int  # bfloat16[rows, width]
    stride: int  # of the result, in numbers
    form: InputForm


class NormHeadsStep(NamedTuple):
    """Norms each head of queries and keys in its place, as Llama's norm does, or Gemma's."""

    x: int  # bfloat16[rows, stride], which begin with the heads
    stride: int
    heads: int
    width: int  # of a head
    weights: int  # float32[heads, width]
    eps: float


class GateStep(NamedTuple):
    """gelu(g) * u, and makes what the next product takes."""

    x: int  # bfloat16[rows, 2 * width]: g, then u
    width: int
    result: int  # bfloat16[rows, width]
    form: InputForm


class PrepareStep(NamedTuple):
    """Makes what the next product takes."""

    x: int  # bfloat16[rows, width]
    width: int
    form: InputForm


class RotaryStep(NamedTuple):
    """Gives queries and keys their rotary positions, and stores keys and values."""

    layer: int
    table: int  # which of the cosines and sines
    heads: int
    kv_heads: int
    width: int  # of a head
    qkv: int  # bfloat16[rows, heads + 2 KV heads, width]
    queries: int  # float32[rows, heads, width]


class AttendStep(NamedTuple):
    """Attention over what a layer has stored."""

    layer: int
    numbers: int  # float64[2]: scale, and 0: no softcap
    call: AttentionCall  # which leaves out how many segments there are


class ConvolveStep(NamedTuple):
    """A gated short convolution: C * conv(B * x), and makes what the next product takes. Stores B * x."""

    gates: int  # bfloat16[rows, 3 * width]: B, C, x
    width: int
    taps: int
    weight: int  # float32[taps, width]
    bias: int  # float32[width]
    column: int  # where its numbers begin in what is stored of a row
    result: int  # bfloat16[rows, width]
    form: InputForm


class CopyStep(NamedTuple):
    """Copies rows."""

    x: int  # bfloat16[rows, width]
    result: int
    width: int


class EmbedStep(NamedTuple):
    """Looks up the rows' tokens."""

    table: int  # bfloat16[tokens, width], or blocks of pairs as `linear.PackedLinear` has them
    width: int
    packed: int  # 1 if it is the latter
    result: int  # bfloat16[rows, width]
    stride: int  # of the result, in numbers


class ScaleStep(NamedTuple):
    """Multiplies rows in their place."""

    x: int  # bfloat16[rows, width]
    width: int
    stride: int  # in numbers
    factor: float


class BestStep(NamedTuple):
    """Finds the most probable tokens of rows of logits."""

    stride: int  # of the logits, in numbers
    vocab: int
    kept: int  # tokens that are found
    logits: int = 0  # bfloat16[rows, stride]
    values: int = 0  # float32[rows, kept]
    tokens: int = 0  # int64[rows, kept]
    sums: int = 0  # float32[rows], for the logarithm of the sum of a row's exponentials, or 0
    divisors: int = 0  # float32[rows], of these logits in that sum, or 0: all 1


class FollowStep(NamedTuple):
    """Finds the most probable tokens of a place of each text after each of those of the place before, and makes what
    the product takes that says what the first of them adds to the next place: `following.follow`. Rows are texts."""

    logits: int  # bfloat16[vocab] of the first text
    logits_stride: int  # bytes from text to text
    added: int  # bfloat16[vocab], what the first token before adds to these
    added_stride: int
    vocab: int
    kept: int  # tokens that are found
    befores: int  # tokens before
    places: int
    tokens: int  # int64[kept, kept] of this place of the first text, of [texts, places, kept, kept]
    probs: int  # float64, likewise
    ranks: int  # int64, likewise
    before: int  # int64[texts, kept], the tokens before, which those found take the place of
    map: int  # int64[vocab], the ids that they are known by
    first: int  # bfloat16[ids, rank]
    second: int  # bfloat16[vocab, rank]
    rank: int
    told: int  # bfloat16[texts, rank], the row of ``first`` of the first token found
    divisors: int  # float32[texts], of logits
    form: InputForm


_KINDS: dict[int, type[tuple[Any, ...]]] = {
    MULTIPLY: Product, MULTIPLY_INT8: QuantizedProduct, MULTIPLY_INT4: QuantizedProduct, ATTEND: AttendStep,
    NORM: NormStep, NORM_ONCE: NormStep, NORM_HEADS: NormHeadsStep, NORM_HEADS_ONCE: NormHeadsStep,
    PREPARE: PrepareStep, GATE: GateStep, ROTARY: RotaryStep, COPY: CopyStep, EMBED: EmbedStep, SCALE: ScaleStep,
    BEST: BestStep, CONVOLVE: ConvolveStep, FOLLOW: FollowStep,
}  # fmt: skip
RECORDS = {number: record(kind) for number, kind in _KINDS.items()}  # of each kind of step

FORWARD_BYTES = record(ForwardCall).itemsize
forward_at, norm_at, norm_heads_at, prepare_at, gate_at, rotary_at, attend_at = (
    record_at(kind)
    for kind in (ForwardCall, NormStep, NormHeadsStep, PrepareStep, GateStep, RotaryStep, AttendStep)
)  # fmt: skip
copy_at, embed_at, scale_at, best_at, convolve_at, follow_at = (
    record_at(kind) for kind in (CopyStep, EmbedStep, ScaleStep, BestStep, ConvolveStep, FollowStep)
)


# -- the loop, compiled when first asked for ---------------------------------------------------------------------------


@functools.cache
def forward_worker() -> Any:
    """What each thread runs. It is told how many calls follow, and of each a `ForwardCall`, `SegmentRows` of each
    segment, and, where there are recurrent states, `StateRows` of each too, at the first recurrence."""

    @cfunc(WORKER, cache=True)
    def worker(arguments):
        at: int = address_of(arguments) + 8
        for _ in range(int64_at(at - 8, 1)[0]):
            call = forward_at(at)
            kv_at = at + FORWARD_BYTES
            states_begin = kv_at + SEGMENT_BYTES * call.num_segments
            kv, states = segments_at(kv_at, call.num_segments), states_at(states_begin, call.num_states)
            _run_steps(call, kv, states)
            at = states_begin + STATE_BYTES * call.num_states

    return worker


@numba.njit(inline="always")
def _run_steps(call, kv, states):
    """One thread's part of a call."""
    rows, threads, yields = call.rows, call.threads, call.rest
    for i in range(call.num_steps):
        kind, step = int64_at(call.steps + 8 * STEP * i, 1)[0], call.steps + 8 * STEP * i + 8
        counter = call.counters + 8 * COUNTERS * i
        enter(counter + 8)
        if kind == MULTIPLY:
            multiply_bfloat16(bfloat16_product_at(step), rows, threads, counter)
        elif kind == MULTIPLY_INT8:
            multiply_int8(quantized_product_at(step), rows, threads, counter)
        elif kind == MULTIPLY_INT4:
            multiply_int4(quantized_product_at(step), rows, threads, counter)
        elif kind == ATTEND:
            told = attend_at(step)
            attend(told.call, kv, told.layer, float64_at(told.numbers, 2), threads, counter)
        else:
            while True:
                row = claim(counter)
                if row >= rows:
                    break
                _one_row(kind, step, call, kv, states, row)
        leave(counter + 8)
        wait(counter + 8, yields)


@numba.njit(inline="always")
def _one_row(kind, step, call, kv, states, row):
    """A row's part of the step whose fields lie at the address ``step``."""
    if kind in (NORM, NORM_ONCE, NORM_HEADS, NORM_HEADS_ONCE):
        _norm_of_kind(kind, step, row)
    elif kind == GATE:
        _gate(gate_at(step), row)
    elif kind == SCALE:
        told = scale_at(step)
        each.scale(int16_at(told.x + 2 * told.stride * row, told.width), np.float32(told.factor))
    elif kind == PREPARE:
        told = prepare_at(step)
        _prepare(told.x, told.width, told.form, row)
    elif kind == COPY:
        told = copy_at(step)
        x, result, width = told.x, told.result, told.width
        copy_into(int16_at(result + 2 * width * row, width), int16_at(x + 2 * width * row, width))
    elif kind == BEST:
        _best(best_at(step), row)
    elif kind == CONVOLVE:
        _convolve(convolve_at(step), states, row)
    elif kind == FOLLOW:
        _follow(follow_at(step), row)
    elif kind == EMBED:
        _embed(embed_at(step), int64_at(call.ids + 8 * row, 1)[0], row)
    else:
        told = rotary_at(step)
        place, turns = 2 * told.width * int64_at(call.places + 8 * row, 1)[0], int64_at(call.turns + 16 * told.table, 2)
        _rotary(told, kv, turns[0] + place, turns[1] + place, row)


@numba.njit
def _best(step, row):
    """Finds a row's most probable tokens, and, where there is an address for that, the logarithm of the sum of its
    exponentials."""
    kept, sums, divisors = step.kept, step.sums, step.divisors
    bits = int16_at(step.logits + 2 * step.stride * row, step.vocab)
    found = float32_at(step.values + 4 * kept * row, kept)
    most_probable(bits, found, int64_at(step.tokens + 8 * kept * row, kept))
    if sums:
        scratch = np.empty(STRETCH, np.float32)
        divisor = float32_at(divisors + 4 * row, 1)[0] if divisors else np.float32(1)
        float32_at(sums + 4 * row, 1)[0] = sum_of_powers(bits, found[0], divisor, scratch)


@numba.njit
def _follow(step, row):
    follow(step, row)
    _prepare(step.told, step.rank, step.form, row)


@numba.njit
def _embed(step, token, row):
    """Looks up a row: of a table, or of blocks of pairs as `linear.PackedLinear` has them."""
    table, width, result, stride = step.table, step.width, step.result, step.stride
    if not step.packed:
        copy_into(int16_at(result + 2 * stride * row, width), int16_at(table + 2 * width * token, width))
        return
    pairs, into = width // 2, int32_at(result + 2 * stride * row, width // 2)
    start = table + 4 * (token // BLOCK * pairs * BLOCK + token % BLOCK)
    for pair in range(pairs):
        into[pair] = int32_at(start + 4 * pair * BLOCK, 1)[0]


@numba.njit
def _norm_of_kind(kind, step, row):
    if kind == NORM:
        _norm(norm_at(step), each.normalize, row)
    elif kind == NORM_ONCE:
        _norm(norm_at(step), each.normalize_once, row)
    elif kind == NORM_HEADS:
        _norm_heads(norm_heads_at(step), each.normalize, row)
    else:
        _norm_heads(norm_heads_at(step), each.normalize_once, row)


@numba.njit
def _norm(step, normalize, row):
    width = step.width
    bits, result = (
        int16_at(step.residual + 2 * width * row, width),
        int16_at(step.result + 2 * step.stride * row, width),
    )
    if step.update:
        each.add(bits, int16_at(step.update + 2 * width * row, width))
    normalize(bits, float32_at(step.weight, width), np.float32(step.eps), result)
    _prepare(step.result, width, step.form, row)


@numba.njit
def _norm_heads(step, normalize, row):
    width, weights, x = step.width, step.weights, step.x + 2 * step.stride * row
    for head in range(step.heads):
        bits = int16_at(x + 2 * width * head, width)
        normalize(bits, float32_at(weights + 4 * width * head, width), np.float32(step.eps), bits)


@numba.njit
def _gate(step, row):
    width, result = step.width, step.result
    each.geglu(int16_at(step.x + 4 * width * row, 2 * width), int16_at(result + 2 * width * row, width))
    _prepare(result, width, step.form, row)


@numba.njit
def _convolve(step, states, row):
    for segment in states:
        node = segment.first + row - segment.start
        if segment.first <= node < segment.nodes:
            break
    width = step.width
    gated_convolution(
        step.gates, segment, node, step.weight, step.bias, step.taps, step.column,
        int16_at(step.result + 2 * width * row, width),
    )  # fmt: skip
    _prepare(step.result, width, step.form, row)


@numba.njit
def _prepare(x, width, form, row):
    """Makes of a row what a product takes, as an `InputForm` says."""
    bits, prepared = int16_at(x + 2 * width * row, width), form.prepared
    if form.kind == WIDER:
        widen(bits, float32_at(prepared + 4 * width * row, width))
    elif form.kind == IN_8_BITS:
        groups, group = form.groups, form.group
        place, size = 4 * groups * row, groups * group
        into = float32_at(form.scales + place, groups), float32_at(form.totals + place, groups)
        if WIDE:
            each.quantize(bits, group, int16_at(prepared + 2 * size * row, size), *into)
        else:
            each.quantize(bits, group, int8_at(prepared + size * row, size), *into)


@numba.njit
def _rotary(step, kv, cos, sin, row):
    """Gives a row's queries and keys the rotary position whose cosines and sines are at these addresses, and stores
    keys and values as `kv.BlockedKV` has them."""
    layer, heads, kv_heads, width, queries = step.layer, step.heads, step.kv_heads, step.width, step.queries
    for segment in kv:
        if segment.start <= row < segment.start + segment.rows:
            break
    keys, values = segment.keys + layer * segment.keys_layer, segment.values + layer * segment.values_layer
    capacity, columns = segment.capacity, -(-width // BLOCK) * BLOCK
    place = segment.prefix + segment.first + row - segment.start
    scratch, rounded = np.empty((5, width), np.float32), np.empty(width, np.int16)
    c, s, x = scratch[2], scratch[3], scratch[4]
    widen(int16_at(cos, width), c)
    widen(int16_at(sin, width), s)
    qkv = step.qkv + row * (heads + 2 * kv_heads) * width * 2
    for head in range(heads):
        result = float32_at(queries + 4 * width * (row * heads + head), width)
        each.rotary(int16_at(qkv + 2 * width * head, width), c, s, result, scratch, rounded)
    for head in range(kv_heads):
        each.rotary(int16_at(qkv + 2 * width * (heads + head), width), c, s, x, scratch, rounded)
        block = float32_at(keys + 4 * width * (head * capacity + place // BLOCK * BLOCK), (width, BLOCK))
        for column in range(width):
            block[column, place % BLOCK] = x[column]
        bits = int16_at(qkv + 2 * width * (heads + kv_heads + head), width)
        widen(bits, float32_at(values + 4 * columns * (head * capacity + place), width))
