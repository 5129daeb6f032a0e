"""Short convolutions: of LFM2, and in front of most recurrences."""

from __future__ import annotations

from typing import Any

import torch
from transformers.activations import ACT2FN

from tokentree.engines.cpu.attention import Recurring
from tokentree.engines.cpu.steady import whole_vectors
from tokentree.engines.recurrent import Recurrence
from tokentree.kernels.convolution import ConvolutionCall, convolution_worker
from tokentree.kernels.recurrence import StateRows
from tokentree.kernels.threads import run


def causal_conv1d(
    forward: Recurring, hidden_states: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None,
    activation: str | None = None, **_: Any,
) -> torch.Tensor:  # fmt: skip
    """transformers' ``causal_conv1d_fn``: [1, channels, rows], of inputs like these and ``weight`` [channels, taps].
    Rows come without a window: the text before them is known here."""
    rows = hidden_states[0].t().to(torch.float32).contiguous()
    (count, channels), taps = rows.shape, weight.shape[1]
    turned = weight.detach().t().to(torch.float32).contiguous()
    start = torch.zeros(channels) if bias is None else bias.detach().to(torch.float32)
    out = torch.zeros(count, channels, dtype=torch.float32)

    def loop(table: list[StateRows]) -> None:
        call = ConvolutionCall(
            channels=channels, taps=taps, weight=turned.data_ptr(), bias=start.data_ptr(), rows=rows.data_ptr(),
            results=out.data_ptr(), segments=len(table),
        )  # fmt: skip
        run(convolution_worker(), [*call, *(number for rows in table for number in rows)])

    forward.recur(Recurrence(channels, taps - 1, 0), rows, loop)
    made = out.to(weight.dtype)
    if activation is not None:
        made = whole_vectors(ACT2FN[activation], made)
    return made.to(hidden_states.dtype).t()[None]
