"""Mamba: of Jamba, Falcon Mamba and Mamba itself."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.nn.functional import pad, silu, softplus

from tokentree.engines.cpu.attention import Recurring
from tokentree.engines.cpu.states.scan import scan
from tokentree.engines.cpu.steady import whole_vectors
from tokentree.kernels.recurrence import selective_worker
from tokentree.kernels.tile import BLOCK


def mamba_selective_scan(
    forward: Recurring, hidden_states: torch.Tensor, dt: torch.Tensor, A: torch.Tensor, B: torch.Tensor,
    C: torch.Tensor, D: torch.Tensor | None = None, z: torch.Tensor | None = None,
    delta_bias: torch.Tensor | None = None, delta_softplus: bool = False, return_last_state: bool = False, **_: Any,
) -> Any:  # fmt: skip
    """transformers' ``selective_scan_fn``: [1, channels, rows]; and no state, which lies elsewhere, where one is asked
    for.

    Args:
        hidden_states, dt, z: [1, channels, rows].
        A: [channels, keys].
        B, C: [1, keys, rows].
        D, delta_bias: [channels].
    """
    if delta_bias is not None:
        dt = dt + delta_bias.to(dt.dtype)[:, None]
    if delta_softplus:
        dt = whole_vectors(softplus, dt)
    x, step = (part[0].t().float()[:, None] for part in (hidden_states, dt))
    key, query = (part[0].t().float()[:, None] for part in (B, C))
    keys = A.shape[1]
    strips = pad(A.float().t(), (0, -A.shape[0] % BLOCK)).view(keys, -1, BLOCK).transpose(0, 1).contiguous()
    out = scan(forward, selective_worker(), key, x * step, step, query, constants=strips)
    made = out[:, 0].t()[None].to(hidden_states.dtype)
    if D is not None:
        made = made + hidden_states * D[:, None]
    if z is not None:
        made = made * whole_vectors(silu, z)
    return (made, torch.empty(0)) if return_last_state else made


class Weights(nn.Module):
    """Weight and bias of a linear layer that nobody calls: a Mamba multiplies with its ``dt_proj.weight`` itself."""

    def __init__(self, own: nn.Linear) -> None:
        super().__init__()
        self.weight, self.bias = own.weight, own.bias


def leave_weights(module: nn.Module) -> None:
    """Has packing leave such a layer of ``module`` (of a `private_copy`) as it is."""
    if type(own := module._modules.get("dt_proj")) is nn.Linear:
        module.dt_proj = Weights(own)
