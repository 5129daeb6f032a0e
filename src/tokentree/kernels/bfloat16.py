# numba gives every scalar a type of its own:
# mypy: disable-error-code="no-untyped-def,no-untyped-call,untyped-decorator,attr-defined,call-arg"
"""bfloat16, which neither numpy nor numba has, and exponentials, over rows of numbers."""

from __future__ import annotations

import math

import numba
import numpy as np
from llvmlite import ir
from numba.extending import intrinsic

LOG2_E, LEAST, MOST = np.float32(math.log2(math.e)), np.float32(-126), np.float32(127)
# 2 ** x = 1 + x * (C1 + x * (C2 + ...)): the coefficients of Cephes' exp2f
C1, C2, C3, C4, C5, C6 = (
    np.float32(c)
    for c in (6.931472028550421e-1, 2.402264791363012e-1, 5.550332471162809e-2, 9.618437357674640e-3,
              1.339887440266574e-3, 1.535336188319500e-4)
)  # fmt: skip


@numba.njit
def widen(bits, out):
    """bfloat16, given as int16, to float32."""
    words = out.view(np.int32)
    for i in range(len(bits)):
        words[i] = np.int32(bits[i]) << np.int32(16)


@numba.njit
def narrow(x, out):
    """float32 to bfloat16 as int16, rounded to the nearest, ties to even; not for what is no number."""
    bits = x.view(np.int32)
    for i in range(len(x)):
        out[i] = np.int16((bits[i] + np.int32(0x7FFF) + ((bits[i] >> np.int32(16)) & np.int32(1))) >> np.int32(16))


@intrinsic
def _as_float(typingctx, bits):
    """The float32 that has these bits, an int32."""

    def generate(context, builder, signature, args):
        return builder.bitcast(args[0], ir.FloatType())

    return numba.float32(numba.int32), generate


@numba.njit
def exponentials(x):
    """Turns float32 x into exp(x), in place: 0 below 2 ** -126, and never above 2 ** 127.

    exp(x) = 2 ** whole * 2 ** part, the latter by a polynomial on [-0.5, 0.5] with a relative error below 1e-7.
    """
    for i in range(len(x)):
        power = min(x[i] * LOG2_E, MOST)
        power = power if power > LEAST else LEAST
        whole = np.floor(power + np.float32(0.5))
        part = power - whole
        factor: np.float32 = _as_float(np.int32((np.int32(whole) + np.int32(127)) << np.int32(23)))
        root = part * (C1 + part * (C2 + part * (C3 + part * (C4 + part * (C5 + part * C6)))))
        x[i] = (root + np.float32(1)) * factor if power > LEAST else np.float32(0)
