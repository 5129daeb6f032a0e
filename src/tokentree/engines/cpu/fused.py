# numba gives every scalar a type of its own, which annotations can't follow:
# mypy: disable-error-code="no-untyped-def,no-untyped-call,untyped-decorator,call-arg,no-any-return,operator"
"""Modules that many models share, each computed in one compiled call instead of several of torch's, step by step as the
model itself would: what is rounded there is rounded here. In bfloat16, on CPUs.

A module which only looks like one of these is left alone: its forward must be, instruction by instruction, that of the
class in transformers that one of these stands for.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import nn

from tokentree.engines.cpu.checked import expect, is_number, is_tensor
from tokentree.engines.cpu.linear import restored
from tokentree.engines.cpu.packing import Packing
from tokentree.jit import njit
from tokentree.kernels import rowwise as rows
from tokentree.kernels.tile import BLOCK

ROTARY = {"LlamaAttention", "MistralAttention", "Qwen2Attention"}  # of transformers, all alike
GATED = {"gate_proj", "up_proj", "down_proj", "act_fn"}  # the parts of a gated MLP, as transformers calls them


class FusedMLP(nn.Module):
    """down(silu(gate(x)) * up(x)), with gate and up as one product."""

    def __init__(self, own: Any, packing: Packing) -> None:
        super().__init__()
        self.gate_up = packing.pack(own.gate_proj, own.up_proj, gated=True)
        self.down_proj = own.down_proj

    @staticmethod
    def fits(own: Any, packing: Packing) -> bool:
        """Whether ``own`` is such a module, with sizes that suit ``packing``."""
        from transformers.activations import SiLUActivation  # takes seconds
        from transformers.models.llama.modeling_llama import LlamaMLP

        from tokentree.engines.foreign import same_forward

        if set(own._modules) != GATED or type(own.act_fn) not in (nn.SiLU, SiLUActivation):
            return False
        if not same_forward(own, LlamaMLP):
            return False
        gate, up = own.gate_proj, own.up_proj
        return (
            packing.fits(gate, up, own.down_proj)
            and gate.weight.shape == up.weight.shape
            and (gate.bias is None) == (up.bias is None)
            and not gate.out_features % BLOCK
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.down_proj(self.gate_up(x))
        return out


class FusedAttention(nn.Module):
    """The weights of an attention with rotary positions as Llama, Mistral and Qwen2 have it, those of queries, keys and
    values as one. `program` computes it."""

    def __init__(self, own: Any, packing: Packing) -> None:
        super().__init__()
        parts = [getattr(own, f"{name}_proj") for name in "qkv"]
        self.qkv, self.o_proj = packing.pack(*parts), own.o_proj
        self.width: int = own.head_dim
        self.heads, self.kv_heads = (part.out_features // self.width for part in parts[:2])
        self.scale = float(own.scaling)
        config_window = getattr(own.config, "sliding_window", None)
        self.window: int | None = getattr(own, "sliding_window", config_window)

    @staticmethod
    def fits(own: Any, packing: Packing) -> bool:
        """Whether ``own`` is such a module, with sizes that suit ``packing``."""
        if type(own).__name__ not in ROTARY or not type(own).__module__.startswith("transformers."):
            return False
        parts = [getattr(own, f"{name}_proj") for name in "qkvo"]
        same = len({part.bias is None for part in parts[:3]}) == 1
        return packing.fits(*parts) and same and own.head_dim % 2 == 0


class FusedNorm(nn.Module):
    """RMS norm as Llama has it: x * rsqrt(mean(x ** 2) + eps) in float32, rounded, times the weight."""

    weight: torch.Tensor

    def __init__(self, own: Any) -> None:
        super().__init__()
        self.register_buffer("weight", own.weight.detach().float())
        self.eps = np.float32(own.variance_epsilon)

    @staticmethod
    def fits(own: Any) -> bool:
        """Whether ``own`` is such a module."""
        from transformers.models.llama.modeling_llama import LlamaRMSNorm  # takes seconds

        from tokentree.engines.foreign import same_forward

        weight = getattr(own, "weight", None)
        return (
            type(own).__name__.endswith("RMSNorm")
            and isinstance(weight, nn.Parameter)
            and weight.dtype is torch.bfloat16
            and weight.ndim == 1
            and isinstance(getattr(own, "variance_epsilon", None), float)
            and set(own._parameters) == {"weight"}
            and same_forward(own, LlamaRMSNorm)
        )

    @classmethod
    def of_state(cls, state: dict[str, Any]) -> FusedNorm:
        """One that is kept: its weight, and epsilon.

        Raises:
            ModelError: if they are none.
        """
        expect("a norm", is_tensor(state["weight"], torch.float32, None), is_number(state["eps"]))
        return restored(cls, {"weight": state["weight"], "eps": np.float32(state["eps"])})

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if x.shape[-1] != len(self.weight) or x.dtype is not torch.bfloat16:
            raise ValueError(f"a norm for bfloat16 rows of {len(self.weight)} numbers got {x.dtype} {tuple(x.shape)}")
        x = x.contiguous()
        out = torch.empty_like(x)
        bits, results = (part.view(torch.int16).view(-1, part.shape[-1]).numpy() for part in (x, out))
        _norm(bits, self.weight.numpy(), self.eps, results)
        return out


@njit(cache=True)
def _norm(bits, weight, eps, results):
    for row in range(len(bits)):
        rows.normalize(bits[row], weight, eps, results[row])
