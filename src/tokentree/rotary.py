"""Rotary positions (Su et al. 2021, arXiv:2104.09864)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn


@dataclass(frozen=True, eq=False)
class Rotation:
    """How positions turn pairs of numbers.

    Args:
        frequencies: float32[width / 2], radians for a position.
        scale: of cosines and sines.
    """

    frequencies: torch.Tensor
    scale: float

    @classmethod
    def of(cls, rotary: nn.Module) -> Rotation:
        """Of a transformers model's module whose positions turn alike in texts of any length."""
        own: Any = rotary
        return cls(own.inv_freq.detach().float(), float(own.attention_scaling))


class Rotary(nn.Module):
    """Does as a transformers model's own module."""

    inv_freq: torch.Tensor

    def __init__(self, rotation: Rotation) -> None:
        super().__init__()
        self.register_buffer("inv_freq", rotation.frequencies, persistent=False)
        self.attention_scaling = rotation.scale

    def forward(self, x: torch.Tensor, positions: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Cosines and sines [texts, n, width] of ``positions`` int64[texts, n], in the type of ``x``."""
        turns = positions[..., None].float() * self.inv_freq.float()
        turns = torch.cat([turns, turns], -1)
        return (turns.cos() * self.attention_scaling).to(x.dtype), (turns.sin() * self.attention_scaling).to(x.dtype)


def rotary_of(rope: Mapping[str, Any], width: int, context: int) -> nn.Module:
    """A module that turns heads of ``width`` numbers, in texts of at most ``context`` positions.

    Args:
        rope: parameters as transformers' configurations have them in ``rope_parameters``.
    """
    if rope.get("rope_type", "default") == "default" and "rope_theta" in rope and len(rope) <= 2:
        places = torch.arange(0, width, 2, dtype=torch.float32, device="cpu")
        return Rotary(Rotation(1.0 / float(rope["rope_theta"]) ** (places / width), 1.0))
    from transformers import LlamaConfig  # takes a second
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    settings = LlamaConfig(head_dim=width, max_position_embeddings=context, rope_parameters=dict(rope))
    return LlamaRotaryEmbedding(settings)
