"""Which models can be decoded with a tree, and the reason where one can't."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from torch import nn

from tokentree.errors import ModelError, OptionError
from tokentree.heads.assistant import ASSISTANTS

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

QUANTIZATIONS = ("int8", "gguf")
NO_LIMIT = 1 << 24  # positions, of a model that knows none
ALIBI = {"bloom", "mpt"}
ALONE = {"openai-gpt"}  # families that keep no keys and values by themselves
CACHES = ("cache", "past_key_values")  # what forwards call their cache: transformers since 5.24, and before
KEPT = (*CACHES, "cache_params")  # what outputs, and calls of `generate`, have it or states as
LENGTHS = {"cache_length", "past_key_values_length"}  # what modules that count positions call its rows
INDEXED = "indexed_attention"  # the kind of layers whose rows see what an index chooses
CHUNKED = "chunked_attention"  # the kind of layers whose rows see the positions of their own chunk
SEEN = {"full_attention", "sliding_attention", CHUNKED}  # layers that keep keys and values alone
FULL = {"full_attention"}
FOR_ANOTHER = "drafts from another model's keys and values: give its folder as heads= (--heads)"
STATES = {"linear_attention", "conv", "hybrid", "hybrid_sliding", "mamba", "recurrent", "attention_and_mamba"}
# what modules call whose recurrences `engines/cpu/states` computes, and their classes where they call no function
CLASSES = {
    "MiniMaxLightningAttention", "RecurrentGemmaRecurrentBlock", "RecurrentGemmaRglru", "RwkvFeedForward",
    "RwkvSelfAttention", "xLSTMBackend",
}  # fmt: skip
RECURRENCES = {
    "causal_conv1d_fn", "chunk_kimi_delta_attention", "mamba2_chunk_scan", "mamba_selective_scan",
    "rwkv_linear_attention", "torch_chunk_gated_delta_rule",
}  # fmt: skip


def unsupported(model: PreTrainedModel) -> str | None:
    """Why ``model`` can't verify a tree; None if it may."""
    config, name = model.config, type(model).__name__
    if config.model_type in ASSISTANTS:
        return f"{name} {FOR_ANOTHER}"
    if getattr(config, "is_encoder_decoder", False):
        return f"{name} is not a decoder-only language model: an encoder's tokens see those behind them too"
    if output_layer(model) is None:
        return f"{name} is not a decoder-only language model with an output layer"
    if model.device.type == "meta" or (_has_blanks(model) and not _is_offloaded(model)):
        return f"{name} has weights without values, on the device 'meta': load them first"
    if getattr(config.get_text_config(), "use_bidirectional_attention", None) in (True, "all"):
        return f"{name} reads a text in both directions (use_bidirectional_attention): tokens see those behind them too"
    kinds = set(getattr(config.get_text_config(), "layer_types", None) or ())
    recurrent = is_recurrent(model)
    states, indexed = kinds & STATES, {INDEXED} if index_size(config) else set()
    unknown = kinds - SEEN - STATES - {"mlp", "moe"} - indexed
    if INDEXED in unknown:
        return f"{name} has layers of the kind {INDEXED} without index_topk: no index is known here but of positions"
    if unknown and (recurrent or not states):
        what = ", ".join(sorted(unknown))
        return f"{name} has layers of the kind {what}, which this library has neither masks nor KV for"
    if not recurrent and (states or (getattr(type(model), "_is_stateful", False) and kinds != FULL)):
        what = ", ".join(sorted(states)) or "a recurrent state"
        return f"{name} has {what}: a state that can't be rolled back to an accepted path of a tree"
    taken = taken_by(model)
    missing = {"position_ids", "attention_mask"} - taken.keys()
    if not cache_names(model) and config.model_type not in ALONE:
        missing.add("cache")
    if takes_positions(model) or any(counting(model)):
        missing -= {"position_ids"}
    others = has_alibi(config) or (recurrent and not takes_positions(model))  # these need no other positions
    if missing and not others:
        return f"{name} takes no {', '.join(sorted(missing))}, without which a tree can't be verified"
    return None


def _has_blanks(model: PreTrainedModel) -> bool:
    return any(weight.is_meta for weight in model.parameters())


def _is_offloaded(model: PreTrainedModel) -> bool:
    """Whether accelerate's hooks bring weights to where they are needed."""
    return any(hasattr(module, "_hf_hook") for module in model.modules())


def output_layer(model: PreTrainedModel) -> nn.Module | None:
    """The output layer of ``model``: its own, or that of a language model in it."""
    inner = getattr(model, "language_model", None)
    parts = (part for part in (model, inner) if part is not None and hasattr(part, "get_output_embeddings"))
    held = (part.get_output_embeddings() for part in parts)
    return next((layer for layer in held if layer is not None), None)


def is_recurrent(model: PreTrainedModel) -> bool:
    """Whether ``model`` has recurrent states beside its KV, or instead, that this library can roll back on CPUs."""
    kinds = {type(module) for module in model.modules()}
    return any(RECURRENCES & {*inspect.unwrap(kind.forward).__code__.co_names} for kind in kinds) or bool(
        CLASSES & {kind.__name__ for kind in kinds}
    )


def check_supported(model: PreTrainedModel) -> None:
    """Raises `ModelError`, with the reason, unless ``model`` can verify a tree."""
    if reason := unsupported(model):
        raise ModelError(reason)


