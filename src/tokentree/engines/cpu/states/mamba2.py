"""Mamba 2: of Granite 4, Bamba, Falcon-H1, Nemotron-H, Zamba2 and Mamba 2 itself."""

from __future__ import annotations

from typing import Any

import torch
from torch.nn.functional import softplus

from tokentree.engines.cpu.attention import Recurring
from tokentree.engines.cpu.states.scan import scan
from tokentree.engines.cpu.steady import whole_vectors
from tokentree.kernels.recurrence import linear_worker


def mamba2_chunk_scan(
    forward: Recurring, hidden_states: torch.Tensor, dt: torch.Tensor, A: torch.Tensor, B: torch.Tensor,
    C: torch.Tensor, D: torch.Tensor | None = None, dt_bias: torch.Tensor | None = None, dt_softplus: bool = False,
    dt_limit: tuple[float, float] = (0.0, float("inf")), return_final_states: bool = False, **_: Any,
) -> Any:  # fmt: skip
    """transformers' ``mamba_chunk_scan_combined``: float32[1, rows, heads, values]; and no state, which lies elsewhere,
    where one is asked for.

    Args:
        hidden_states: [1, rows, heads, values].
        dt: [1, rows, heads].
        A, D: [heads].
        B, C: [1, rows, groups, keys].
    """
    if dt_bias is not None:
        dt = dt + dt_bias.to(dt.dtype)
    if dt_softplus:
        dt = whole_vectors(softplus, dt)
    step, x = torch.clamp(dt, min=dt_limit[0], max=dt_limit[1])[0].float(), hidden_states[0].float()
    decay = whole_vectors(torch.exp, A.float() * step)
    out = scan(forward, linear_worker(), B[0], x * step[..., None], decay[..., None], C[0])
    if D is not None:
        out = out + x * D.float()[:, None]
    return (out[None], torch.empty(0)) if return_final_states else out[None]
