"""Products of rows with weights of 16 or 8 bits, as Triton kernels: what a layer does besides norms and attention.

Bits of a row depend on nothing but the row and the weights. Sums over inputs run in one order, in ``PARTS`` parts that
the weight's shape alone decides. Matrix instructions add up an output in the same way wherever it stands in a tile, and
whichever operand the weights are. So 1 row and 512 rows, of one text or many, get the same bits.

Weights of 8 bits come with ``scales``, see `quantized.Int8`. They become bfloat16 in registers. From there on a product
is that of a bfloat16 weight.
"""

from __future__ import annotations

import triton
import triton.language as tl

from tokentree.engines.gpu.bfloat16 import dot, rounded, scaled, widened


@triton.jit
def part_of_product(
    x, w, scales, rows, columns, num_rows, num_columns, width, first, end,
    SWAP: tl.constexpr, TILE: tl.constexpr, COLUMNS: tl.constexpr, INPUTS: tl.constexpr, GROUP: tl.constexpr = 64,
):  # fmt: skip
    """Sums over inputs ``first`` to ``end`` of x [rows, width] times w [columns, width]: float32[TILE, COLUMNS].

    With ``SWAP`` weights times rows are computed: a matrix instruction takes at least 64 rows of its first operand, but
    as few as 8 of its second. Only the first one may come from registers, so weights of 8 bits are always that.
    """
    inputs = tl.arange(0, INPUTS)
    if scales is not None:
        tl.static_assert(SWAP and INPUTS % GROUP == 0)
        inputs, known = tl.arange(0, GROUP), columns < num_columns
        total = tl.zeros((COLUMNS, TILE), tl.float32)
        for k in range(first, end, INPUTS):
            for group in tl.static_range(INPUTS // GROUP):
                here = k + group * GROUP + inputs
                codes = tl.load(
                    w + columns[:, None].to(tl.int64) * width + here[None, :], mask=known[:, None], other=0
                )  # fmt: skip
                scale = tl.load(scales + (k // GROUP + group) * num_columns + columns, mask=known, other=0.0)
                b = tl.load(x + rows[None, :] * width + here[:, None], mask=(rows < num_rows)[None, :], other=0.0)
                total = dot(scaled(codes, rounded(scale)[:, None]), b, total)
        return tl.trans(total)
    elif SWAP:  # noqa: RET505  the compiler takes one branch or the other
        total = tl.zeros((COLUMNS, TILE), tl.float32)
        for k in range(first, end, INPUTS):
            here = k + inputs
            a = tl.load(
                w + columns[:, None].to(tl.int64) * width + here[None, :],
                mask=(columns < num_columns)[:, None], other=0.0,
            )  # fmt: skip
            b = tl.load(x + rows[None, :] * width + here[:, None], mask=(rows < num_rows)[None, :], other=0.0)
            total = dot(a, b, total)
        return tl.trans(total)
    else:
        total = tl.zeros((TILE, COLUMNS), tl.float32)
        for k in range(first, end, INPUTS):
            here = k + inputs
            a = tl.load(x + rows[:, None] * width + here[None, :], mask=(rows < num_rows)[:, None], other=0.0)
            b = tl.load(
                w + columns[None, :].to(tl.int64) * width + here[:, None],
                mask=(columns < num_columns)[None, :], other=0.0,
            )  # fmt: skip
            total = dot(a, b, total)
        return total


@triton.jit
def product(
    x, w, scales, rows, columns, num_rows, num_columns, width,
    PARTS: tl.constexpr, SWAP: tl.constexpr, TILE: tl.constexpr, COLUMNS: tl.constexpr, INPUTS: tl.constexpr,
):  # fmt: skip
    """x [rows, width] times w [columns, width], in ``PARTS`` parts added up in order: float32[TILE, COLUMNS]."""
    step = width // PARTS
    total = part_of_product(
        x, w, scales, rows, columns, num_rows, num_columns, width, 0, step, SWAP, TILE, COLUMNS, INPUTS
    )  # fmt: skip
    for part in tl.static_range(1, PARTS):
        total += part_of_product(
            x, w, scales, rows, columns, num_rows, num_columns, width, part * step, (part + 1) * step, SWAP, TILE,
            COLUMNS, INPUTS,
        )  # fmt: skip
    return total


@triton.jit
def tile_of(TILE: tl.constexpr, COLUMNS: tl.constexpr):
    """Rows and columns of this program's tile. Tiles of the same columns lie beside one another, so that their weights
    are read once."""
    return (
        tl.program_id(0) * TILE + tl.arange(0, TILE),
        tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS),
    )


@triton.jit(do_not_specialize=["num_rows"])
def output_kernel(
    x, w, bias, out, num_rows, num_columns, width, cap,
    BIAS: tl.constexpr, CAP: tl.constexpr, PARTS: tl.constexpr, SWAP: tl.constexpr, TILE: tl.constexpr,
    COLUMNS: tl.constexpr, INPUTS: tl.constexpr, scales=None,
):  # fmt: skip
    """out [rows, columns] = x times w, plus bias; with ``CAP``, cap * tanh(out / cap)."""
    rows, columns = tile_of(TILE, COLUMNS)
    y = product(x, w, scales, rows, columns, num_rows, num_columns, width, PARTS, SWAP, TILE, COLUMNS, INPUTS)
    if BIAS:
        y += widened(tl.load(bias + columns, mask=columns < num_columns, other=0.0))[None, :]
    if CAP:
        y = cap * tanh(widened(rounded(y)) / cap)
    at = rows[:, None].to(tl.int64) * num_columns + columns[None, :]
    tl.store(out + at, rounded(y), mask=(rows < num_rows)[:, None] & (columns < num_columns)[None, :])


@triton.jit(do_not_specialize=["num_rows"])
def residual_kernel(
    x, w, bias, h, partial, counters, num_rows, num_columns, width,
    BIAS: tl.constexpr, PARTS: tl.constexpr, SPREAD: tl.constexpr, SWAP: tl.constexpr, TILE: tl.constexpr,
    COLUMNS: tl.constexpr, INPUTS: tl.constexpr, scales=None,
):  # fmt: skip
    """h [rows, columns] += x times w, plus bias.

    With ``SPREAD``, each part of the sums has a program of its own, and the last one to finish adds them up in order:
    the bits are those of one program.

    Args:
        partial: float32[PARTS, rows, columns], where parts wait.
        counters: int32[tiles], zeros before and after.
    """
    rows, columns = tile_of(TILE, COLUMNS)
    inside = (rows < num_rows)[:, None] & (columns < num_columns)[None, :]
    at = rows[:, None] * num_columns + columns[None, :]
    if SPREAD:
        part, step = tl.program_id(2), width // PARTS
        own = part_of_product(
            x, w, scales, rows, columns, num_rows, num_columns, width, part * step, (part + 1) * step, SWAP, TILE,
            COLUMNS, INPUTS,
        )  # fmt: skip
        tl.store(partial + part * num_rows * num_columns + at, own, mask=inside)
        tl.debug_barrier()
        counter = counters + tl.program_id(1) * tl.num_programs(0) + tl.program_id(0)
        if tl.atomic_add(counter, 1, sem="acq_rel") == PARTS - 1:
            y = tl.load(partial + at, mask=inside, other=0.0, cache_modifier=".cg")
            for other in tl.static_range(1, PARTS):
                y += tl.load(
                    partial + other * num_rows * num_columns + at, mask=inside, other=0.0, cache_modifier=".cg"
                )
            add_to(h, y, bias, at, columns, num_columns, inside, BIAS)
            tl.store(counter, 0)
    else:
        y = product(x, w, scales, rows, columns, num_rows, num_columns, width, PARTS, SWAP, TILE, COLUMNS, INPUTS)
        add_to(h, y, bias, at, columns, num_columns, inside, BIAS)


@triton.jit
def add_to(h, y, bias, at, columns, num_columns, inside, BIAS: tl.constexpr):
    if BIAS:
        y += widened(tl.load(bias + columns, mask=columns < num_columns, other=0.0))[None, :]
    y = widened(rounded(y)) + widened(tl.load(h + at, mask=inside, other=0.0))
    tl.store(h + at, rounded(y), mask=inside)


@triton.jit(do_not_specialize=["num_rows"])
def gated_kernel(
    x, w, out, num_rows, num_columns, width,
    GELU: tl.constexpr, SWAP: tl.constexpr, TILE: tl.constexpr, COLUMNS: tl.constexpr, INPUTS: tl.constexpr,
    scales=None,
):  # fmt: skip
    """out [rows, columns / 2] = act(gate) * up, of x times w, whose outputs are gate, up, gate, up, …: swiglu, or with
    ``GELU`` geglu (tanh)."""
    rows, columns = tile_of(TILE, COLUMNS)
    y = product(x, w, scales, rows, columns, num_rows, num_columns, width, 1, SWAP, TILE, COLUMNS, INPUTS)
    gate, up = tl.split(tl.reshape(widened(rounded(y)), (TILE, COLUMNS // 2, 2)))
    if GELU:
        gate = 0.5 * gate * (1.0 + tanh(0.7978845608028654 * (gate + 0.044715 * gate * gate * gate)))
    else:
        gate = gate / (1.0 + tl.exp(-gate))
    y = widened(rounded(gate)) * up
    half = tl.program_id(1) * (COLUMNS // 2) + tl.arange(0, COLUMNS // 2)
    inside = (rows < num_rows)[:, None] & (half < num_columns // 2)[None, :]
    tl.store(out + rows[:, None] * (num_columns // 2) + half[None, :], rounded(y), mask=inside)


@triton.jit
def tanh(x):
    """Of any x, without overflow."""
    e = tl.exp(-2.0 * tl.abs(x))
    y = (1.0 - e) / (1.0 + e)
    return tl.where(x < 0, -y, y)


@triton.jit(do_not_specialize=["num_rows"])
def rotary_kernel(
    x, w, bias, cosines, sines, positions, slots, q, keys, values, num_rows, width, heads, kv_heads,
    BIAS: tl.constexpr, HEAD: tl.constexpr, CHUNK: tl.constexpr, SWAP: tl.constexpr, TILE: tl.constexpr,
    COLUMNS: tl.constexpr, INPUTS: tl.constexpr, scales=None,
):  # fmt: skip
    """Queries, keys and values of x times w, plus bias; queries and keys turned by their positions.

    Args:
        w: [(heads + 2 KV heads) x HEAD, width]. Within a head of queries or keys, the two outputs that turn together
            are neighbours.
        cosines, sines: float32[positions, HEAD / 2].
        q: [rows, heads, HEAD].
        keys, values: [pages, KV heads, CHUNK, HEAD]; row m goes to slot ``slots[m]``.
    """
    num_columns = (heads + 2 * kv_heads) * HEAD
    rows, columns = tile_of(TILE, COLUMNS)
    y = product(x, w, scales, rows, columns, num_rows, num_columns, width, 1, SWAP, TILE, COLUMNS, INPUTS)
    if BIAS:
        y += widened(tl.load(bias + columns))[None, :]
    y = widened(rounded(y))
    first = tl.program_id(1) * COLUMNS
    head, inner = first // HEAD, first % HEAD
    place = inner + tl.arange(0, COLUMNS)
    ok = rows < num_rows
    slot = tl.load(slots + rows, mask=ok, other=0).to(tl.int64)
    if head < heads + kv_heads:
        pair = inner // 2 + tl.arange(0, COLUMNS // 2)
        at = tl.load(positions + rows, mask=ok, other=0)[:, None] * (HEAD // 2) + pair[None, :]
        cos, sin = tl.load(cosines + at), tl.load(sines + at)
        a, b = tl.split(tl.reshape(y, (TILE, COLUMNS // 2, 2)))
        y = tl.reshape(tl.join(tl.fma(a, cos, -(b * sin)), tl.fma(b, cos, a * sin)), (TILE, COLUMNS))
    y = rounded(y)
    if head < heads:
        tl.store(q + (rows[:, None] * heads + head) * HEAD + place[None, :], y, mask=ok[:, None])
    else:
        number = (head - heads) % kv_heads
        to = ((slot // CHUNK * kv_heads + number) * CHUNK + slot % CHUNK)[:, None] * HEAD + place[None, :]
        if head < heads + kv_heads:
            tl.store(keys + to, y, mask=ok[:, None])
        else:
            tl.store(values + to, y, mask=ok[:, None])
