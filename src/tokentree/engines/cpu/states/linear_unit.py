"""The real-gated linear recurrent unit: of RecurrentGemma."""

from __future__ import annotations

from typing import Any

import torch

from tokentree.engines.cpu.attention import Recurring
from tokentree.engines.cpu.states.convolution import causal_conv1d
from tokentree.engines.cpu.states.scan import scan
from tokentree.kernels.recurrence import gated_worker


def linear_unit(
    forward: Recurring, module: Any, hidden_states: torch.Tensor, recurrent_gate: torch.Tensor, reset: torch.Tensor,
    **_: Any,
) -> tuple[torch.Tensor, None]:  # fmt: skip
    """``RecurrentGemmaRglru._rnn_scan``: [1, rows, width] of inputs and decays [1, rows, width]; and no state, which
    lies elsewhere. A text's first row has no state to go on from, so it needs no ``reset``."""
    value, decay = (part[0].float()[:, None] for part in (hidden_states, recurrent_gate))
    nothing = value.new_zeros(len(value), 1, 1)  # a state of one row has no keys
    out = scan(forward, gated_worker(), nothing, value, decay, nothing)
    return out.flatten(1)[None].to(hidden_states.dtype), None


def convolution(forward: Recurring, module: Any, x: torch.Tensor) -> torch.Tensor:
    """The forward of its ``conv_1d``."""
    return causal_conv1d(forward, x, module.weight[:, 0], module.bias)
