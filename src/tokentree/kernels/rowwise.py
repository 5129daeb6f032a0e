# numba gives every scalar a type of its own, which annotations can't follow:
# mypy: disable-error-code="no-untyped-def,no-untyped-call,untyped-decorator,attr-defined,call-arg,operator"
"""What a model does to each row by itself, step by step as transformers' modules do it: what is rounded to bfloat16
there is rounded here. Arrays of int16 hold bfloat16."""

from __future__ import annotations

import math

import numba
import numpy as np

from tokentree.kernels.bfloat16 import exponentials, narrow, widen
from tokentree.kernels.tile import LANES

STRIP = 512  # numbers of a row that are gated at a time, so that they stay in the nearest cache
TWICE_ROOT, CUBE = np.float32(2 * math.sqrt(2 / math.pi)), np.float32(0.044715)  # of GELU's approximation by tanh


@numba.njit
def normalize(bits, weight, eps, result):
    """RMS norm as Llama has it: x * rsqrt(mean(x ** 2) + eps) in float32, rounded, times the weight."""
    x = _by_root_mean_square(bits, eps)
    narrow(x, result)
    widen(result, x)
    for i in range(len(x)):
        x[i] *= weight[i]
    narrow(x, result)


@numba.njit
def normalize_once(bits, weight, eps, result):
    """RMS norm as Gemma has it: x * rsqrt(mean(x ** 2) + eps) * weight in float32, rounded once."""
    x = _by_root_mean_square(bits, eps)
    for i in range(len(x)):
        x[i] *= weight[i]
    narrow(x, result)


@numba.njit
def _by_root_mean_square(bits, eps):
    """float32 x * rsqrt(mean(x ** 2) + eps)."""
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
    return x[:width]


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
def scale(bits, factor):
    """``bits`` *= ``factor``, rounded."""
    x = np.empty(len(bits), np.float32)
    widen(bits, x)
    for i in range(len(x)):
        x[i] *= factor
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
def geglu(bits, result):
    """gelu(g) * u by tanh's approximation, each step rounded; ``bits`` are those of g, then those of u."""
    width, scratch = len(result), np.empty((3, STRIP), np.float32)
    for start in range(0, width, STRIP):
        end = min(start + STRIP, width)
        g, u, power = scratch[0, : end - start], scratch[1, : end - start], scratch[2, : end - start]
        into = result[start:end]
        widen(bits[start:end], g)
        widen(bits[width + start : width + end], u)
        for i in range(len(g)):  # (1 + tanh(x)) / 2 = 1 / (1 + exp(-2 x))
            power[i] = -TWICE_ROOT * (g[i] + CUBE * g[i] * g[i] * g[i])
        exponentials(power)
        for i in range(len(g)):
            g[i] /= np.float32(1) + power[i]
        narrow(g, into)
        widen(into, g)
        for i in range(len(g)):
            g[i] *= u[i]
        narrow(g, into)


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
