"""What is done to each row by itself, as Triton kernels: norms, heads, the most probable tokens, moving KV.

A program has one row, or a part of one, in a block whose size the model decides. So a row's bits depend on it alone.
"""

from __future__ import annotations

import triton
import triton.language as tl

from tokentree.engines.gpu.bfloat16 import rounded, widened

BEST = 8  # most probable tokens that are found on the device
BLOCK = 2048  # tokens of a vocabulary that one program looks through


@triton.jit
def add_norm_kernel(h, x, gain, width, eps, BLOCK: tl.constexpr):
    """h [rows, width] += RMSNorm(x) * gain."""
    row, i = tl.program_id(0), tl.arange(0, BLOCK)
    ok = i < width
    a = widened(tl.load(x + row * width + i, mask=ok, other=0.0))
    y = a * (1.0 / tl.sqrt_rn(tl.sum(a * a) / width + eps)) * tl.load(gain + i, mask=ok, other=0.0)
    y = widened(rounded(y)) + widened(tl.load(h + row * width + i, mask=ok, other=0.0))
    tl.store(h + row * width + i, rounded(y), mask=ok)


@triton.jit
def embed_kernel(ids, table, h, width, scale, BLOCK: tl.constexpr):
    """h [rows, width] = table[ids] * scale."""
    row, i = tl.program_id(0), tl.arange(0, BLOCK)
    x = widened(tl.load(table + tl.load(ids + row).to(tl.int64) * width + i, mask=i < width, other=0.0))
    tl.store(h + row * width + i, rounded(x * scale), mask=i < width)


