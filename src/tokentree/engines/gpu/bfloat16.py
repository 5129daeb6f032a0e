"""bfloat16 in kernels. Triton's interpreter, which runs them in tests, multiplies no bfloat16 and cuts numbers off
where GPUs round them: there it is spelled out."""

from __future__ import annotations

import os

import triton
import triton.language as tl

INTERPRETED = tl.constexpr(os.environ.get("TRITON_INTERPRET") == "1")


@triton.jit
def rounded(x):
    """x, float32, as bfloat16."""
    if INTERPRETED:
        bits = x.to(tl.int32, bitcast=True)
        bits = tl.where(x == x, bits + 0x7FFF + ((bits >> 16) & 1), bits)
        return (bits >> 16).to(tl.int16).to(tl.bfloat16, bitcast=True)
    return x.to(tl.bfloat16)


@triton.jit
def widened(x):
    """x, bfloat16, as float32."""
    if INTERPRETED:
        return (x.to(tl.int16, bitcast=True).to(tl.int32) << 16).to(tl.float32, bitcast=True)
    return x.to(tl.float32)


@triton.jit
def scaled(codes, scale):
    """codes, int8, times scale, bfloat16, rounded once to bfloat16."""
    if INTERPRETED:
        return rounded(codes.to(tl.float32) * widened(scale))
    return codes.to(tl.bfloat16) * scale


@triton.jit
def dot(a, b, total):
    """total + a times b, of bfloat16 with sums in float32."""
    if INTERPRETED:
        exact = tl.dot(widened(a).to(tl.float64), widened(b).to(tl.float64), out_dtype=tl.float64)
        return total + exact.to(tl.float32)  # numpy's own sums depend on where a row stands
    return tl.dot(a, b, total)
