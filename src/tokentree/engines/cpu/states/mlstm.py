"""The mLSTM: of xLSTM."""

from __future__ import annotations

from typing import Any

import torch
from torch.nn.functional import logsigmoid, pad

from tokentree.engines.cpu.attention import Recurring
from tokentree.engines.cpu.states.scan import scan
from tokentree.engines.cpu.steady import whole_vectors
from tokentree.kernels.recurrence import mlstm_worker


def matrix_memory(
    forward: Recurring, module: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor,
    igate: torch.Tensor, fgate: torch.Tensor, **_: Any,
) -> tuple[torch.Tensor, None]:  # fmt: skip
    """The forward of ``xLSTMBackend``: [1, heads, rows, values]; and no state, which lies elsewhere.

    A value has two numbers more: 1, whose column of the state is the normaliser, and one whose result is the exponent
    that the state is under. That stands in one more row of the state, so keys and queries have a 0 more.

    Args:
        query, key: [1, heads, rows, keys].
        value: [1, heads, rows, values].
        igate, fgate: [1, heads, rows].
    """
    width = value.shape[3]
    queries, keys, values = (part[0].transpose(0, 1).float() for part in (query, key, value))
    gates = torch.stack([igate[0].t().float(), whole_vectors(logsigmoid, fgate[0].t().float())], -1)
    one = pad(torch.ones_like(values[..., :1]), (0, 1))
    scaled = pad(queries * query.shape[3] ** -0.5, (0, 1))
    out = scan(forward, mlstm_worker(), pad(keys, (0, 1)), torch.cat([values, one], -1), gates, scaled)
    read, normaliser, exponent = out.split([width, 1, 1], -1)
    least = whole_vectors(torch.exp, -exponent)
    made = read / (torch.maximum(normaliser.abs(), least) + module.config.eps)
    return made.transpose(0, 1)[None].to(query.dtype), None
