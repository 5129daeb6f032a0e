"""Tiny models with recurrent states and random weights."""

from __future__ import annotations

from typing import Any

import torch
from transformers import (
    CONFIG_MAPPING,
    AutoModelForCausalLM,
    PreTrainedModel,
    Qwen3_5Config,
    Qwen3_5ForConditionalGeneration,
)

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
_MAMBA2: dict[str, Any] = {
    "mamba_n_heads": 8, "mamba_d_head": 16, "mamba_n_groups": 2, "mamba_d_state": 24, "mamba_d_conv": 4,
    "mamba_expand": 2, "mamba_chunk_size": 16,
}  # fmt: skip
_MIXED: dict[str, Any] = {"layer_types": ["linear_attention", "full_attention", "linear_attention", "linear_attention"]}
_LATENT: dict[str, Any] = {
    "kv_lora_rank": 32, "qk_nope_head_dim": 16, "qk_rope_head_dim": 8, "v_head_dim": 16, "num_key_value_heads": 4,
    "head_dim": 8,
}  # fmt: skip
_VISION: dict[str, Any] = {
    "depth": 1, "hidden_size": 32, "intermediate_size": 32, "num_heads": 2, "out_hidden_size": 64, "patch_size": 8,
    "num_position_embeddings": 16,
}  # fmt: skip
_PLACES: dict[str, Any] = {
    "image_token_id": 3, "video_token_id": 4, "vision_start_token_id": 5, "vision_end_token_id": 6,
}  # fmt: skip
# Families by the names of their configurations, and what their tiny ones have beside `_SIZES`.
HYBRIDS: dict[str, dict[str, Any]] = {
    "bamba": {**_MAMBA2, "attn_layer_indices": [1]},
    "falcon_h1": {**_MAMBA2, "mamba_d_ssm": 128, "mamba_rms_norm": True, "ssm_in_multiplier": 0.7},
    "granitemoehybrid": {
        **_MAMBA2, **_MIXED, "num_local_experts": 4, "num_experts_per_tok": 2, "shared_intermediate_size": 48,
    },
    "falcon_mamba": {"state_size": 8, "time_step_rank": 6},
    "inkling_text": {
        "layer_types": ["hybrid_sliding", "hybrid", "hybrid_sliding", "hybrid"], "head_dim": 16, "swa_head_dim": 16,
        "swa_num_attention_heads": 4, "swa_num_key_value_heads": 2, "sliding_window_size": 7, "d_rel": 16,
        "rel_extent": 11, "log_scaling_n_floor": 9, "n_routed_experts": 4, "num_experts_per_tok": 2,
        "moe_intermediate_size": 48, "n_shared_experts": 1, "dense_mlp_idx": 1,
    },
    "jamba": {
        "attn_layer_period": 4, "attn_layer_offset": 1, "num_experts": 4, "expert_layer_period": 2,
        "expert_layer_offset": 1, "mamba_d_state": 8, "mamba_dt_rank": 6,
    },
    "kimi_linear": {
        **_LATENT, "linear_head_dim": 12, "linear_num_heads": 4, "num_experts": 4, "num_experts_per_token": 2,
        "moe_intermediate_size": 64, "model_max_length": CONTEXT, **_MIXED,
        "mlp_layer_types": ["dense", "sparse", "sparse", "sparse"],
    },
    "lfm2": {"layer_types": ["conv", "full_attention", "conv", "conv"]},
    "lfm2_moe": {
        "layer_types": ["conv", "full_attention", "conv", "conv"], "num_experts": 4, "num_experts_per_tok": 2,
        "moe_intermediate_size": 64, "num_dense_layers": 1,
    },
    "lfm3": {
        "layer_types": ["conv", "sliding_attention", "conv", "full_attention"], "conv_L_cache": 5, "head_dim": 16,
        "sliding_window": 7,
    },
    "mamba": {"state_size": 8, "time_step_rank": 6},
    "mamba2": {"state_size": 24, "num_heads": 8, "head_dim": 16, "n_groups": 2, "chunk_size": 16},
    "minimax": {
        "head_dim": 16, "block_size": 8, "num_local_experts": 4, "num_experts_per_tok": 2,
        "layer_types": ["linear_attention", "full_attention", "linear_attention", "linear_attention"],
    },
    "nemotron_h": {
        "layers_block_type": ["linear_attention", "moe", "full_attention", "mlp", "linear_attention"], "head_dim": 16,
        "ssm_state_size": 24, "mamba_num_heads": 8, "mamba_head_dim": 16, "n_groups": 2, "chunk_size": 16,
        "n_routed_experts": 4, "moe_intermediate_size": 48, "moe_shared_expert_intermediate_size": 48,
        "time_step_min": 1e-9,  # transformers heeds this limit where it reads a prompt, and not where it decodes
    },
    "olmo_hybrid": {**_DELTA, "linear_num_key_heads": 4, **_MIXED},
    "qwen3_5": _DELTA,
    "qwen3_5_text": _DELTA,
    "qwen3_next": {**_DELTA, **_EXPERTS},
    "recurrent_gemma": {
        "lru_width": 64, "sliding_window": 7, "num_hidden_layers": 6, "head_dim": 16, "conv1d_width": 4,
    },
    "rwkv": {"hidden_size": 80, "rescale_every": 2},
    "xlstm": {"num_heads": 4, "qk_dim_factor": 1.0},
    "zamba": {
        "layers_block_type": ["linear_attention", "linear_attention", "hybrid", "linear_attention", "hybrid"],
        "mamba_d_state": 8, "mamba_dt_rank": 6, "n_mamba_heads": 2, "num_key_value_heads": 4, "attention_head_dim": 32,
    },
    "zamba2": {
        "layers_block_type": ["linear_attention", "hybrid", "linear_attention", "hybrid"], "mamba_d_state": 24,
        "mamba_ngroups": 2, "n_mamba_heads": 8, "mamba_headdim": 16, "chunk_size": 16, "num_key_value_heads": 4,
        "attention_head_dim": 32, "num_mem_blocks": 1, "use_shared_attention_adapter": True, "adapter_rank": 8,
        "use_mem_rope": True, "time_step_min": 1e-9,
    },
}  # fmt: skip


def tiny_hybrid(family: str, dtype: torch.dtype = torch.float32, seed: int = 0, **options: Any) -> PreTrainedModel:
    """A model of one of `HYBRIDS`."""
    sizes = {**_SIZES, **HYBRIDS[family], **options}
    if "layers_block_type" in sizes:
        sizes["num_hidden_layers"] = len(sizes["layers_block_type"])
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        if family == "qwen3_5":
            config = Qwen3_5Config(text_config=sizes, vision_config=_VISION, **_PLACES)
            model = Qwen3_5ForConditionalGeneration(config)
        else:
            model = AutoModelForCausalLM.from_config(CONFIG_MAPPING[family](**sizes))
    made: PreTrainedModel = randomised(model, seed).to(dtype)  # type: ignore[arg-type]
    if family == "rwkv":
        made(input_ids=torch.tensor([[3]]))  # it divides its weights in its first forward
    return made