@triton.jit
def heads_kernel(
    raw, q_gain, k_gain, cosines, sines, positions, slots, q, keys, values, heads, kv_heads, eps,
    HEAD: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """Norms of the heads of queries and keys, then as `products.rotary_kernel` does it, of its raw [rows, columns]."""
    row, head, i = tl.program_id(0), tl.program_id(1), tl.arange(0, HEAD)
    y = widened(tl.load(raw + (row * (heads + 2 * kv_heads) + head) * HEAD + i))
    if head < heads + kv_heads:
        gain = tl.load(tl.where(head < heads, q_gain, k_gain) + i)
        y = widened(rounded(y * (1.0 / tl.sqrt_rn(tl.sum(y * y) / HEAD + eps)) * gain))
        a, b = tl.split(tl.reshape(y, (HEAD // 2, 2)))
        at = tl.load(positions + row) * (HEAD // 2) + tl.arange(0, HEAD // 2)
        cos, sin = tl.load(cosines + at), tl.load(sines + at)
        y = tl.reshape(tl.join(a * cos - b * sin, b * cos + a * sin), (HEAD,))
    y = rounded(y)
    if head < heads:
        tl.store(q + (row * heads + head) * HEAD + i, y)
    else:
        slot = tl.load(slots + row).to(tl.int64)
        to = ((slot // CHUNK * kv_heads + (head - heads) % kv_heads) * CHUNK + slot % CHUNK) * HEAD + i
        if head < heads + kv_heads:
            tl.store(keys + to, y)
        else:
            tl.store(values + to, y)


@triton.jit
def ordered(x, ids):
    """int64 keys: a greater logit has a greater one, of equal ones the smaller id. What is no number comes first."""
    bits = x.to(tl.int32, bitcast=True)
    bits = tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits)
    bits = tl.where(x != x, 0x7FFFFFFF, bits)
    return (bits.to(tl.int64) << 32) | (0x7FFFFFFF - ids).to(tl.int64)


@triton.jit
def block_sums_kernel(logits, sums, vocab, blocks, BLOCK: tl.constexpr):
    """sums float32[rows, blocks, 2]: the greatest logit of a part of a row, and the sum of exponentials beside it."""
    row, block = tl.program_id(0), tl.program_id(1)
    ids = block * BLOCK + tl.arange(0, BLOCK)
    x = widened(tl.load(logits + row.to(tl.int64) * vocab + ids, mask=ids < vocab, other=float("-inf")))
    most = tl.max(tl.where(x == x, x, float("inf")), 0)
    least = tl.maximum(most, -3.0e38)
    tl.store(sums + (row * blocks + block) * 2, most)
    tl.store(sums + (row * blocks + block) * 2 + 1, tl.sum(tl.exp(x - least), 0))


@triton.jit
def best_of_block_kernel(
    logits, sums, found, vocab, blocks, BLOCK: tl.constexpr, BLOCKS: tl.constexpr, BEST: tl.constexpr
):
    """found int64[rows, BEST, BEST]: the keys of the most probable tokens in one of the parts of a row that have the
    most probable ones: no other part can have one of the best."""
    row, number, b = tl.program_id(0), tl.program_id(1), tl.arange(0, BLOCKS)
    found += (row * BEST + number) * BEST
    if number < blocks:
        most = tl.load(sums + (row * blocks + b) * 2, mask=b < blocks, other=float("-inf"))
        part = tl.where(b < blocks, ordered(most, b), -9223372036854775808)
        for _ in range(0, number):
            part = tl.where(part == tl.max(part, 0), -9223372036854775808, part)
        block = 0x7FFFFFFF - (tl.max(part, 0) & 0x7FFFFFFF).to(tl.int32)
        ids = block * BLOCK + tl.arange(0, BLOCK)
        x = widened(tl.load(logits + row.to(tl.int64) * vocab + ids, mask=ids < vocab, other=float("-inf")))
        key = tl.where(ids < vocab, ordered(x, ids), -9223372036854775808)
        for i in tl.static_range(BEST):
            best = tl.max(key, 0)
            tl.store(found + i, best)
            key = tl.where(key == best, -9223372036854775808, key)
    else:
        tl.store(found + tl.arange(0, BEST), tl.full((BEST,), -9223372036854775808, tl.int64))


@triton.jit
def best_kernel(logits, found, sums, out, vocab, blocks, BLOCKS: tl.constexpr, BEST: tl.constexpr):
    """out int32[rows, 2 BEST + 1]: the most probable tokens of a row, their logits as float32, and the logarithm of the
    sum of all exponentials, of what the kernels before found."""
    row, b = tl.program_id(0), tl.arange(0, BLOCKS)
    key = tl.load(found + row * BEST * BEST + tl.arange(0, BEST * BEST))
    most = tl.load(sums + (row * blocks + b) * 2, mask=b < blocks, other=-3.0e38)
    total = tl.load(sums + (row * blocks + b) * 2 + 1, mask=b < blocks, other=0.0)
    out += row * (2 * BEST + 1)
    for n in tl.static_range(BEST):
        best = tl.max(key, 0)
        token = 0x7FFFFFFF - (best & 0x7FFFFFFF).to(tl.int32)
        tl.store(out + n, token)
        high = (best >> 32).to(tl.int32)
        tl.store(out + BEST + n, tl.where(high < 0, high ^ 0x7FFFFFFF, high))
        key = tl.where(key == best, -9223372036854775808, key)
    most = tl.maximum(most, -3.0e38)
    top = tl.max(most, 0)
    tl.store(out + 2 * BEST, (top + tl.log(tl.sum(total * tl.exp(most - top), 0))).to(tl.int32, bitcast=True))


@triton.jit
def norm_kernel(h, gain, x, width, eps, BLOCK: tl.constexpr):
    """x [rows, width] = RMSNorm(h) * gain."""
    row, i = tl.program_id(0), tl.arange(0, BLOCK)
    ok = i < width
    a = widened(tl.load(h + row * width + i, mask=ok, other=0.0))
    y = a * (1.0 / tl.sqrt_rn(tl.sum(a * a) / width + eps)) * tl.load(gain + i, mask=ok, other=0.0)
    tl.store(x + row * width + i, rounded(y), mask=ok)


@triton.jit
def store_kernel(x, states, slots, width, BLOCK: tl.constexpr):
    """states [slots, width] at ``slots[row]`` = x [rows, width]."""
    row, i = tl.program_id(0), tl.arange(0, BLOCK)
    y = tl.load(x + row * width + i, mask=i < width, other=0.0)
    tl.store(states + tl.load(slots + row).to(tl.int64) * width + i, y, mask=i < width)


@triton.jit
def move_kernel(
    keys, values, moves, count, layer_size, kv_heads, HEAD: tl.constexpr, CHUNK: tl.constexpr, MOVES: tl.constexpr,
):  # fmt: skip
    """Copies rows of KV from slot ``moves[i]`` to ``moves[MOVES + i]``, in one head of one layer. A row is read before
    another one is moved to its place: places come in the order of rows, and before them."""
    layer, kv, d, i = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.arange(0, HEAD), tl.arange(0, 16)
    end = tl.load(count)
    for first in range(0, end, 16):
        there = (first + i < end)[:, None]
        source = tl.load(moves + first + i, mask=first + i < end, other=0).to(tl.int64)
        target = tl.load(moves + MOVES + first + i, mask=first + i < end, other=0).to(tl.int64)
        at = layer * layer_size + ((source // CHUNK * kv_heads + kv) * CHUNK + source % CHUNK)[:, None] * HEAD + d
        to = layer * layer_size + ((target // CHUNK * kv_heads + kv) * CHUNK + target % CHUNK)[:, None] * HEAD + d
        key, value = tl.load(keys + at, mask=there), tl.load(values + at, mask=there)
        tl.debug_barrier()
        tl.store(keys + to, key, mask=there)
        tl.store(values + to, value, mask=there)
        tl.debug_barrier()


@triton.jit
def move_states_kernel(
    states,
    moves,
    count,
    size,
    width,
    BLOCK: tl.constexpr,
    MOVES: tl.constexpr,
):
    """`move_kernel` for hidden states [places, slots, width]."""
    place, i = tl.program_id(0).to(tl.int64), tl.arange(0, BLOCK)
    for n in range(0, tl.load(count)):
        source, target = tl.load(moves + n).to(tl.int64), tl.load(moves + MOVES + n).to(tl.int64)
        x = tl.load(states + place * size + source * width + i, mask=i < width)
        tl.store(states + place * size + target * width + i, x, mask=i < width)
