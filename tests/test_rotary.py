"""Rotary positions are transformers' own, bit for bit."""

from typing import Any

import pytest
import torch
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaRMSNorm, LlamaRotaryEmbedding

from tokentree.heads.eagle import RMSNorm
from tokentree.rotary import Rotary, Rotation, rotary_of

POSITIONS = torch.tensor([[0, 1, 2, 77, 4095, 100_000]])
YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 1024}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rope", [
    {"rope_type": "default", "rope_theta": 100_000.0}, {"rope_theta": 1e6}, {"rope_theta": 10_000},
    {"rope_theta": 1e4, "partial_rotary_factor": 0.5}, YARN,
])  # fmt: skip
def test_they_are_transformers_own(rope: dict[str, Any], dtype: torch.dtype) -> None:
    config = LlamaConfig(head_dim=64, max_position_embeddings=4096, rope_parameters=dict(rope))
    theirs, ours = LlamaRotaryEmbedding(config), rotary_of(rope, 64, 4096)
    x = torch.zeros(1, dtype=dtype)
    for expected, got in zip(theirs(x, POSITIONS), ours(x, POSITIONS), strict=True):
        assert got.dtype is dtype
        assert torch.equal(got, expected)


def test_a_model_s_own_turn_as_they_do() -> None:
    theirs = LlamaRotaryEmbedding(LlamaConfig(head_dim=64, max_position_embeddings=4096, rope_parameters=dict(YARN)))
    ours, x = Rotary(Rotation.of(theirs)), torch.zeros(1)
    assert all(map(torch.equal, ours(x, POSITIONS), theirs(x, POSITIONS)))
    assert not ours.state_dict()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_norms_of_heads_are_llama_s(dtype: torch.dtype) -> None:
    theirs, ours = LlamaRMSNorm(48, 1e-5).to(dtype), RMSNorm(48, 1e-5).to(dtype)
    generator = torch.Generator().manual_seed(0)
    weight, x = torch.randn(48, generator=generator).to(dtype), torch.randn(5, 48, generator=generator).to(dtype)
    for norm in (theirs, ours):
        norm.weight.data = weight
    assert torch.equal(ours(x), theirs(x))