def check_quantization(quantization: str | None, from_gguf: bool) -> None:
    """Raises `OptionError` if there is no such quantization, or none of a model whose weights, other than
    ``from_gguf``, don't come from a GGUF file."""
    if quantization is None:
        return
    if quantization not in QUANTIZATIONS:
        raise OptionError(f"unknown quantization {quantization!r}: there are {', '.join(map(repr, QUANTIZATIONS))}")
    if quantization == "gguf" and not from_gguf:
        raise OptionError("quantization='gguf' takes weights as a GGUF file has them: name a model by its .gguf file")


def context_length(config: PreTrainedConfig) -> int:
    """The most positions that the model can take.

    LongRoPE turns all rows of a forward otherwise as soon as one of them lies beyond the length it was first trained
    for, so that a tree that reaches there would disagree with plain decoding: the context ends there.
    """
    rope = getattr(config, "rope_parameters", None) or {}
    if rope.get("rope_type") == "longrope":
        return int(rope.get("original_max_position_embeddings") or config.original_max_position_embeddings)
    names = ("max_position_embeddings", "model_max_length", "max_seq_len", "max_target_positions")
    return int(next((value for name in names if (value := getattr(config, name, None))), NO_LIMIT))


def layer_windows(config: PreTrainedConfig) -> dict[str, int | None]:
    """The kinds of layer, each with its sliding window in positions, None where it has none."""
    window = getattr(config, "sliding_window", None)
    kinds = getattr(config, "layer_types", None)
    if kinds:
        return {kind: window if kind == "sliding_attention" else None for kind in dict.fromkeys(kinds)}
    return {"every_layer": window if getattr(config, "use_sliding_window", True) else None}


def layer_chunks(config: PreTrainedConfig) -> dict[str, int]:
    """The kinds of layer that attend in chunks, each with the positions of one."""
    size = getattr(config, "attention_chunk_size", None)
    return {CHUNKED: int(size)} if size and CHUNKED in (getattr(config, "layer_types", None) or ()) else {}


def decoder_layers(model: PreTrainedModel) -> nn.ModuleList:
    """The layers of ``model``, in order: those of its language model, where it sees or hears too.

    Raises:
        ModelError: if it has no list of as many modules as its configuration says.
    """
    count, decoder = model.config.get_text_config().num_hidden_layers, model.get_decoder()
    for whole in (decoder, model):
        for module in whole.modules() if isinstance(whole, nn.Module) else ():
            if isinstance(module, nn.ModuleList) and len(module) == count:
                return module
    raise ModelError(f"{type(model).__name__} has no list of its {count} layers")


def has_alibi(config: PreTrainedConfig) -> bool:
    """Whether attention has biases by positions, and no other ones."""
    return config.model_type in ALIBI or bool(getattr(config, "alibi", False))


def index_size(config: PreTrainedConfig) -> int:
    """How many positions an index chooses, 0 where there is none."""
    text = config.get_text_config()
    return int(getattr(text, "index_topk", 0) or 0) if INDEXED in (getattr(text, "layer_types", None) or ()) else 0


def ours_alone(model: PreTrainedModel) -> str:
    """What a model does, in words, that is right for a tree in our attention on CPUs alone; "" if there is nothing."""
    if has_alibi(model.config):
        return "adds biases by positions (ALiBi)"
    if index_size(model.config):
        return "sees what an index chooses"
    if any(counting(model)):
        return "counts positions by itself"
    return "keeps no keys and values by itself" if model.config.model_type in ALONE else ""


def takes_positions(model: Any) -> bool:
    """Whether the forward of ``model`` takes position_ids."""
    return "position_ids" in taken_by(model)


def cache_names(model: Any) -> tuple[str, ...]:
    """The one name by which the forward of ``model`` takes a cache, or none. A user's class may have another one than
    the model in it: what it takes by itself comes first."""
    return tuple(name for name in taken_by(model) if name in CACHES)[:1]


def taken_by(model: Any) -> dict[str, None]:
    """The names of what the forward of ``model`` takes, in order: by itself, or because it hands on what it doesn't
    know."""
    inner = getattr(model, "model", None)
    known = dict[str, None]()
    for part in (model, inner, getattr(inner, "language_model", None)):
        taken = {} if part is None else inspect.signature(type(part).forward).parameters
        known |= dict.fromkeys(taken)
        if all(one.kind is not one.VAR_KEYWORD for one in taken.values()):
            break
    return known


def counting(model: nn.Module) -> Iterator[nn.Module]:
    """The modules of ``model`` that count positions: because nobody tells the model of any, or from another number
    than 0."""
    told = takes_positions(model)
    for module in model.modules():
        taken = inspect.signature(type(module).forward).parameters.keys()
        if "position_ids" in taken and LENGTHS & taken and (not told or first_of(module)):
            yield module


def first_of(module: Any) -> int:
    """The position that ``module``, if it counts any, gives the first token."""
    counts = hasattr(type(module), "create_position_ids_from_input_ids")  # from behind that of padding
    return int(module.padding_idx) + 1 if counts else 0


def first_position(model: nn.Module) -> int:
    """The position that ``model`` gives the first token."""
    return max(map(first_of, counting(model)), default=0)


def has_softcap(config: PreTrainedConfig) -> bool:
    return getattr(config, "attn_logit_softcapping", None) is not None
