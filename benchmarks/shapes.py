"""Models of released ones' shapes with random weights: for what a forward costs, weights' values don't matter."""

from __future__ import annotations

from typing import Any

import torch
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, PreTrainedModel

SEED = 0
SHAPES: dict[str, tuple[str, dict[str, Any]]] = {
    "qwen3-0.6b": ("qwen3", {
        "vocab_size": 151_936, "hidden_size": 1024, "intermediate_size": 3072, "num_hidden_layers": 28,
        "num_attention_heads": 16, "num_key_value_heads": 8, "head_dim": 128, "tie_word_embeddings": True,
    }),
    "qwen3.5-0.8b": ("qwen3_5_text", {
        "vocab_size": 248_320, "hidden_size": 1024, "intermediate_size": 3584, "num_hidden_layers": 24,
        "num_attention_heads": 8, "num_key_value_heads": 2, "head_dim": 256, "linear_num_key_heads": 16,
        "linear_num_value_heads": 16, "linear_key_head_dim": 128, "linear_value_head_dim": 128,
        "tie_word_embeddings": True,
    }),
    "lfm2-350m": ("lfm2", {
        "vocab_size": 65_536, "hidden_size": 1024, "intermediate_size": 6656, "num_hidden_layers": 16,
        "num_attention_heads": 16, "num_key_value_heads": 8, "full_attn_idxs": [2, 5, 8, 10, 12, 14],
        "tie_word_embeddings": True,
    }),
}  # fmt: skip


def random_model(name: str, **other: Any) -> PreTrainedModel:
    """A model of that shape in bfloat16, on a CPU.

    Args:
        name: one of `SHAPES`.
        other: settings in place of the shape's own.
    """
    family, settings = SHAPES[name]
    before = torch.get_default_dtype()
    torch.manual_seed(SEED)
    torch.set_default_dtype(torch.bfloat16)
    try:
        model: PreTrainedModel = AutoModelForCausalLM.from_config(CONFIG_MAPPING[family](**settings | other))
    finally:
        torch.set_default_dtype(before)
    return model.eval()
