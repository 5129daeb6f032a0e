# numba gives every scalar a type of its own, which annotations can't follow:
# mypy: disable-error-code="no-untyped-def,no-untyped-call,untyped-decorator,call-arg,no-any-return,operator"
"""Modules that many models share, each computed in one compiled call instead of several of torch's, step by step as the
model itself would: what is rounded there is rounded here. In bfloat16, on CPUs.

A module which only looks like one of these is left alone: its forward must be, instruction by instruction, that of the
class in transformers that one of these stands for.
"""

from __future__ import annotations

import functools
from typing import Any, ClassVar, Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from tokentree.engines.cpu.checked import expect, is_count, is_number, is_tensor
from tokentree.engines.cpu.linear import PackedLinear, restored
from tokentree.engines.cpu.packing import Packing
from tokentree.engines.cpu.quantized import QuantizedLinear
from tokentree.jit import njit
from tokentree.kernels import rowwise as rows
from tokentree.kernels.tile import BLOCK

Packed = PackedLinear | QuantizedLinear
Kind = type[PackedLinear] | type[QuantizedLinear]
Bits = NDArray[np.int16]  # of bfloat16[rows, width]

SIZES = ("heads", "kv_heads", "width", "scale", "window")  # of an attention


class FusedMLP(nn.Module):
    """down(silu(gate(x)) * up(x)), with gate and up as one product.

    Attributes:
        gated: whether that product is gated too.
        parts: what gate, up and down are called in transformers.
    """

    gated: ClassVar[bool] = True
    parts: ClassVar[tuple[str, ...]] = ("gate_proj", "up_proj", "down_proj")

    def __init__(self, own: Any, packing: Packing) -> None:
        super().__init__()
        *both, self.down_proj = self.products(own)
        self.gate_up = packing.pack(*both, gated=self.gated)

    @classmethod
    def products(cls, own: Any) -> list[Any]:
        """The linear layers of ``own``."""
        return [getattr(own, name) for name in cls.parts]

    @classmethod
    def joined(cls, own: Any) -> list[Any]:
        """The linear layers of ``own`` that are packed when one is made."""
        return cls.products(own)[:2]

    @classmethod
    def fits(cls, own: Any, packing: Packing) -> bool:
        """Whether ``own`` is such a module, with sizes that suit ``packing``."""
        if not cls._computes(own):
            return False
        gate, up, down = cls.products(own)
        return (
            packing.fits(gate, up, down)
            and gate.weight.shape == up.weight.shape
            and (gate.bias is None) == (up.bias is None)
            and not gate.out_features % BLOCK
        )

    @classmethod
    def _computes(cls, own: Any) -> bool:
        """Whether ``own`` computes that."""
        if set(own._modules) != {*cls.parts, "act_fn"} or not cls._gates(own.act_fn):
            return False
        from transformers.models.llama.modeling_llama import LlamaMLP  # takes seconds

        from tokentree.engines.foreign import same_forward

        return same_forward(own, LlamaMLP)

    @staticmethod
    def _gates(own: nn.Module) -> bool:
        """Whether ``own`` is the activation that gates."""
        from transformers.activations import SiLUActivation  # takes seconds

        return type(own) in (nn.SiLU, SiLUActivation)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.down_proj(self.gate_up(x))
        return out

    def state(self) -> dict[str, Any]:
        """What `of_state` makes one of."""
        return {"gate_up": self.gate_up.state(), "down_proj": self.down_proj.state()}

    @classmethod
    def of_state(cls, state: dict[str, Any], kind: Kind) -> Self:
        """One that is kept, whose linear layers are of this kind."""
        return restored(cls, {name: kind.of_state(state[name]) for name in ("gate_up", "down_proj")})


