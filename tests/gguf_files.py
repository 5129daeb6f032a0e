"""GGUF files of tiny models, as llama.cpp's converter writes them."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from transformers import PreTrainedModel, PreTrainedTokenizerFast

TURNED = ("llama", "granite")  # whose rotary pairs lie beside each other in a file
RAISED = ("gemma", "gemma2", "gemma3", "nemotron")  # whose norms are written with 1 added
SIZES = {
    "context_length": "max_position_embeddings", "embedding_length": "hidden_size", "block_count": "num_hidden_layers",
    "feed_forward_length": "intermediate_size", "attention.head_count": "num_attention_heads",
    "attention.head_count_kv": "num_key_value_heads", "vocab_size": "vocab_size",
}  # fmt: skip


def write_gguf(
    path: Path, model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast | None = None,
    kind_of: Callable[[str], str] = lambda _: "F32", architecture: str = "llama", entries: dict[str, Any] | None = None,
    tensors: dict[str, Any] | None = None,
) -> None:  # fmt: skip
    """``model`` in a file.

    Args:
        kind_of: the type of a matrix, of those that gguf can write, by its name; all else is float32.
        entries: more of them, or others; None leaves one out. Names that begin with a dot are the architecture's own.
        tensors: more of them, or others; None leaves one out.
    """
    writer = gguf.GGUFWriter(path, architecture)
    said = {f".{key}": value for key, value in sizes_of(model).items()}
    if tokenizer is not None:
        said |= tokenizer_of(tokenizer, int(model.config.eos_token_id))
    for key, value in (said | (entries or {})).items():
        _add(writer, architecture + key if key.startswith(".") else key, value)
    own = dict(weights_of(model, architecture, kind_of)) | {
        name: None if values is None else (np.asarray(values, np.float32), "F32")
        for name, values in (tensors or {}).items()
    }
    for name, weight in own.items():
        if weight is not None:
            values, kind = weight
            of = gguf.GGMLQuantizationType[kind]
            writer.add_tensor(name, gguf.quants.quantize(np.ascontiguousarray(values), of), raw_dtype=of)
    finish(writer)


def finish(writer: gguf.GGUFWriter) -> None:
    for write in (writer.write_header_to_file, writer.write_kv_data_to_file, writer.write_tensors_to_file):
        write()
    writer.close()


def sizes_of(model: PreTrainedModel) -> dict[str, Any]:
    """The entries that every converter writes."""
    config: Any = model.config
    said = {key: getattr(config, name, None) for key, name in SIZES.items()}
    if config.model_type == "falcon":
        said |= {"attention.head_count_kv": 1, "feed_forward_length": config.ffn_hidden_size}
    if config.model_type == "gpt2":
        said["feed_forward_length"] = 4 * config.hidden_size
    if getattr(config, "head_dim", None):
        said["attention.key_length"] = said["attention.value_length"] = config.head_dim
    norms = ("layer_norm_epsilon", "layer_norm_eps", "norm_epsilon", "norm_eps")
    if hasattr(config, "rms_norm_eps"):
        said["attention.layer_norm_rms_epsilon"] = float(config.rms_norm_eps)
    else:
        said["attention.layer_norm_epsilon"] = float(
            next(getattr(config, name) for name in norms if hasattr(config, name))
        )
    rope = getattr(config, "rope_parameters", None) or {}
    rope = rope.get("full_attention", rope)
    if rope:
        said["rope.freq_base"] = float(rope["rope_theta"])
    return {key: value for key, value in said.items() if value is not None}


def weights_of(
    model: PreTrainedModel, architecture: str, kind_of: Callable[[str], str] = lambda _: "F32"
) -> Iterator[tuple[str, tuple[np.ndarray, str]]]:
    """The tensors by their names in a file, with their types there."""
    config: Any = model.config
    arch = next(one for one, name in gguf.MODEL_ARCH_NAMES.items() if name == architecture)
    names = gguf.get_tensor_name_map(arch, config.num_hidden_layers)
    for name, weight in model.state_dict().items():
        values = weight.float().numpy()
        if name == "lm_head.weight" and config.tie_word_embeddings:
            continue
        if architecture in TURNED:
            for part, heads in (("q_proj", config.num_attention_heads), ("k_proj", config.num_key_value_heads)):
                if part in name:
                    values = values.reshape(heads, 2, -1, *values.shape[1:]).swapaxes(1, 2).reshape(values.shape)
        if architecture in RAISED and "norm" in name and name.endswith("weight"):
            values = values + 1
        if architecture == "gpt2" and values.ndim == 2 and any(part in name for part in (".attn.", ".mlp.")):
            values = values.T
        if "mlp.experts." in name:  # two matrices in one
            layer = name.split(".")[2]
            parts = np.split(values, 2, 1) if "gate_up" in name else [values]
            for part, own in zip(("gate", "up") if len(parts) > 1 else ("down",), parts):
                yield f"blk.{layer}.ffn_{part}_exps.weight", (own, "F32")
            continue
        if name.endswith("shared_expert_gate.weight"):
            values = values[0]
        known = names.get_name(name, try_suffixes=(".weight", ".bias"))
        assert known is not None, name
        yield known, (values, kind_of(name) if values.ndim == 2 else "F32")


def tokenizer_of(tokenizer: PreTrainedTokenizerFast, eos_id: int) -> dict[str, Any]:
    """The entries of a tokenizer."""
    tokens = tokenizer.convert_ids_to_tokens(list(range(len(tokenizer))))
    special = set(tokenizer.all_special_tokens)
    merges = json.loads(tokenizer.backend_tokenizer.to_str())["model"]["merges"]
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": [3 if token in special else 1 for token in tokens],
        "tokenizer.ggml.merges": [" ".join(pair) for pair in merges],
        "tokenizer.ggml.eos_token_id": eos_id,
    }


def _add(writer: gguf.GGUFWriter, key: str, value: Any) -> None:
    if isinstance(value, list):
        writer.add_array(key, value)
    elif isinstance(value, bool):
        writer.add_bool(key, value)
    elif isinstance(value, int):
        writer.add_uint32(key, value)
    elif isinstance(value, float):
        writer.add_float32(key, value)
    elif isinstance(value, str):
        writer.add_string(key, value)
