"""Fused modules, against the modules that they stand for."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable

import pytest
import torch
from torch import nn
from transformers import Gemma3TextConfig, Lfm2Config, LlamaConfig
from transformers.models.gemma3.modeling_gemma3 import Gemma3MLP, Gemma3RMSNorm
from transformers.models.lfm2.modeling_lfm2 import Lfm2MLP
from transformers.models.llama.modeling_llama import LlamaMLP, LlamaRMSNorm

from tests.tiny_models import parts_of, tiny
from tokentree.engines.cpu.fused import (
    FusedAttention,
    FusedMLP,
    FusedNorm,
    GeluMLP,
    GemmaNorm,
    NormedAttention,
    NumberedMLP,
    _geglu,
)
from tokentree.engines.cpu.linear import PackedLinear
from tokentree.engines.cpu.packing import Packing
from tokentree.engines.cpu.quantized import QuantizedLinear
from tokentree.engines.torch import TorchEngine
from tokentree.kernels.bfloat16 import exponentials, narrow, widen

AS_IT_IS = Packing(PackedLinear)


@functools.cache
def rows(count: int, width: int) -> torch.Tensor:
    return (3 * torch.randn(1, count, width, generator=torch.Generator().manual_seed(0))).bfloat16()


def mlp(width: int, inner: int, bias: bool = False, act: str = "silu") -> nn.Module:
    config = LlamaConfig(hidden_size=width, intermediate_size=inner, mlp_bias=bias, hidden_act=act)
    torch.manual_seed(0)
    return LlamaMLP(config).bfloat16()


def gelu_mlp(width: int, inner: int, act: str = "gelu_pytorch_tanh") -> nn.Module:
    torch.manual_seed(0)
    return Gemma3MLP(Gemma3TextConfig(hidden_size=width, intermediate_size=inner, hidden_activation=act)).bfloat16()


def assert_steady(module: Callable[[torch.Tensor], torch.Tensor], x: torch.Tensor) -> None:
    """A row has the same bits beside any others."""
    together = module(x)
    for first, last in [(0, 1), (2, 5), (0, x.shape[1] - 1)]:
        assert torch.equal(module(x[:, first:last]), together[:, first:last])


def assert_within_rounding(got: torch.Tensor, expected: torch.Tensor, steps: float) -> None:
    """bfloat16 has 8 bits: so many of its steps at the size of the largest value of a row."""
    step = expected.float().abs().amax(-1, keepdim=True) * 2**-8
    assert ((got.float() - expected.float()).abs() <= steps * step).all()


@pytest.mark.parametrize("width", [8, 40, 576])
def test_a_norm_is_llama_s(width: int) -> None:
    own = LlamaRMSNorm(width, eps=1e-5).bfloat16()
    own.weight.data = rows(1, width)[0, 0] + 1
    assert FusedNorm.fits(own)
    fused, x = FusedNorm(own), rows(13, width)
    assert_within_rounding(fused(x), own(x), 1)
    assert (fused(x) == own(x)).float().mean() > 0.98
    assert_steady(fused, x)
    assert torch.equal(fused(x.transpose(0, 1)), fused(x).transpose(0, 1))


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(("width", "inner"), [(32, 32), (64, 160), (576, 1536)])
def test_an_mlp_is_llama_s(width: int, inner: int, bias: bool) -> None:
    own, x = mlp(width, inner, bias), rows(13, width)
    with torch.inference_mode():
        expected = own(x)
        assert FusedMLP.fits(own, AS_IT_IS)
        fused = FusedMLP(own, AS_IT_IS)
        assert_within_rounding(fused(x), expected, 2)
        fused.down_proj = PackedLinear(own.down_proj.weight, own.down_proj.bias)  # type: ignore[union-attr, arg-type]
        assert_steady(fused, x)


@pytest.mark.parametrize("width", [8, 40, 576])
def test_a_norm_is_gemma_s(width: int) -> None:
    own = Gemma3RMSNorm(width, eps=1e-6).bfloat16()
    own.weight.data = rows(1, width)[0, 0]
    assert GemmaNorm.fits(own)
    assert not FusedNorm.fits(own)
    fused, x = GemmaNorm(own), rows(13, width)
    assert_within_rounding(fused(x), own(x), 1)
    assert (fused(x) == own(x)).float().mean() > 0.995  # rounded once, so that hardly any differs
    assert_steady(fused, x)


@pytest.mark.parametrize(("width", "inner"), [(32, 32), (64, 160), (576, 1536)])
def test_an_mlp_is_gemma_s(width: int, inner: int) -> None:
    own, x = gelu_mlp(width, inner), rows(13, width)
    with torch.inference_mode():
        expected = own(x)
        assert GeluMLP.fits(own, AS_IT_IS)
        assert not FusedMLP.fits(own, AS_IT_IS)
        fused = GeluMLP(own, AS_IT_IS)
        assert_within_rounding(fused(x), expected, 2)
        fused.down_proj = PackedLinear(own.down_proj.weight, None)  # type: ignore[union-attr, arg-type]
        assert_steady(fused, x)


def test_an_mlp_is_lfm2_s() -> None:
    torch.manual_seed(0)
    config = Lfm2Config(hidden_size=64, intermediate_size=160, block_auto_adjust_ff_dim=False)
    own, x = Lfm2MLP(config).bfloat16(), rows(13, 64)
    with torch.inference_mode():
        expected = own(x)
        assert NumberedMLP.fits(own, AS_IT_IS)
        assert not FusedMLP.fits(own, AS_IT_IS)
        assert not NumberedMLP.fits(mlp(64, 160), AS_IT_IS)
        fused = NumberedMLP(own, AS_IT_IS)
        assert_within_rounding(fused(x), expected, 2)
        assert_steady(fused.gate_up, x)
    own.add_module("more", nn.Linear(2, 2))
    assert not NumberedMLP.fits(own, AS_IT_IS)


@pytest.mark.parametrize("width", [16, 1040])  # one strip, and more with a part of one at the end
def test_gates_are_those_of_the_mathematics(width: int) -> None:
    g = torch.linspace(-12, 12, width).bfloat16()
    u = rows(1, width)[0, 0]
    got = torch.empty(width, dtype=torch.bfloat16)
    bits = torch.cat([g, u])[None].view(torch.int16), got[None].view(torch.int16)
    _geglu(*(part.numpy() for part in bits))  # type: ignore[no-untyped-call]
    wide = g.double()
    exact = wide * (2 * math.sqrt(2 / math.pi) * (wide + 0.044715 * wide**3)).sigmoid()
    expected = exact.bfloat16().double() * u.double()
    assert torch.allclose(got.double(), expected, rtol=2**-7, atol=1e-30)
    assert (got == expected.bfloat16())[g > -8].float().mean() > 0.99


def test_an_mlp_in_8_bits_is_nearly_llama_s() -> None:
    own, x = mlp(576, 1536), rows(13, 576)
    with torch.inference_mode():
        expected = own(x)
        fused = FusedMLP(own, Packing(QuantizedLinear))
        error = (fused(x).float() - expected.float()).square().mean().sqrt() / expected.float().std()
        assert 1e-4 < float(error) < 0.02
        assert_steady(fused.gate_up, x)


def test_what_only_looks_like_such_a_module_is_left_alone() -> None:
    assert not FusedMLP.fits(mlp(64, 64, act="gelu"), AS_IT_IS)
    assert not FusedMLP.fits(mlp(64, 72), AS_IT_IS)
    other = mlp(64, 64)
    other.add_module("more", nn.Linear(2, 2))
    assert not FusedMLP.fits(other, AS_IT_IS)
    assert not FusedMLP.fits(mlp(64, 64).float(), AS_IT_IS)
    assert not FusedNorm.fits(LlamaRMSNorm(8))
    assert not FusedNorm.fits(nn.LayerNorm(8).bfloat16())
    assert not FusedAttention.fits(mlp(64, 64), AS_IT_IS)
    assert not NormedAttention.fits(tiny("llama", torch.bfloat16, hidden_size=64).model.layers[0].self_attn, AS_IT_IS)
    for act in ("silu", "gelu", "gelu_new", "gelu_python_tanh"):
        assert not GeluMLP.fits(gelu_mlp(64, 64, act), AS_IT_IS)
    assert not GemmaNorm.fits(Gemma3RMSNorm(8))
    other_norm = type("OtherRMSNorm", (Gemma3RMSNorm,), {"_norm": lambda self, x: x})
    assert not GemmaNorm.fits(other_norm(8).bfloat16())


@pytest.mark.parametrize("change", ["epsilon", "width", "kind"])
def test_norms_of_heads_that_differ_are_left_alone(change: str) -> None:
    own = tiny("qwen3", torch.bfloat16, hidden_size=64).model.layers[0].self_attn
    assert NormedAttention.fits(own, AS_IT_IS)
    if change == "epsilon":
        own.q_norm.variance_epsilon = 1e-3
    elif change == "width":
        own.k_norm = LlamaRMSNorm(8).bfloat16()
    else:
        own.k_norm = Gemma3RMSNorm(16).bfloat16()
    assert not NormedAttention.fits(own, AS_IT_IS)


@pytest.mark.parametrize("name", ["q_proj", "v_proj", "gate_proj"])
def test_a_linear_layer_with_an_adapter_is_not_fused_away(name: str) -> None:
    """As peft makes them: a subclass of Linear with a weight of its own kind, and more to its forward."""

    class Adapted(nn.Linear):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return super().forward(x) + 1

    model = tiny("llama", torch.bfloat16, hidden_size=64, intermediate_size=96)
    layer = model.model.layers[0]
    owner = layer.mlp if name == "gate_proj" else layer.self_attn
    getattr(owner, name).__class__ = Adapted
    engine = TorchEngine(model)
    assert sum(isinstance(module, Adapted) for module in parts_of(engine)) == 1


LLAMA_S = (FusedAttention, FusedMLP, FusedNorm)
PARTS = {
    "llama": LLAMA_S, "mistral": LLAMA_S, "qwen2": LLAMA_S, "qwen3": (NormedAttention, FusedMLP, FusedNorm),
    "gemma3": (NormedAttention, GeluMLP, GemmaNorm),
}  # fmt: skip


@pytest.mark.parametrize("family", PARTS)
def test_models_that_have_them_get_them(family: str) -> None:
    model, (attention, *others) = tiny(family, torch.bfloat16, hidden_size=64, intermediate_size=96), PARTS[family]
    engine = TorchEngine(model)
    assert {attention, *others, PackedLinear} <= {type(m) for m in parts_of(engine)}
    kinds = {type(m) for m in parts_of(TorchEngine(model, "sdpa"))}
    assert attention not in kinds
    assert {*others, PackedLinear} <= kinds


def test_exponentials_are_those_of_the_mathematics() -> None:
    x = torch.cat([torch.linspace(-90, 80, 5000), torch.tensor([-torch.inf, 0.0, -87.5, -1e30, 1e30])])
    got = x.clone()
    exponentials(got.numpy())
    exact = x.double().exp()
    inside = (x > -87) & (x < 88)
    assert ((got - exact).abs() / exact)[inside].max() < 1e-5
    assert got[x < -88].eq(0).all()
    assert 1e38 < float(got[-1]) < float("inf")
    assert float(got[-4]) == 1.0


def test_bfloat16_goes_to_float32_and_back() -> None:
    x = torch.randn(1000, generator=torch.Generator().manual_seed(0)) * 2.0 ** torch.arange(-50, 50).repeat(10)
    bits, wide = torch.empty(1000, dtype=torch.int16), torch.empty(1000)
    narrow(x.numpy(), bits.numpy())
    assert torch.equal(bits.view(torch.bfloat16), x.bfloat16())
    widen(bits.numpy(), wide.numpy())
    assert torch.equal(wide, x.bfloat16().float())
    ties = torch.tensor([1 + 2**-8, 1 + 3 * 2**-8, -1 - 2**-8])
    narrow(ties.numpy(), bits[:3].numpy())
    assert torch.equal(bits[:3].view(torch.bfloat16), ties.bfloat16())
