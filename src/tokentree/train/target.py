"""The model that heads are trained for, as its engine."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from tokentree.engines.transformers_engine import TransformersEngine
from tokentree.errors import PairingError
from tokentree.llm import LLM
from tokentree.loading import pick_device


def engine_of(llm: LLM) -> TransformersEngine:
    """The engine of a transformers model, whose hidden states can be read.

    Raises:
        PairingError: if it is another.
    """
    if not isinstance(llm.engine, TransformersEngine):
        raise PairingError(f"heads are trained for transformers models, and {llm.engine.info.name} is none")
    return llm.engine


def attention_for(device: str | torch.device | None) -> str | None:
    """How a model attends that is to write texts by the thousand: by itself, but for CPUs."""
    return None if pick_device(device).type == "cpu" else "sdpa"


def layer_sizes(config: Any, hidden_size: int) -> dict[str, int]:
    """The sizes of a head's layer that is as large as one of the target's, by its configuration."""
    heads = int(config.num_attention_heads)
    return {
        "hidden_size": hidden_size,
        "intermediate_size": int(getattr(config, "intermediate_size", None) or 4 * hidden_size),
        "num_heads": heads,
        "num_kv_heads": int(getattr(config, "num_key_value_heads", None) or heads),
        "head_dim": int(getattr(config, "head_dim", None) or config.hidden_size // heads),
    }


def plain_rope(config: Any) -> dict[str, Any]:
    """The target's rotary positions, if heads everywhere know them; else plain ones."""
    rope = getattr(config, "rope_parameters", None) or {}
    theta = float(rope.get("rope_theta") or 10000.0)
    return {"rope_type": "default", "rope_theta": theta}


def begin(head: nn.Module, seed: int) -> None:
    """Random weights for the linear layers of a fresh head."""
    generator = torch.Generator().manual_seed(seed)
    for layer in head.modules():
        if isinstance(layer, nn.Linear):
            nn.init.normal_(layer.weight, std=layer.in_features**-0.5, generator=generator)
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)
