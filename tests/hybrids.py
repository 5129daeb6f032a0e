"""Tiny models with recurrent states and random weights."""

from __future__ import annotations

from typing import Any

import torch
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, PreTrainedModel

from tests.tiny_models import CONTEXT, VOCAB, randomised

_SIZES: dict[str, Any] = {
    "vocab_size": VOCAB, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "hidden_size": 64,
    "intermediate_size": 96, "num_hidden_layers": 4, "num_attention_heads": 4, "num_key_value_heads": 2,
    "max_position_embeddings": CONTEXT,
}  # fmt: skip
_DELTA: dict[str, Any] = {
    "head_dim": 16, "linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 12,
    "linear_value_head_dim": 20,
}  # fmt: skip
_EXPERTS: dict[str, Any] = {
    "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 64, "shared_expert_intermediate_size": 64,
}  # fmt: skip
# Families by the names of their configurations, and what their tiny ones have beside `_SIZES`.
HYBRIDS: dict[str, dict[str, Any]] = {
    "qwen3_5_text": _DELTA,
    "qwen3_next": {**_DELTA, **_EXPERTS},
}


def tiny_hybrid(family: str, dtype: torch.dtype = torch.float32, seed: int = 0, **options: Any) -> PreTrainedModel:
    """A model of one of `HYBRIDS`."""
    config = CONFIG_MAPPING[family](**{**_SIZES, **HYBRIDS[family], **options})
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(config)
    made: PreTrainedModel = randomised(model, seed).to(dtype)  # type: ignore[arg-type]
    return made
