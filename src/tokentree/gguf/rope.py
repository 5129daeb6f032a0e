"""How a GGUF file says that positions turn keys and queries."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from tokentree.gguf.entries import Entries, shown

ROPE_TENSORS = ("rope_freqs.weight", "rope_factors_short.weight", "rope_factors_long.weight")


def rope_of(
    entries: Entries, width: int, context: int, turned: str, scalings: tuple[str, ...]
) -> dict[str, Any]:  # fmt: skip
    """How positions turn keys and queries, as ``rope_parameters``.

    Args:
        width: of a head.
        context: the most positions.
        turned, scalings: see `gguf_settings.Family`.

    Raises:
        GgufError: if something can't be honoured.
    """
    rope: dict[str, Any] = {"rope_type": "default", "rope_theta": entries.number("rope.freq_base", 10000.0)}
    part = entries.whole("rope.dimension_count", width)
    if part > width or part % 2 or (part < width and turned == "all"):
        entries.refuse(f"{entries.architecture}.rope.dimension_count is {part}, where heads are {width} wide")
    if turned == "some":
        share = part / width
        rope["partial_rotary_factor"] = share if int(width * share) == part else math.nextafter(share, 1)
    old = entries.number("rope.scale_linear", 1.0, zero=True)
    factor = entries.number("rope.scaling.factor", old, zero=True) or 1.0
    kind = entries.take("rope.scaling.type", "linear")
    original = entries.whole("rope.scaling.original_context_length", context, least=0) or context
    attention = entries.number("rope.scaling.attn_factor", 1.0)
    factors = _factors(entries, part)
    scaling = ""
    if kind == "yarn":
        scaling = "yarn"
        rope |= _yarn(entries, factor, original, attention)
    elif len(factors) == 2:
        scaling = "factors"
        rope |= explicit_factors(factors[0], factors[1], original, attention)
    elif kind in ("linear", "none"):
        factor = factor if kind == "linear" else 1.0
        scaling = "factors" if factors else "linear" if factor != 1 else ""
        if factors and any(one != 1 for one in factors[0]):
            known = llama3(factors[0], rope["rope_theta"], part, original) if factor == 1 else None
            same = [one * factor for one in factors[0]]
            rope |= known or explicit_factors(same, same, context, 1.0)
        elif factor != 1:
            rope |= {"rope_type": "linear", "factor": factor}
    if kind not in ("yarn", "linear", "none") and len(factors) < 2:
        entries.refuse(f"{entries.architecture}.rope.scaling.type is {shown(kind)}, which can't be honoured here")
    if scaling and scaling not in scalings:
        entries.refuse(f"it scales its positions ({scaling}), which no {entries.architecture} here can")
    if kind == "yarn" and factors:
        entries.refuse(f"it has {ROPE_TENSORS[0]} and yarn, which can't be honoured together")
    if attention != 1 and kind != "yarn" and len(factors) < 2:
        entries.refuse(f"{entries.architecture}.rope.scaling.attn_factor is {attention}, which can't be honoured here")
    return rope


def _yarn(entries: Entries, factor: float, original: int, attention: float) -> dict[str, Any]:
    """YaRN (Peng et al. 2023, arXiv:2309.00071); llama.cpp's attention factor comes on top of the paper's."""
    for key, known in (("yarn_ext_factor", (-1, 1)), ("yarn_attn_factor", (1,)), ("yarn_log_multiplier", (0,))):
        if (given := entries.take(f"rope.scaling.{key}", known[0])) not in known:
            entries.refuse(f"{entries.architecture}.rope.scaling.{key} is {given}, which can't be honoured here")
    rope: dict[str, Any] = {"rope_type": "yarn", "factor": factor, "original_max_position_embeddings": original}
    for name, plain in (("beta_fast", 32.0), ("beta_slow", 1.0)):
        if (given := entries.number(f"rope.scaling.yarn_{name}", plain)) != plain:
            rope[name] = given
    if attention != 1:
        rope["attention_factor"] = attention * (0.1 * math.log(factor) + 1 if factor > 1 else 1.0)
    return rope


def _factors(entries: Entries, turned: int) -> list[list[float]]:
    """What the wavelengths of all pairs are multiplied by: none, one list, or one for short texts and one for long."""
    found = [entries.header.tensors[name] for name in ROPE_TENSORS if name in entries.header.tensors]
    lists = [[float(one) for one in entries.header.values(tensor).ravel()] for tensor in found]
    for tensor, factors in zip(found, lists):
        if len(factors) != turned // 2 or not all(math.isfinite(one) and one > 0 for one in factors):
            entries.refuse(f"its tensor {tensor.name} isn't {turned // 2} factors")
    if len(found) not in (0, 1 if ROPE_TENSORS[0] in entries.header.tensors else 2):
        entries.refuse(f"of {', '.join(ROPE_TENSORS)} it has an odd choice")
    return lists


def explicit_factors(short: list[float], long: list[float], original: int, attention: float) -> dict[str, Any]:
    """LongRoPE's form (Ding et al. 2024, arXiv:2402.13753), which takes any factors."""
    return {
        "rope_type": "longrope", "short_factor": short, "long_factor": long, "attention_factor": attention,
        "original_max_position_embeddings": original,
    }  # fmt: skip


def llama3(factors: list[float], theta: float, turned: int, original: int) -> dict[str, Any] | None:
    """The settings of Llama 3.1 that these factors were computed from, or None: no file has the settings themselves.
    By them, frequencies are the original's to the last bit."""
    waves = 2 * math.pi * theta ** (np.arange(0, turned, 2) / turned)
    factor = float(str(np.float32(max(factors))))
    for context in dict.fromkeys((8192, original)):
        smooth = np.clip((context / waves - 1) / 3, 0, 1)
        if np.allclose(1 / ((1 - smooth) / factor + smooth), factors, rtol=1e-5, atol=0):
            return {
                "rope_type": "llama3", "factor": factor, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
                "original_max_position_embeddings": context,
            }  # fmt: skip
    return None
