# numba gives every scalar a type of its own, which annotations can't follow:
# mypy: disable-error-code="no-untyped-def,no-untyped-call,untyped-decorator,attr-defined,call-arg,operator"
"""What a model does to each row by itself, step by step as transformers' modules do it: what is rounded to bfloat16
there is rounded here. Arrays of int16 hold bfloat16."""

from __future__ import annotations

import numba
import numpy as np

from tokentree.kernels.bfloat16 import exponentials, narrow, widen
from tokentree.kernels.tile import LANES


@numba.njit
def normalize(bits, weight, eps, result):
    """RMS norm as Llama has it: x * rsqrt(mean(x ** 2) + eps) in float32, rounded, times the weight."""
    width = len(bits)
    x, lanes = np.zeros(-(-width // LANES) * LANES, np.float32), np.zeros(LANES, np.float32)
    widen(bits, x[:width])
    for start in range(0, len(x), LANES):
        for lane in range(LANES):
            lanes[lane] += x[start + lane] * x[start + lane]
    total = np.float32(0)
    for lane in range(LANES):
        total += lanes[lane]
    factor = np.float32(1) / np.sqrt(total / np.float32(width) + eps)
    for i in range(width):
        x[i] *= factor
    narrow(x[:width], result)
    widen(result, x[:width])
    for i in range(width):
        x[i] *= weight[i]
    narrow(x[:width], result)


@numba.njit
def add(bits, more):
    """``bits`` += ``more``, rounded."""
    x, y = np.empty(len(bits), np.float32), np.empty(len(bits), np.float32)
    widen(bits, x)
    widen(more, y)
    for i in range(len(x)):
        x[i] += y[i]
    narrow(x, bits)


@numba.njit
def rotary(bits, cos, sin, result, scratch, rounded):
    """Rotary positions: float32 x * cos + rotate_half(x) * sin, each product and the sum rounded. ``cos`` and ``sin``
    are float32; ``scratch`` float32[2, width] and ``rounded`` int16[width] are lost."""
    width, half, x, y = len(bits), len(bits) // 2, scratch[0], scratch[1]
    widen(bits, x)
    for i in range(half):
        y[i], y[half + i] = -x[half + i] * sin[i], x[i] * sin[half + i]
    narrow(y, rounded)
    widen(rounded, y)
    for i in range(width):
        x[i] *= cos[i]
    narrow(x, rounded)
    widen(rounded, x)
    for i in range(width):
        x[i] += y[i]
    narrow(x, rounded)
    widen(rounded, result)


@numba.njit
def swiglu(g, u, scratch, result):
    """silu(g) * u, each step rounded; ``g`` and ``u`` are float32 and already rounded, and lost."""
    for i in range(len(g)):
        scratch[i] = -g[i]
    exponentials(scratch)
    for i in range(len(g)):
        g[i] = g[i] / (np.float32(1) + scratch[i])
    narrow(g, result)
    widen(result, g)
    for i in range(len(g)):
        g[i] *= u[i]
    narrow(g, result)


@numba.njit
def quantize(bits, group, result, scales, totals):
    """bfloat16 to round(x / scale) with scale = max(abs(x)) / 127 for each ``group`` of it; ``result``, which may be
    longer, gets zeros at its end. ``totals`` are the sums of groups, of what their numbers stand for."""
    x, peak = np.zeros(len(result), np.float32), np.zeros(1, np.int32)
    widen(bits, x[: len(bits)])
    for g in range(len(scales)):
        part, into = x[g * group : (g + 1) * group], result[g * group : (g + 1) * group]
        # magnitudes order as the integers with their bits, whose maximum compiles to vector instructions
        magnitudes, most = part.view(np.int32), np.int32(0)
        for i in range(group):
            most = max(most, magnitudes[i] & np.int32(0x7FFFFFFF))
        peak[0] = most
        top = peak.view(np.float32)[0]
        scales[g] = top / np.float32(127)
        factor, total = np.float32(127) / top if top > 0 else np.float32(0), np.int32(0)
        for i in range(group):
            number = np.int32(np.floor(part[i] * factor + np.float32(128.5))) - np.int32(128)
            into[i] = number
            total += number
        totals[g] = scales[g] * np.float32(total)
