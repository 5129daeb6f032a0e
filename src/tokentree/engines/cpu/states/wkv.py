"""WKV: of RWKV, whose layers also mix each row with the one before."""

from __future__ import annotations

from typing import Any

import torch
from torch.nn.functional import pad

from tokentree.engines.cpu.attention import Recurring
from tokentree.engines.cpu.states.convolution import causal_conv1d
from tokentree.engines.cpu.states.scan import scan
from tokentree.kernels.recurrence import wkv_worker
from tokentree.kernels.tile import BLOCK

STATE = 3  # numbers of a channel's state: a weighted sum, the sum of weights, and the exponent that both are under


def weighted_values(
    forward: Recurring, time_decay: torch.Tensor, time_first: torch.Tensor, key: torch.Tensor, value: torch.Tensor,
    state: Any = None, return_state: bool = False,
) -> tuple[torch.Tensor, None]:  # fmt: skip
    """transformers' ``rwkv_linear_attention``: [1, rows, channels]; and no state, which lies elsewhere.

    Args:
        time_decay, time_first: [channels].
        key, value: [1, rows, channels].
    """
    constants = torch.stack([-time_decay.float().exp(), time_first.float()])
    strips = pad(constants, (0, -constants.shape[1] % BLOCK)).view(2, -1, BLOCK).transpose(0, 1).contiguous()
    keys, values = (part[0].float()[:, None] for part in (key, value))
    nothing = values.new_zeros(len(values), 1, STATE)
    out = scan(forward, wkv_worker(), nothing, values, keys, nothing, constants=strips)
    return out.flatten(1)[None].to(key.dtype), None


def row_before(forward: Recurring, module: Any, hidden: torch.Tensor) -> torch.Tensor:
    """The forward of ``time_shift``: each row's predecessor, [1, rows, width] of the same."""
    taps = hidden.new_tensor([1.0, 0.0]).expand(hidden.shape[2], 2)
    return causal_conv1d(forward, hidden.transpose(1, 2), taps).transpose(1, 2)
