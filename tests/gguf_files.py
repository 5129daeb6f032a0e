"""GGUF files of tiny models."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from transformers import PreTrainedModel, PreTrainedTokenizerFast


def write_gguf(
    path: Path, model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast | None = None,
    kind_of: Callable[[str], str] = lambda _: "F32",
) -> None:  # fmt: skip
    """``model``, a Llama, as llama.cpp would write it.

    Args:
        kind_of: the type of a matrix, of those that gguf can write, by its name; all else is float32.
    """
    config, writer = model.config, gguf.GGUFWriter(path, "llama")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_vocab_size(config.vocab_size)
    if tokenizer is not None:
        _add_tokenizer(writer, tokenizer, int(config.eos_token_id))
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.num_hidden_layers)
    for name, weight in model.state_dict().items():
        values = weight.numpy()
        for part, heads in (("q_proj", config.num_attention_heads), ("k_proj", config.num_key_value_heads)):
            if part in name:  # llama.cpp keeps the two halves of a rotary pair beside each other
                values = values.reshape(heads, 2, -1, values.shape[1]).swapaxes(1, 2).reshape(values.shape)
        known = names.get_name(name, try_suffixes=(".weight",))
        assert known is not None
        kind = gguf.GGMLQuantizationType[kind_of(name) if values.ndim == 2 else "F32"]
        packed = gguf.quants.quantize(np.ascontiguousarray(values), kind)
        writer.add_tensor(known, packed, raw_dtype=kind)
    for write in (writer.write_header_to_file, writer.write_kv_data_to_file, writer.write_tensors_to_file):
        write()
    writer.close()


def _add_tokenizer(writer: Any, tokenizer: PreTrainedTokenizerFast, eos_id: int) -> None:
    tokens = tokenizer.convert_ids_to_tokens(list(range(len(tokenizer))))
    special = set(tokenizer.all_special_tokens)
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(tokens)
    writer.add_token_types([3 if token in special else 1 for token in tokens])
    merges = json.loads(tokenizer.backend_tokenizer.to_str())["model"]["merges"]
    writer.add_token_merges([" ".join(pair) for pair in merges])
    writer.add_eos_token_id(eos_id)
