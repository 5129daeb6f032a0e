"""Gated delta networks: of Qwen3-Next, Qwen3.5 and OLMo Hybrid, and with a decay for each channel of Kimi Linear."""

from __future__ import annotations

from typing import Any

import torch

from tokentree.engines.cpu.attention import Recurring
from tokentree.engines.cpu.states.scan import scan
from tokentree.engines.cpu.steady import whole_vectors
from tokentree.kernels.recurrence import delta_worker

EPSILON = 1e-6  # of the norm of keys and queries


def gated_delta_rule(
    forward: Recurring, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, g: torch.Tensor,
    beta: torch.Tensor, use_qk_l2norm_in_kernel: bool = False, **_: Any,
) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    """transformers' ``chunk_gated_delta_rule`` and ``chunk_kda``: [1, rows, heads, values], and no state, which lies
    elsewhere.

    Args:
        query, key: [1, rows, groups, keys].
        value: [1, rows, heads, values].
        g: [1, rows, heads] or [1, rows, heads, keys], logarithms of decays.
        beta: [1, rows, heads], the rates.
    """
    rows, heads = value.shape[1:3]
    queries, keys = query[0].float(), key[0].float()
    if use_qk_l2norm_in_kernel:
        queries, keys = _unit(queries), _unit(keys)
    decay = whole_vectors(torch.exp, g[0].float()).reshape(rows, heads, -1)
    out = scan(
        forward, delta_worker(), keys, value[0], decay, queries * query.shape[-1] ** -0.5, rate=beta[0],
    )  # fmt: skip
    return out[None].to(query.dtype), torch.empty(0)


def _unit(x: torch.Tensor) -> torch.Tensor:
    """Rows of length one."""
    return x / ((x * x).sum(-1, keepdim=True) + EPSILON).sqrt()
