"""Tree attention on paged KV, as a Triton kernel.

A row sees the positions up to its own. They lie in chunks of `CHUNK`, which are pages of KV. A page of committed rows
is read once for all rows of a tile. In the pages of a tree each row finds its ancestors by its path, in their logical
places. Sums run over a chunk, and chunks are joined in order. So bits depend on absolute positions alone: a node of
a tree gets those of its path decoded alone.
"""

from __future__ import annotations

import triton
import triton.language as tl

from tokentree.engines.gpu.bfloat16 import dot, rounded

CHUNK = 128  # positions, and rows of a page
TILE = 16  # rows x heads that read the same keys
FAR = 1 << 30  # stands for a row whose positions all lie at their own places
FIELDS = 10  # of an item, see `attention_kernel`


@triton.jit
def attend(
    query, keys, values, at, seen, visible, scale, cap, HEAD: tl.constexpr, CHUNK: tl.constexpr, CAP: tl.constexpr
):
    """One chunk for the rows of a tile: sums float32[16, HEAD], greatest scores and sums of exponentials float32[16].

    Args:
        query: [16, HEAD].
        at: int64[CHUNK], where keys and values of the positions lie.
        seen: bool[CHUNK], those that are read.
        visible: bool[16, CHUNK], those that a row sees.
    """
    d = tl.arange(0, HEAD)
    k = tl.load(keys + at[None, :] + d[:, None], mask=seen[None, :], other=0.0)
    v = tl.load(values + at[:, None] + d[None, :], mask=seen[:, None], other=0.0)
    s = dot(query, k, tl.zeros((16, CHUNK), tl.float32)) * scale
    if CAP:
        e = tl.exp(-2.0 * tl.abs(s / cap))
        y = cap * (1.0 - e) / (1.0 + e)
        s = tl.where(s < 0, -y, y)
    s = tl.where(visible, s, float("-inf"))
    best = tl.maximum(tl.max(s, 1), -1.0e30)
    e = tl.exp(s - best[:, None])
    return dot(rounded(e), v, tl.zeros((16, HEAD), tl.float32)), best, tl.sum(e, 1)


@triton.jit
def visible_to(position, p, WINDOW: tl.constexpr):
    """bool[rows, positions]: which positions ``p`` rows at ``position`` see."""
    visible = p[None, :] <= position[:, None]
    if WINDOW > 0:
        visible = visible & (position[:, None] - p[None, :] < WINDOW)
    return visible


