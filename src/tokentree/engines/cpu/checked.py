"""What is kept is checked before compiled code computes addresses from it."""

from __future__ import annotations

import math
from typing import Any

import torch

from tokentree.errors import ModelError


def expect(what: str, *facts: bool) -> None:
    """Raises `ModelError` unless all that must hold for ``what`` does."""
    if not all(facts):
        raise ModelError(f"what is kept of {what} makes no sense")


def is_tensor(value: Any, dtype: torch.dtype, *sizes: int | None) -> bool:
    """Whether it is a tensor of these sizes, or any where None stands, whose numbers lie one behind another."""
    return (
        isinstance(value, torch.Tensor)
        and value.layout is torch.strided
        and value.device.type == "cpu"
        and value.dtype is dtype
        and value.is_contiguous()
        and value.ndim == len(sizes)
        and all(size in (None, own) for size, own in zip(sizes, value.shape, strict=True))
    )


def is_count(value: Any, least: int = 1) -> bool:
    """Whether it is a whole number, and at least so large."""
    return type(value) is int and least <= value < 1 << 40


def is_number(value: Any) -> bool:
    """Whether it is a finite number, and a float: torch computes with no integers of 64 bits or more."""
    return type(value) is float and math.isfinite(value)
