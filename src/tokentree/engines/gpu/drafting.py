"""What an EAGLE head does beside a layer, as Triton kernels: what it reads, and which nodes go on."""

from __future__ import annotations

import triton
import triton.language as tl

from tokentree.engines.gpu.bfloat16 import rounded, widened
from tokentree.engines.gpu.rows import ordered


@triton.jit
def gather_kernel(states, places, slots, out, size, width, PLACES: tl.constexpr, BLOCK: tl.constexpr):
    """out [rows, PLACES x width]: hidden states [*, size, width] number ``places`` of the slots of rows."""
    row, place, i = tl.program_id(0), tl.program_id(1), tl.arange(0, BLOCK)
    at = (tl.load(places + place).to(tl.int64) * size + tl.load(slots + row)) * width + i
    x = tl.load(states + at, mask=i < width, other=0.0)
    tl.store(out + (row * PLACES + place) * width + i, x, mask=i < width)


@triton.jit
def input_kernel(
    ids, table, known, sources, embedding_gain, known_gain, x, h, width, scale, eps,
    NORMED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """What EAGLE-3's layer reads: x [rows, 2 width], the norms of a token's embedding and of what is known before it;
    and h [rows, width], what its attention is added to: what is known, or with ``NORMED`` its norm."""
    row, i = tl.program_id(0), tl.arange(0, BLOCK)
    ok = i < width
    a = tl.load(table + tl.load(ids + row).to(tl.int64) * width + i, mask=ok, other=0.0)
    a = widened(rounded(widened(a) * scale))
    b = tl.load(known + tl.load(sources + row) * width + i, mask=ok, other=0.0)
    wide = widened(b)
    a = a * (1.0 / tl.sqrt_rn(tl.sum(a * a) / width + eps)) * tl.load(embedding_gain + i, mask=ok, other=0.0)
    y = wide * (1.0 / tl.sqrt_rn(tl.sum(wide * wide) / width + eps)) * tl.load(known_gain + i, mask=ok, other=0.0)
    y = rounded(y)
    tl.store(x + row * 2 * width + i, rounded(a), mask=ok)
    tl.store(x + row * 2 * width + width + i, y, mask=ok)
    if NORMED:
        tl.store(h + row * width + i, y, mask=ok)
    else:
        tl.store(h + row * width + i, b, mask=ok)


@triton.jit
def select_kernel(
    best, parents, scores, tails, token_map, lengths, ids, sources, next_scores, next_tails, found, level,
    FIRST: tl.constexpr, LAST: tl.constexpr, MAP: tl.constexpr, WIDTH: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    """The most probable nodes of a level, over all of it: `WIDTH` of its candidates go on, those with the greatest
    joint log-probability, of equal ones the first.

    Args:
        best: int32[rows, 2 WIDTH + 1]: of each parent, see `rows.best_kernel`.
        parents: int32[texts]: with ``FIRST``, the row of each text's root; it is the only parent then.
        scores: float32[texts x WIDTH], joint log-probabilities of the parents.
        tails, next_tails: int32[rows, DEPTH], logical places of the ancestors of the parents, and of the nodes.
        token_map: int32[tokens of the head], the target's ids, with ``MAP``.
        lengths: int32[texts], rows before the draft's.
        ids, sources, next_scores: of the nodes that go on: tokens, rows of their parents, and joint log-probabilities.
        found: int32[texts, 2 WIDTH² + WIDTH] of this level: tokens and log-probabilities (float32) of all candidates,
            and which of them go on. With ``LAST`` none does.
        level: from 0.
    """
    text, c, n = tl.program_id(0), tl.arange(0, WIDTH * WIDTH), tl.arange(0, WIDTH)
    if FIRST:
        row = tl.load(parents + text) + c * 0
        before = c * 0.0
        there = c < WIDTH
    else:
        row = text * WIDTH + c // WIDTH
        before = tl.load(scores + row)
        there = c >= 0
    at = best + row * (2 * WIDTH + 1)
    token = tl.load(at + c % WIDTH, mask=there, other=0)
    if MAP:
        token = tl.load(token_map + token)
    own = tl.load(at + WIDTH + c % WIDTH, mask=there, other=0).to(tl.float32, bitcast=True)
    own = own - tl.load(at + 2 * WIDTH).to(tl.float32, bitcast=True)
    out = found + text * (2 * WIDTH * WIDTH + WIDTH)
    tl.store(out + c, token)
    tl.store(out + WIDTH * WIDTH + c, own.to(tl.int32, bitcast=True))
    if not LAST:
        score = before + own
        key = tl.where(there, ordered(score, c), -9223372036854775808)
        chosen = n * 0
        for i in tl.static_range(WIDTH):
            most = tl.max(key, 0)
            chosen = tl.where(n == i, tl.sum(tl.where(key == most, c, 0)), chosen)
            key = tl.where(key == most, -9223372036854775808, key)
        tl.store(out + 2 * WIDTH * WIDTH + n, chosen)
        tl.debug_barrier()
        node = text * WIDTH + n
        if FIRST:
            source = tl.load(parents + text) + n * 0
            joint = n * 0.0
        else:
            source = text * WIDTH + chosen // WIDTH
            joint = tl.load(scores + source)
        tl.store(ids + node, tl.load(out + chosen))
        tl.store(sources + node, source)
        tl.store(next_scores + node, joint + tl.load(out + WIDTH * WIDTH + chosen).to(tl.float32, bitcast=True))
        j = tl.arange(0, DEPTH)
        place = tl.load(lengths + text) + level * WIDTH + n
        earlier = tl.load(tails + source[:, None] * DEPTH + j[None, :], mask=(j < level)[None, :], other=0)
        mine = tl.where(j[None, :] == level, place[:, None], earlier)
        tl.store(next_tails + node[:, None] * DEPTH + j[None, :], mine, mask=(j <= level)[None, :])
