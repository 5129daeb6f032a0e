# numba gives every scalar a type of its own, which annotations can't follow:
# mypy: disable-error-code="no-untyped-def,no-untyped-call,untyped-decorator,call-arg,no-any-return,operator"
"""Modules that many models share, each computed in one compiled call instead of several of torch's, step by step as the
model itself would: what is rounded there is rounded here. In bfloat16, on CPUs.

An engine compares its forward with the model's own when it is made, so that a module which only looks like one of these
is found out.
"""

from __future__ import annotations

from typing import Any

import numba
import numpy as np
import torch
from torch import nn
from transformers.activations import SiLUActivation

from tokentree.engines.attention import ForwardKV, attend_rows
from tokentree.engines.kernels import LANES, narrow, widen
from tokentree.engines.linear import Int8Linear, PackedLinear, paired

Kind = type[PackedLinear] | type[Int8Linear]
ROTARY = {"LlamaAttention", "MistralAttention", "Qwen2Attention"}  # of transformers, all alike
GATED = {"gate_proj", "up_proj", "down_proj", "act_fn"}  # the parts of a gated MLP, as transformers calls them


class FusedMLP(nn.Module):
    """down(silu(gate(x)) * up(x)), with gate and up as one product."""

    def __init__(self, own: Any, kind: Kind) -> None:
        super().__init__()
        gate, up = own.gate_proj, own.up_proj
        bias = None if gate.bias is None else paired(gate.bias, up.bias)
        self.gate_up = kind(paired(gate.weight, up.weight), bias, gated=True)
        self.down_proj = own.down_proj

    @staticmethod
    def fits(own: Any, kind: Kind) -> bool:
        """Whether ``own`` is such a module, with sizes that suit ``kind``."""
        if set(own._modules) != GATED or not isinstance(own.act_fn, nn.SiLU | SiLUActivation):
            return False
        gate, up = own.gate_proj, own.up_proj
        linear = type(gate) is type(up) is nn.Linear
        return linear and gate.weight.shape == up.weight.shape and kind.fits(gate.weight)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.down_proj(self.gate_up(x))
        return out


class FusedAttention(nn.Module):
    """Attention with rotary positions as Llama, Mistral and Qwen2 have it, over a tree: queries, keys and values as one
    product, then turned and stored in one go."""

    def __init__(self, own: Any, kind: Kind) -> None:
        super().__init__()
        parts = [getattr(own, f"{name}_proj") for name in "qkv"]
        bias = None if parts[0].bias is None else torch.cat([part.bias for part in parts])
        self.qkv, self.o_proj = kind(torch.cat([part.weight for part in parts]), bias), own.o_proj
        self._width: int = own.head_dim
        self._heads, self._kv_heads = (part.out_features // self._width for part in parts[:2])
        self._scale, self._layer = float(own.scaling), int(own.layer_idx)
        config_window = getattr(own.config, "sliding_window", None)
        self._window: int | None = getattr(own, "sliding_window", config_window)

    @staticmethod
    def fits(own: Any, kind: Kind) -> bool:
        """Whether ``own`` is such a module, with sizes that suit ``kind``."""
        if type(own).__name__ not in ROTARY or not type(own).__module__.startswith("transformers."):
            return False
        parts = [getattr(own, f"{name}_proj") for name in "qkv"]
        return all(type(part) is nn.Linear and kind.fits(part.weight) for part in parts) and own.head_dim % 2 == 0

    def forward(
        self, hidden_states: torch.Tensor, position_embeddings: tuple[torch.Tensor, torch.Tensor],
        forward_kv: ForwardKV, **_: Any,
    ) -> tuple[torch.Tensor, None]:  # fmt: skip
        rows, heads, kv_heads, width = hidden_states.shape[1], self._heads, self._kv_heads, self._width
        qkv = self.qkv(hidden_states[0])
        queries, keys = torch.empty(rows, heads, width), torch.empty(rows, kv_heads, width)
        values = torch.empty(rows, kv_heads, width)
        turns = [turn[0].contiguous().view(torch.int16).numpy() for turn in position_embeddings]
        _turn(qkv.view(torch.int16).numpy(), *turns, queries.numpy(), keys.numpy(), values.numpy())
        forward_kv.write(self._layer, keys.transpose(0, 1), values.transpose(0, 1))
        query = queries.transpose(0, 1)
        out = attend_rows(forward_kv, self._layer, query, kv_heads, width, self._scale, self._window)
        return self.o_proj(out.view(1, rows, heads * width).to(hidden_states.dtype)), None


class FusedNorm(nn.Module):
    """RMS norm as Llama has it: x * rsqrt(mean(x ** 2) + eps) in float32, rounded, times the weight."""

    def __init__(self, own: Any) -> None:
        super().__init__()
        self.register_buffer("weight", own.weight.detach().float())
        self._eps = np.float32(own.variance_epsilon)

    @staticmethod
    def fits(own: Any) -> bool:
        """Whether ``own`` is such a module."""
        weight = getattr(own, "weight", None)
        return (
            type(own).__name__.endswith("RMSNorm")
            and isinstance(weight, nn.Parameter)
            and weight.dtype is torch.bfloat16
            and weight.ndim == 1
            and isinstance(getattr(own, "variance_epsilon", None), float)
            and set(own._parameters) == {"weight"}
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x.contiguous()
        out = torch.empty_like(x)
        rows, results = (part.view(torch.int16).view(-1, part.shape[-1]).numpy() for part in (x, out))
        _norm(rows, self.weight.numpy(), self._eps, results)
        return out


@numba.njit(cache=True)
def _turn(qkv, cos, sin, queries, keys, values):
    """x * cos + rotate_half(x) * sin for queries and keys, each product and the sum rounded to bfloat16."""
    rows, heads, width = queries.shape
    kv_heads, half = keys.shape[1], width // 2
    c, s = np.empty(width, np.float32), np.empty(width, np.float32)
    x, y, rounded = np.empty(width, np.float32), np.empty(width, np.float32), np.empty(width, np.int16)
    for row in range(rows):
        widen(cos[row], c)
        widen(sin[row], s)
        for head in range(heads + kv_heads):
            widen(qkv[row, head * width : (head + 1) * width], x)
            for i in range(half):
                y[i], y[half + i] = -x[half + i] * s[i], x[i] * s[half + i]
            narrow(y, rounded)
            widen(rounded, y)
            for i in range(width):
                x[i] *= c[i]
            narrow(x, rounded)
            widen(rounded, x)
            for i in range(width):
                x[i] += y[i]
            narrow(x, rounded)
            if head < heads:
                widen(rounded, queries[row, head])
            else:
                widen(rounded, keys[row, head - heads])
        for head in range(kv_heads):
            start = (heads + kv_heads + head) * width
            widen(qkv[row, start : start + width], values[row, head])


@numba.njit(cache=True)
def _norm(rows, weight, eps, results):
    width = rows.shape[1]
    x, lanes = np.zeros(-(-width // LANES) * LANES, np.float32), np.empty(LANES, np.float32)
    for row in range(len(rows)):
        widen(rows[row], x[:width])
        lanes[:] = 0
        for start in range(0, len(x), LANES):
            for lane in range(LANES):
                lanes[lane] += x[start + lane] * x[start + lane]
        total = np.float32(0)
        for lane in range(LANES):
            total += lanes[lane]
        factor = np.float32(1) / np.sqrt(total / np.float32(width) + eps)
        for i in range(width):
            x[i] *= factor
        narrow(x[:width], results[row])
        widen(results[row], x[:width])
        for i in range(width):
            x[i] *= weight[i]
        narrow(x[:width], results[row])
