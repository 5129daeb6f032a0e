"""The model in a GGUF file, as transformers has it: its weights unpacked, each of them read or the file refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import track
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.modeling_gguf_pytorch_utils import TENSOR_PROCESSORS, TensorProcessor, get_gguf_hf_weights_map

from tokentree.gguf.header import GgufError, Header, read_header
from tokentree.gguf.rope import ROPE_TENSORS
from tokentree.gguf.settings import settings_of

# how llama.cpp's converter changed the weights of architectures that transformers has no processor for
ALIKE = {"granite": "llama", "gemma": "gemma2"}


def gguf_model(file: Path, dtype: torch.dtype) -> PreTrainedModel:
    """The causal language model in ``file``.

    Raises:
        GgufError: if it can't be read, or says something that can't be honoured.
    """
    header = read_header(file)
    architecture = str(header.entries["general.architecture"])
    config = _config(header)
    with torch.device("meta"):
        blank = AutoModelForCausalLM.from_config(config, dtype=dtype)
    heads = {name: getattr(config, name, None) for name in ("num_attention_heads", "num_key_value_heads")}
    kind: Any = TENSOR_PROCESSORS.get(ALIKE.get(architecture, architecture), TensorProcessor)
    processor = kind(config=heads)
    names = get_gguf_hf_weights_map(blank, processor, architecture, config.num_hidden_layers)
    for name in header.tensors:
        if name not in ROPE_TENSORS and name not in names and name.removesuffix(".weight") not in names:
            raise GgufError(f"nothing in {type(blank).__name__} reads {name}")
    weights = _weights(header, processor, names, dtype)
    own, tied = blank.state_dict(), blank._tied_weights_keys or {}
    if missing := sorted(
        name for name in own if name not in weights and not (config.tie_word_embeddings and name in tied)
    ):
        raise GgufError(f"it has no weights {', '.join(missing[:3])}")
    for name, given in weights.items():
        needed = own[name]
        if [size for size in given.shape if size > 1] != [size for size in needed.shape if size > 1]:
            where = type(blank).__name__
            raise GgufError(f"its {name} is {_sizes(given)}, and {_sizes(needed)} is what {where} has there")
        weights[name] = given.reshape(needed.shape)
    model: PreTrainedModel = type(blank).from_pretrained(None, config=config, state_dict=weights, dtype=dtype)
    model.config._name_or_path = model.name_or_path = str(file)
    return model


def _config(header: Header) -> PreTrainedConfig:
    settings = settings_of(header)
    try:
        made: PreTrainedConfig = AutoConfig.for_model(**settings)
    except (ValueError, TypeError, KeyError) as error:
        reason = " ".join(str(error).split())
        raise GgufError(f"its sizes make no sense: {reason}") from None
    return made


def _weights(
    header: Header, processor: Any, names: dict[str, str], dtype: torch.dtype
) -> dict[str, torch.Tensor]:  # fmt: skip
    """All tensors by transformers' names."""
    done = {"tensors": dict[str, torch.Tensor]()}
    console = Console(stderr=True)
    for tensor in track(
        header.tensors.values(), "unpacking", console=console, transient=True, disable=not console.is_terminal
    ):
        made = processor.process(
            weights=header.values(tensor), name=tensor.name, tensor_key_mapping=names, parsed_parameters=done
        )
        if made.name in names:
            done["tensors"][names[made.name]] = torch.tensor(made.weights).to(dtype)
    return {name: weight.to(dtype) for name, weight in done["tensors"].items()}


def _sizes(tensor: torch.Tensor) -> str:
    return "x".join(map(str, tensor.shape))
