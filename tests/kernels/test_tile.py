"""The tile in every form that some CPU takes, as far as this one can run it, against numpy."""

from __future__ import annotations

from functools import cache
from typing import Any

import numba
import numpy as np
import pytest
from _pytest.mark import ParameterSet

from tests.conftest import by_night
from tokentree.kernels import tile as kernels
from tokentree.kernels import tile_quantized as quants
from tokentree.kernels.tile import BLOCK, TILE_ROWS, has

STEPS = 37


def needs(*features: str) -> pytest.MarkDecorator:
    missing = [feature for feature in features if not has(feature)]
    return pytest.mark.skipif(bool(missing), reason=f"this CPU lacks {', '.join(missing)}")


DOTS = [
    pytest.param(kernels._BFloat16, id="any"),
    pytest.param(kernels._BFloat16Dots, id="avx512", marks=needs("avx512bw", "avx512bf16")),
]
QUANTS = [
    pytest.param(quants._Pairs, id="any"),
    pytest.param(quants._PairDots, id="pairs", marks=needs("avx2")),
    pytest.param(quants._FourDots, id="vnni", marks=needs("avx512bw", "avx512vnni")),
]


def aligned(words: np.ndarray) -> np.ndarray:
    """A copy that begins at a multiple of 64 bytes."""
    room = np.zeros(words.nbytes + 64, np.uint8)
    copy = room[-room.ctypes.data % 64 :][: words.nbytes].view(words.dtype).reshape(words.shape)
    copy[:] = words
    return copy


def bfloat16(values: np.ndarray) -> np.ndarray:
    """uint16: the bits of values that bfloat16 holds exactly."""
    bits = values.astype(np.float32).view(np.uint32)
    assert not (bits & 0xFFFF).any()
    return (bits >> 16).astype(np.uint16)


@cache
def of_bfloat16(kind: Any) -> Any:
    """The tile, compiled once for any number of rows."""
    tile: Any = kernels._tile(kind)  # type: ignore[no-untyped-call]

    @numba.njit
    def call(rows: int, matrix: int, x: int, x_stride: int, start: int, y: int, y_stride: int) -> None:
        tile(rows, STEPS, matrix, 4 * BLOCK, x, x_stride, start, 0, y, y_stride)

    return call


@pytest.mark.parametrize("kind", DOTS)
@pytest.mark.parametrize("rows", [1, 2, TILE_ROWS])
def test_bfloat16(kind: Any, rows: int) -> None:
    rng = np.random.default_rng(rows)
    weights, inputs = rng.integers(-9, 10, (2 * STEPS, BLOCK)), rng.integers(-9, 10, (rows, 2 * STEPS))
    start = rng.integers(-9, 10, BLOCK).astype(np.float32)
    pairs = bfloat16(weights).reshape(STEPS, 2, BLOCK)
    matrix = (pairs[:, 0].astype(np.uint32) | pairs[:, 1].astype(np.uint32) << 16).view(np.int32)
    x = inputs.astype(np.float32) if kind.parts == 2 else bfloat16(inputs)
    matrix, y = aligned(matrix), np.zeros((rows, BLOCK), np.float32)
    run = of_bfloat16(kind)
    run(rows, matrix.ctypes.data, x.ctypes.data, x.strides[0], start.ctypes.data, y.ctypes.data, y.strides[0])
    assert (y == inputs @ weights + start).all()


@cache
def few_bits(kind: Any, bits: int) -> Any:
    """That tile, compiled once for any number of rows."""
    tile: Any = quants._tile(kind(bits))  # type: ignore[no-untyped-call]

    @numba.njit
    def call(
        rows: int, groups: int, words: int, matrix: int, x: int, x_stride: int, scales: int, totals: int, y: int,
        y_stride: int,
    ) -> None:  # fmt: skip
        tile(rows, groups, words, matrix, x, x_stride, scales, totals, 4 * groups, y, y_stride)

    return call


def with_bits(bits: tuple[int, ...], *marks: pytest.MarkDecorator) -> list[ParameterSet]:
    """Each kind with as many bits as stand at its place."""
    return [
        pytest.param(*kind.values, number, id=f"{kind.id}-{number}", marks=(*kind.marks, *marks))
        for kind, number in zip(QUANTS, bits, strict=True)
    ]


@pytest.mark.parametrize(("kind", "bits"), [*with_bits((8, 4, 4)), *with_bits((4, 8, 8), pytest.mark.nightly)])
@pytest.mark.parametrize("rows", by_night([1, 3, TILE_ROWS], but=[3]))
def test_few_bits(kind: Any, bits: int, rows: int) -> None:
    rng, groups, group = np.random.default_rng(rows), 3, 64
    weights = rng.integers(0, 1 << bits, (groups, group, BLOCK))
    inputs = rng.integers(-127, 128, (rows, groups, group))
    weights[0, :8], inputs[:, 0, :8] = (1 << bits) - 1, -127  # the largest products side by side
    scales, totals = 2.0 ** rng.integers(-1, 1, (rows, groups)), rng.integers(-999, 1000, (rows, groups))
    outputs, least = 2.0 ** rng.integers(0, 2, (groups, BLOCK)), rng.integers(-9, 10, (groups, BLOCK))

    order = [0, 1, 2, 3] if kind is quants._FourDots else [0, 2, 1, 3]
    fours = weights.reshape(groups, -1, 8 // bits, 4, BLOCK)[:, :, :, order].astype(np.uint8)
    packed = fours[:, :, 0] if bits == 8 else fours[:, :, 0] | fours[:, :, 1] << 4
    words = np.ascontiguousarray(packed.transpose(0, 1, 3, 2)).reshape(groups, -1)
    halves = (part.astype(np.float16).view(np.uint8) for part in (outputs, least))
    matrix = aligned(np.concatenate([words, *halves], 1))
    x = np.ascontiguousarray(inputs.reshape(rows, -1), np.int8 if kind is quants._FourDots else np.int16)
    by_row, by_group = scales.astype(np.float32), totals.astype(np.float32)
    y = np.full((rows, BLOCK), 3, np.float32)
    few_bits(kind, bits)(
        rows, groups, group * bits // 32, matrix.ctypes.data, x.ctypes.data, x.strides[0], by_row.ctypes.data,
        by_group.ctypes.data, y.ctypes.data, y.strides[0],
    )  # fmt: skip
    sums = np.einsum("rgi,gio->rgo", inputs, weights)
    exact = 3 + (sums * scales[:, :, None] * outputs).sum(1) + totals @ least
    assert (y == exact).all()
