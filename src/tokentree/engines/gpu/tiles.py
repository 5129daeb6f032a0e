"""How products are cut into programs, by the shape of the weight.

`parts_of` decides the bits: over how many parts of the inputs a sum runs. It depends on the weight's shape alone. The
rest decides the speed: rows, columns and inputs of a tile, warps, and stages of loads ahead. For 16 bits it was
measured on an H100 (see the log).
"""

from __future__ import annotations

from dataclasses import dataclass, replace

ENOUGH = 90  # programs that keep a GPU busy
FEW = 16  # rows up to which the weights are the first operand of a product
MANY = 64  # rows from which on reading weights takes less time than computing
LONG = 4096  # inputs of a sum
GROUP = 64  # inputs that share a scale, and fewest columns of a matrix instruction's first operand
BUSY = 192  # programs with weights of 8 bits that keep a GPU busy: reading as many bytes, they compute twice as much
CROWD = 512  # programs of which several share a multiprocessor, if each takes little of its memory
SHARED = 227 * 1024  # bytes that a program may have on an H100


@dataclass(frozen=True)
class Tile:
    """How one product is computed.

    Args:
        parts: of the inputs, whose sums are added up in order.
        swap: whether weights are multiplied by rows, not rows by weights.
        rows, columns, inputs: of a program's tile.
        warps: of a program.
        stages: of loads ahead.
        spread: whether each part has a program of its own.
    """

    parts: int
    swap: bool
    rows: int
    columns: int
    inputs: int
    warps: int
    stages: int
    spread: bool = False


def tile(
    rows: int, columns: int, width: int, most_columns: int = 128, memory: int = SHARED, bits: int = 16
) -> Tile:  # fmt: skip
    """For so many rows and a weight [columns, width].

    Args:
        most_columns: of a program, such as those of a head.
        memory: shared memory of a program, in bytes.
        bits: of a weight, 16 or 8.
    """
    way = (_fastest if bits == 16 else _fastest_in_8_bits)(rows, columns, width, most_columns)
    return replace(way, stages=max(1, min(way.stages, memory // stage_nbytes(way, bits))))


def stage_nbytes(way: Tile, bits: int) -> int:
    """Shared memory of one stage of loads, in bytes: inputs of rows, weights, and their scales."""
    scales = 4 * way.columns * way.inputs // GROUP if bits == 8 else 0
    return 2 * way.inputs * way.rows + bits // 8 * way.inputs * way.columns + scales


def _fastest(rows: int, columns: int, width: int, most_columns: int) -> Tile:
    parts = parts_of(columns, width)
    share, spread = width // parts, parts > 1 and rows <= MANY
    inputs = next(size for size in (128, 64, 32, 16) if share % size == 0)
    if rows > MANY:
        return Tile(parts, False, 128, min(most_columns, 128), min(inputs, 64), 8, 3)
    if most_columns >= 64 and columns >= 1536 and (rows <= 2 * FEW or width >= LONG):
        height = next(size for size in (16, 32, 64) if size >= rows)
        wide = 128 if height == 64 and most_columns >= 128 and columns * parts >= 200 * 128 else 64
        return Tile(parts, True, height, wide, inputs, 4, 3 if wide == 128 else 6, spread)
    fits = (size for size in (64, 32) if size <= most_columns and columns * parts >= ENOUGH * size)
    wide = next(fits, 16)
    if wide == 64 and width < LONG:
        return Tile(parts, False, 64, 64, min(inputs, 64), 4, 6, spread)
    return Tile(parts, False, 64, wide, inputs, 4, 4 if wide == 64 else 6, spread)


def _fastest_in_8_bits(rows: int, columns: int, width: int, most_columns: int) -> Tile:
    """Weights are the first operand, however many rows there are."""
    parts = parts_of(columns, width, 8)
    inputs = 2 * GROUP if width // parts % (2 * GROUP) == 0 else GROUP
    if rows > MANY:
        return Tile(parts, True, 128, min(most_columns, 128), GROUP, 8, 4)
    height = next(size for size in (16, 32, 64) if size >= rows)
    wide = min(most_columns, 128 if height == 64 and columns >= 128 * ENOUGH else 64)
    stages = 8 if height == 16 and columns * parts < CROWD * GROUP else 4  # many programs load ahead for one another
    return Tile(parts, True, height, wide, inputs, 8 if wide == 128 else 4, stages, parts > 1)


def parts_of(columns: int, width: int, bits: int = 16) -> int:
    """Parts of the inputs: two where there would be few programs, each of them long."""
    if bits == 8:
        return 2 if width >= max(columns, 1024) and columns < BUSY * GROUP and width % (2 * GROUP) == 0 else 1
    return 2 if width >= 2 * columns and width % 128 == 0 else 1