@triton.jit
def places_of(row, p, seen, page_table, tails, firsts, kv, kv_heads, DEPTH: tl.constexpr, CHUNK: tl.constexpr):
    """int64[positions]: where what ``row`` sees at positions ``p`` lies in a layer's pages, in rows of a head."""
    first = tl.load(firsts + row)
    in_path = seen & (p >= first)
    logical = tl.where(in_path, tl.load(tails + row * DEPTH + p - first, mask=in_path, other=0), p)
    page = tl.load(page_table + logical // CHUNK, mask=seen, other=0).to(tl.int64)
    return (page * kv_heads + kv) * CHUNK + logical % CHUNK


@triton.jit
def joined(out, best, total, more, more_best, more_total):
    """Two chunks in one. Each sum is spelled out, so that no compiler may round it otherwise elsewhere."""
    new = tl.maximum(best, more_best)
    a, b = tl.exp(best - new), tl.exp(more_best - new)
    return tl.fma(out, a[:, None], more * b[:, None]), new, tl.fma(total, a, more_total * b)


@triton.jit
def store(out, o, best, total, sinks, row, head, heads, mine, HEAD: tl.constexpr, SINKS: tl.constexpr):
    """out [rows, heads, HEAD] = o / total, in the rows of a tile; rows that are none have no total. With ``SINKS``, a
    score of each head counts in the total."""
    if SINKS:
        total += tl.exp(tl.load(sinks + head, mask=mine, other=-1.0e30) - best)
    y = rounded(o / tl.where(total > 0.0, total, 1.0)[:, None])
    tl.store(out + (row * heads + head)[:, None] * HEAD + tl.arange(0, HEAD)[None, :], y, mask=mine[:, None])


@triton.jit
def attention_kernel(
    q, keys, values, page_tables, tails, firsts, positions, items, num_items, partial, partial_best, partial_total,
    counters, out, sinks, heads, kv_heads, table_width, scale, cap,
    DEPTH: tl.constexpr, GROUP: tl.constexpr, HEAD: tl.constexpr, CHUNK: tl.constexpr, WINDOW: tl.constexpr,
    CAP: tl.constexpr, SINKS: tl.constexpr, FIELDS: tl.constexpr,
):  # fmt: skip
    """out [rows, heads, HEAD], attention of queries [rows, heads, HEAD]. An item is a chunk for a tile of rows, or for
    one row of it, where rows see different things there. The last program that finishes an item of a tile joins its
    chunks in order.

    Args:
        keys, values: [pages, KV heads, CHUNK, HEAD].
        page_tables: int32[texts, table_width], the pages of each text.
        tails: int32[rows, DEPTH]: of each row, the logical places of the positions from ``firsts[row]`` on.
        items: int32[items, FIELDS]: first row and number of rows of the tile, the one row that the item is for or -1,
            number of the chunk in the text, first of the tile's places in ``partial``, its number of chunks and of
            items, its counter, its text, and the page of the chunk.
        num_items: int32[1].
        partial, partial_best, partial_total: float32[chunks of all tiles, KV heads, 16(, HEAD)].
        counters: int32[tiles, KV heads], zeros before and after.
        sinks: float32[heads], with ``SINKS``: scores that count among the weights, and have no value.
    """
    i, d, kv = tl.arange(0, 16), tl.arange(0, HEAD), tl.program_id(1)
    for item in range(tl.program_id(0), tl.load(num_items), tl.num_programs(0)):
        told = items + item * FIELDS
        start, count, only, chunk = tl.load(told), tl.load(told + 1), tl.load(told + 2), tl.load(told + 3)
        base, chunks, waiting = tl.load(told + 4), tl.load(told + 5), tl.load(told + 6)
        counter, text, page = tl.load(told + 7), tl.load(told + 8), tl.load(told + 9)
        row, mine, head = start + i // GROUP, i < count * GROUP, kv * GROUP + i % GROUP
        query = tl.load(q + (row * heads + head)[:, None] * HEAD + d[None, :], mask=mine[:, None], other=0.0)
        position = tl.load(positions + row, mask=mine, other=-1)
        p = chunk * CHUNK + tl.arange(0, CHUNK)
        if only < 0:
            seen = p <= tl.max(position)
            at = (page.to(tl.int64) * kv_heads + kv) * CHUNK + tl.arange(0, CHUNK)
        else:
            seen = p <= tl.load(positions + start + only)
            at = places_of(
                start + only, p, seen, page_tables + text * table_width, tails, firsts, kv, kv_heads, DEPTH, CHUNK
            )
        o, best, total = attend(
            query, keys, values, at * HEAD, seen, visible_to(position, p, WINDOW), scale, cap, HEAD, CHUNK, CAP
        )
        own = (only < 0) | (i // GROUP == only)
        to = ((base + chunk) * kv_heads + kv) * 16 + i
        tl.store(partial + to[:, None] * HEAD + d[None, :], o, mask=own[:, None])
        tl.store(partial_best + to, best, mask=own)
        tl.store(partial_total + to, total, mask=own)
        tl.debug_barrier()
        if tl.atomic_add(counters + counter * kv_heads + kv, 1, sem="acq_rel") == waiting - 1:
            to = (base * kv_heads + kv) * 16 + i
            o = tl.load(partial + to[:, None] * HEAD + d[None, :], cache_modifier=".cg")
            best = tl.load(partial_best + to, cache_modifier=".cg")
            total = tl.load(partial_total + to, cache_modifier=".cg")
            for other in range(1, chunks):
                to = ((base + other) * kv_heads + kv) * 16 + i
                o, best, total = joined(
                    o, best, total,
                    tl.load(partial + to[:, None] * HEAD + d[None, :], cache_modifier=".cg"),
                    tl.load(partial_best + to, cache_modifier=".cg"),
                    tl.load(partial_total + to, cache_modifier=".cg"),
                )  # fmt: skip
            store(out, o, best, total, sinks, row, head, heads, mine, HEAD, SINKS)
            tl.store(counters + counter * kv_heads + kv, 0)


@triton.jit
def attend_chunk(
    query, keys, values, page_table, tails, firsts, positions, start, count, chunk, row, mine, kv, kv_heads, scale, cap,
    DEPTH: tl.constexpr, HEAD: tl.constexpr, CHUNK: tl.constexpr, WINDOW: tl.constexpr, CAP: tl.constexpr,
):  # fmt: skip
    """`attend` for all rows of a tile: once, or row by row where they see different things."""
    p = chunk * CHUNK + tl.arange(0, CHUNK)
    position = tl.load(positions + row, mask=mine, other=-1)
    shared = tl.min(tl.load(firsts + row, mask=mine, other=1073741824)) >= (chunk + 1) * CHUNK
    last, visible = tl.max(position), visible_to(position, p, WINDOW)
    best = tl.full((16,), -1.0e30, tl.float32)
    total, out = tl.zeros((16,), tl.float32), tl.zeros((16, HEAD), tl.float32)
    for r in range(0, tl.where(shared, 1, count)):
        seen = p <= tl.where(shared, last, tl.load(positions + start + r))
        at = places_of(start + r, p, seen, page_table, tails, firsts, kv, kv_heads, DEPTH, CHUNK)
        o, most, sums = attend(query, keys, values, at * HEAD, seen, visible, scale, cap, HEAD, CHUNK, CAP)
        its = shared | (row == start + r)
        best, total = tl.where(its, most, best), tl.where(its, sums, total)
        out = tl.where(its[:, None], o, out)
    return out, best, total


@triton.jit
def long_attention_kernel(
    q, keys, values, page_tables, tails, firsts, positions, tiles, num_tiles, out, sinks, heads, kv_heads, table_width,
    scale, cap,
    DEPTH: tl.constexpr, GROUP: tl.constexpr, HEAD: tl.constexpr, CHUNK: tl.constexpr, WINDOW: tl.constexpr,
    CAP: tl.constexpr, SINKS: tl.constexpr,
):  # fmt: skip
    """`attention_kernel` with all chunks of a tile in one program, for many rows: prompts, and wide batches.

    Args:
        tiles: int32[tiles, 3]: first row, number of rows, and text.
    """
    i, d, tile, kv = tl.arange(0, 16), tl.arange(0, HEAD), tl.program_id(0), tl.program_id(1)
    if tile < tl.load(num_tiles):
        start, count = tl.load(tiles + 3 * tile), tl.load(tiles + 3 * tile + 1)
        row, mine, head = start + i // GROUP, i < count * GROUP, kv * GROUP + i % GROUP
        query = tl.load(q + (row * heads + head)[:, None] * HEAD + d[None, :], mask=mine[:, None], other=0.0)
        last = tl.max(tl.load(positions + row, mask=mine, other=-1))
        table = page_tables + tl.load(tiles + 3 * tile + 2) * table_width
        o, best, total = attend_chunk(
            query, keys, values, table, tails, firsts, positions, start, count, 0, row, mine, kv, kv_heads, scale, cap,
            DEPTH, HEAD, CHUNK, WINDOW, CAP,
        )  # fmt: skip
        for chunk in range(1, last // CHUNK + 1):
            more, more_best, more_total = attend_chunk(
                query, keys, values, table, tails, firsts, positions, start, count, chunk, row, mine, kv, kv_heads,
                scale, cap, DEPTH, HEAD, CHUNK, WINDOW, CAP,
            )  # fmt: skip
            o, best, total = joined(o, best, total, more, more_best, more_total)
        store(out, o, best, total, sinks, row, head, heads, mine, HEAD, SINKS)