class GeluMLP(FusedMLP):
    """down(gelu(gate(x)) * up(x)), by tanh's approximation, with gate and up as one product."""

    gated: ClassVar[bool] = False

    @staticmethod
    def _gates(own: nn.Module) -> bool:
        from transformers.activations import GELUTanh  # takes seconds

        act = getattr(own, "act", None)
        return (
            type(own) is GELUTanh
            and isinstance(act, functools.partial)
            and (act.func, act.args, act.keywords) == (nn.functional.gelu, (), {"approximate": "tanh"})
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        both: torch.Tensor = self.gate_up(x)
        both = both.contiguous()
        gated = both.new_empty(*both.shape[:-1], both.shape[-1] // 2)
        _geglu(*(part.view(torch.int16).view(-1, part.shape[-1]).numpy() for part in (both, gated)))
        out: torch.Tensor = self.down_proj(gated)
        return out


class NumberedMLP(FusedMLP):
    """w2(silu(w1(x)) * w3(x)), as LFM2's."""

    parts: ClassVar[tuple[str, ...]] = ("w1", "w3", "w2")

    @classmethod
    def _computes(cls, own: Any) -> bool:
        if set(own._modules) != {*cls.parts}:
            return False
        from transformers.models.lfm2.modeling_lfm2 import Lfm2MLP  # takes seconds

        from tokentree.engines.foreign import same_forward

        return same_forward(own, Lfm2MLP)


class FusedAttention(nn.Module):
    """The weights of an attention with rotary positions as Llama, Mistral and Qwen2 have it, those of queries, keys and
    values as one. `program` computes it.

    Attributes:
        kinds: of transformers, all alike.
        parts: what its linear layers are called there.
    """

    name: ClassVar[str] = "attention"
    kinds: ClassVar[set[str]] = {"LlamaAttention", "MistralAttention", "Qwen2Attention"}
    parts: ClassVar[tuple[str, ...]] = ("q_proj", "k_proj", "v_proj", "o_proj")

    def __init__(self, own: Any, packing: Packing) -> None:
        super().__init__()
        *parts, self.o_proj = self.products(own)
        self.qkv = packing.pack(*parts)
        self.width: int = own.head_dim
        self.heads, self.kv_heads = (part.out_features // self.width for part in parts[:2])
        self.scale = float(own.scaling)
        config_window = getattr(own.config, "sliding_window", None)
        self.window: int | None = getattr(own, "sliding_window", config_window)

    @classmethod
    def fits(cls, own: Any, packing: Packing) -> bool:
        """Whether ``own`` is such a module, with sizes that suit ``packing``."""
        if type(own).__name__ not in cls.kinds or not type(own).__module__.startswith("transformers."):
            return False
        same = len({part.bias is None for part in cls.joined(own)}) == 1
        return packing.fits(*cls.products(own)) and same and own.head_dim % 2 == 0

    @classmethod
    def products(cls, own: Any) -> list[Any]:
        """The linear layers of ``own``."""
        return [getattr(own, name) for name in cls.parts]

    @classmethod
    def joined(cls, own: Any) -> list[Any]:
        """The linear layers of ``own`` that are packed when one is made."""
        return cls.products(own)[:3]

    @property
    def first(self) -> Packed:
        """The product that it begins with."""
        return self.qkv

    def sizes_of_products(self, hidden: int) -> dict[Packed, tuple[int, int]]:
        """Inputs and outputs that its products have in a model of that hidden size, if they fit one another."""
        wide, rows = self.heads * self.width, (self.heads + 2 * self.kv_heads) * self.width
        return {self.qkv: (hidden, rows), self.o_proj: (wide, hidden)}

    def state(self) -> dict[str, Any]:
        """What `of_state` makes one of."""
        sizes = {name: getattr(self, name) for name in SIZES}
        return {**sizes, "qkv": self.qkv.state(), "o_proj": self.o_proj.state()}

    @classmethod
    def of_state(cls, state: dict[str, Any], kind: Kind) -> Self:
        """One that is kept, whose linear layers are of this kind.

        Raises:
            ModelError: if its sizes are none, or don't belong together.
        """
        expect("attention", set(state) == {*SIZES, "qkv", "o_proj"})
        made = restored(cls, state | {name: kind.of_state(state[name]) for name in ("qkv", "o_proj")})
        expect("attention", *map(is_count, (made.heads, made.kv_heads, made.width)), is_number(made.scale))
        expect("attention", made.window is None or is_count(made.window))
        expect("attention", not made.heads % made.kv_heads, not made.width % 2)
        return made


class NormedAttention(FusedAttention):
    """One that norms each head of queries and keys before it turns them, as Qwen3's and Gemma 3's.

    Attributes:
        norm_names: those of queries and keys, in transformers.
    """

    kinds: ClassVar[set[str]] = {"Qwen3Attention", "Gemma3Attention"}
    norm_names: ClassVar[tuple[str, ...]] = ("q_norm", "k_norm")

    def __init__(self, own: Any, packing: Packing) -> None:
        super().__init__(own, packing)
        query, key = (fused_norm(getattr(own, name)) for name in self.norm_names)
        assert query is not None
        assert key is not None
        self.norms = HeadNorms(query, key, self.heads, self.kv_heads)

    @classmethod
    def fits(cls, own: Any, packing: Packing) -> bool:
        if not super().fits(own, packing):
            return False
        query, key = (fused_norm(getattr(own, name)) for name in cls.norm_names)
        return (
            query is not None
            and key is not None
            and (type(query), query.eps) == (type(key), key.eps)
            and len(query.weight) == len(key.weight) == own.head_dim
        )

    def state(self) -> dict[str, Any]:
        return super().state() | {"norms": self.norms.state()}

    @classmethod
    def of_state(cls, state: dict[str, Any], kind: Kind) -> Self:
        made = super().of_state({name: part for name, part in state.items() if name != "norms"}, kind)
        made.norms = HeadNorms.of_state(state["norms"], made.heads + made.kv_heads, made.width)
        return made


def _has_norm_s_parts(own: Any, epsilon: str) -> bool:
    """Whether ``own`` is called a norm, and has a weight in bfloat16 and that ``epsilon``, and nothing else."""
    weight = getattr(own, "weight", None)
    return (
        type(own).__name__.endswith("RMSNorm")
        and isinstance(weight, nn.Parameter)
        and weight.dtype is torch.bfloat16
        and weight.ndim == 1
        and isinstance(getattr(own, epsilon, None), float)
        and set(own._parameters) == {"weight"}
    )


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

        return _has_norm_s_parts(own, "variance_epsilon") and same_forward(own, LlamaRMSNorm)

    def state(self) -> dict[str, Any]:
        """What `of_state` makes one of: its weight, and epsilon."""
        return {"weight": self.weight, "eps": float(self.eps)}

    @classmethod
    def of_state(cls, state: dict[str, Any]) -> Self:
        """One that is kept.

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
        self._rows(bits, self.weight.numpy(), self.eps, results)
        return out

    @staticmethod
    def _rows(bits: Bits, weight: NDArray[np.float32], eps: np.float32, results: Bits) -> None:
        _norm(bits, weight, eps, results)


class GemmaNorm(FusedNorm):
    """RMS norm as Gemma has it: x * rsqrt(mean(x ** 2) + eps) * (1 + weight) in float32, rounded once.

    Attributes:
        weight: 1 + the model's.
    """

    def __init__(self, own: Any) -> None:
        nn.Module.__init__(self)
        self.register_buffer("weight", 1.0 + own.weight.detach().float())
        self.eps = np.float32(own.eps)

    @staticmethod
    def fits(own: Any) -> bool:
        from transformers.models.gemma3.modeling_gemma3 import Gemma3RMSNorm  # takes seconds

        from tokentree.engines.foreign import same_code, same_forward

        return (
            _has_norm_s_parts(own, "eps")
            and same_forward(own, Gemma3RMSNorm)
            and same_code(type(own)._norm, Gemma3RMSNorm._norm)
        )

    @staticmethod
    def _rows(bits: Bits, weight: NDArray[np.float32], eps: np.float32, results: Bits) -> None:
        _norm_once(bits, weight, eps, results)


class HeadNorms(nn.Module):
    """The norms of all heads of queries and keys.

    Args:
        query, key: norms, of the same kind and with the same epsilon.
        heads, kv_heads: how many there are.

    Attributes:
        weights: float32[heads + KV heads, width].
        once: whether they round once, as Gemma's.
    """

    weights: torch.Tensor

    def __init__(self, query: FusedNorm, key: FusedNorm, heads: int, kv_heads: int) -> None:
        super().__init__()
        self.register_buffer("weights", torch.stack([*[query.weight] * heads, *[key.weight] * kv_heads]))
        self.eps, self.once = query.eps, isinstance(query, GemmaNorm)

    def state(self) -> dict[str, Any]:
        """What `of_state` makes one of."""
        return {"weights": self.weights, "eps": float(self.eps), "once": self.once}

    @classmethod
    def of_state(cls, state: dict[str, Any], heads: int, width: int) -> HeadNorms:
        """One that is kept, for so many heads.

        Raises:
            ModelError: if it is none.
        """
        expect("norms of heads", is_tensor(state["weights"], torch.float32, heads, width), is_number(state["eps"]))
        expect("norms of heads", type(state["once"]) is bool, set(state) == {"weights", "eps", "once"})
        return restored(cls, state | {"eps": np.float32(state["eps"])})


def fused_norm(own: nn.Module) -> FusedNorm | None:
    """The norm that stands for ``own``, if there is one."""
    kind = next((kind for kind in (FusedNorm, GemmaNorm) if kind.fits(own)), None)
    return None if kind is None else kind(own)


@njit(cache=True)
def _norm(bits, weight, eps, results):
    for row in range(len(bits)):
        rows.normalize(bits[row], weight, eps, results[row])


@njit(cache=True)
def _norm_once(bits, weight, eps, results):
    for row in range(len(bits)):
        rows.normalize_once(bits[row], weight, eps, results[row])


@njit(cache=True)
def _geglu(bits, results):
    for row in range(len(bits)):
        rows.geglu(bits[row], results[row])
