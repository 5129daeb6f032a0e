"""Lightning attention: of MiniMax."""

from __future__ import annotations

from typing import Any

import torch

from tokentree.engines.cpu.attention import Recurring
from tokentree.engines.cpu.states.scan import scan
from tokentree.engines.cpu.steady import whole_vectors
from tokentree.kernels.recurrence import linear_worker


def lightning_attention(
    forward: Recurring, module: Any, hidden_states: torch.Tensor, *_: Any, **__: Any
) -> tuple[torch.Tensor, None]:
    """The forward of ``MiniMaxLightningAttention``: [1, rows, width] of ``hidden_states`` [1, rows, width]. A head's
    decay is a constant."""
    width = module.head_dim
    mixed = module.act_fn(module.qkv_proj(hidden_states))[0].unflatten(-1, (module.num_attention_heads, 3 * width))
    query, key, value = mixed.split(width, -1)
    decay = (-module.slope_rate.float()).exp().reshape(1, -1, 1).expand(len(mixed), -1, 1)
    out = scan(forward, linear_worker(), key, value, decay, query).flatten(1)[None].to(hidden_states.dtype)
    gate = whole_vectors(torch.sigmoid, module.output_gate(hidden_states))
    return module.out_proj(gate * module.norm(out)), None
