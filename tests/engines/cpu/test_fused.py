"""Fused modules, against the modules that they stand for."""

from __future__ import annotations

import functools
from collections.abc import Callable

import pytest
import torch
from torch import nn
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaMLP, LlamaRMSNorm

from tests.tiny_models import parts_of, tiny
from tokentree.engines.cpu.fused import FusedAttention, FusedMLP, FusedNorm
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


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2"])
def test_models_that_have_them_get_them(family: str) -> None:
    model = tiny(family, torch.bfloat16, hidden_size=64, intermediate_size=96)
    engine = TorchEngine(model)
    assert {FusedAttention, FusedMLP, FusedNorm, PackedLinear} <= {type(m) for m in parts_of(engine)}
    attends_itself = TorchEngine(model, "sdpa")
    assert FusedAttention not in {type(m) for m in parts_of(attends_itself)}


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
