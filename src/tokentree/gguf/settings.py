"""What a GGUF file says of its model, as the settings of a transformers configuration.

Each entry is taken by what honours it. What nothing took is refused by name: an entry that is dropped gives other
logits without a word. `FAMILIES` says which architectures there are; docs/gguf.md is the same as a table.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from tokentree.gguf.entries import Entries, shown
from tokentree.gguf.header import GgufError, Header
from tokentree.gguf.rope import rope_of

RULES = 2  # of this module and those around it: what was converted by others is converted again
Settings = dict[str, Any]


@dataclass(frozen=True)
class Family:
    """How an architecture's entries become settings.

    Args:
        model_type: transformers' name of it.
        epsilon: the setting that gets the norms' epsilon.
        layer_norm: its norms are LayerNorm, not RMSNorm.
        head_dim: its heads may have another width than the hidden size allots them.
        turned: the parts of a head that rotary positions turn: "all", "some" or "none".
        scalings: how their frequencies may be scaled.
        names: settings that transformers calls otherwise here.
        more: takes what this architecture has beside the rest.
    """

    model_type: str
    epsilon: str = "rms_norm_eps"
    layer_norm: bool = False
    head_dim: bool = True
    turned: str = "all"
    scalings: tuple[str, ...] = ("linear", "yarn", "factors")
    names: dict[str, str] = field(default_factory=dict)
    more: Callable[[Entries, Settings], None] = lambda entries, settings: None


def settings_of(header: Header) -> Settings:
    """The settings of the configuration of the model in a file, ``model_type`` among them.

    Raises:
        GgufError: if the file is no model, its architecture isn't known here, or it says something that can't be
            honoured.
    """
    architecture = header.entries.get("general.architecture")
    entries = Entries(header, str(architecture))
    _refuse_other_kinds(entries)
    if architecture not in FAMILIES:
        entries.refuse(f"its architecture {shown(architecture)} isn't read here, only {', '.join(FAMILIES)}")
    _refuse_strangers(entries)
    family = FAMILIES[architecture]
    table = header.tensors.get("token_embd.weight")
    if table is None or len(table.shape) != 2:
        entries.refuse("it has no matrix token_embd.weight")
    settings: Settings = {
        "model_type": family.model_type,
        "vocab_size": entries.whole("vocab_size", table.shape[0]),
        "hidden_size": entries.whole("embedding_length"),
        "num_hidden_layers": entries.whole("block_count"),
        "num_attention_heads": entries.whole("attention.head_count"),
        "max_position_embeddings": entries.whole("context_length"),
        "tie_word_embeddings": "output.weight" not in header.tensors,
        **special_ids(header),
    }
    if settings["vocab_size"] != table.shape[0]:
        entries.refuse(f"{architecture}.vocab_size is {settings['vocab_size']}, but it has {table.shape[0]} embeddings")
    if settings["hidden_size"] != table.shape[1]:
        entries.refuse(f"{architecture}.embedding_length is {settings['hidden_size']}, but embeddings {table.shape[1]}")
    layers = {name.split(".")[1] for name in header.tensors if name.startswith("blk.")}
    if settings["num_hidden_layers"] != len(layers):
        entries.refuse(
            f"{architecture}.block_count is {settings['num_hidden_layers']}, but it has {len(layers)} blocks"
        )
    heads = settings["num_attention_heads"]
    settings["num_key_value_heads"] = entries.whole("attention.head_count_kv", heads)
    if heads % settings["num_key_value_heads"]:
        entries.refuse(f"{architecture}.attention.head_count_kv doesn't divide the {heads} heads")
    if architecture not in ("qwen2moe", "qwen3moe"):
        settings["intermediate_size"] = entries.whole("feed_forward_length")
    width = _head_width(entries, family, settings)
    epsilon = "attention.layer_norm_epsilon" if family.layer_norm else "attention.layer_norm_rms_epsilon"
    settings[family.epsilon] = entries.number(epsilon)
    if family.turned != "none":
        context = settings["max_position_embeddings"]
        settings["rope_parameters"] = rope_of(entries, width, context, family.turned, family.scalings)
    else:
        entries.take("rope.dimension_count")  # written by habit, where positions are learnt
    family.more(entries, settings)
    if math.isclose(entries.says("attention.scale") or 0, width**-0.5, rel_tol=1e-6):
        entries.take("attention.scale")
    entries.refuse_rest()
    return {family.names.get(name, name): value for name, value in settings.items()}


def special_ids(header: Header) -> Settings:
    """What a configuration says of special tokens: ``bos_token_id``, ``pad_token_id``, and all ends of a text as
    ``eos_token_id``, the file's own first; None where there is none."""
    ends = end_ids(header)
    return {
        "bos_token_id": _token_id(header, "bos"), "pad_token_id": _token_id(header, "padding"),
        "eos_token_id": (ends[0] if len(ends) == 1 else ends) or None,
    }  # fmt: skip


def _token_id(header: Header, part: str) -> int | None:
    key = f"tokenizer.ggml.{part}_token_id"
    token, count = header.entries.get(key, NO_TOKEN), header.tensors["token_embd.weight"].shape[0]
    if token in (NO_TOKEN, -1):
        return None
    if type(token) is not int or not 0 <= token < count:
        raise GgufError(f"{key} is {shown(token)}, and it has {count} tokens")
    return token


# the tokens that end a turn or a text in llama.cpp wherever a vocabulary has them as control tokens
ENDS = frozenset({
    "<|eot_id|>", "<|eom_id|>", "<|im_end|>", "<|end|>", "<|return|>", "<|call|>", "<end_of_turn>", "<|endoftext|>",
    "<|end_of_text|>", "<end_of_utterance>", "<EOT>", "_<EOT>", "[EOT]", "[EOS]", "<eos>",
    "<\uff5cend\u2581of\u2581sentence\uff5c>",
})  # fmt: skip
CONTROL = 3  # the type of such tokens
NO_TOKEN = (1 << 32) - 1


def end_ids(header: Header) -> list[int]:
    """The tokens that end a text: those that the file names as ends of a text, a turn or a message, or as what stands
    between files (which end a completion), and its control tokens that are called as one of `ENDS`."""
    ids = [_token_id(header, part) for part in ("eos", "eot", "eom", "fim_pad", "fim_rep", "fim_sep")]
    tokens, types = (header.entries.get(f"tokenizer.ggml.{part}", ()) for part in ("tokens", "token_type"))
    if not isinstance(tokens, list) or not isinstance(types, list):
        tokens = types = []
    found = [place for place, kind in enumerate(types[: len(tokens)]) if kind == CONTROL]
    named = {tokens[place]: place for place in found if tokens[place] in ENDS}
    if {"<|return|>", "<|call|>", "<|end|>"} <= set(named):  # a message of several ends so
        del named["<|end|>"]
    return list(dict.fromkeys(token for token in (*ids, *named.values()) if token is not None))


def _head_width(entries: Entries, family: Family, settings: Settings) -> int:
    share, over = divmod(settings["hidden_size"], settings["num_attention_heads"])
    width = entries.whole("attention.key_length", share)
    if entries.whole("attention.value_length", width) != width:
        entries.refuse("its keys and values have different widths")
    if (width != share or over) and not family.head_dim:
        entries.refuse(f"its heads are {width} wide, and {share} is all that a {entries.architecture} can have here")
    if family.head_dim:
        settings["head_dim"] = width
    return width


def _refuse_other_kinds(entries: Entries) -> None:
    """Raises `GgufError` if this is no model by itself, or its blocks are of another form."""
    said = entries.header.entries
    if (kind := said.get("general.type", "model")) != "model":
        entries.refuse(f"it is of type {shown(kind)}, not a model by itself")
    if part := next((key for key in said if key.startswith(("adapter.", "clip."))), None):
        entries.refuse(f"it says {part}, so it is a part of a model, not one by itself")
    if (version := said.get("general.quantization_version", 2)) != 2:
        entries.refuse(f"its general.quantization_version is {shown(version)}, and only 2 can be unpacked")


def _refuse_strangers(entries: Entries) -> None:
    """Raises `GgufError` if an entry is written as that of another architecture: what it says of numbers is lost."""
    import gguf

    groups = (gguf.Keys.LLM, gguf.Keys.Attention, gguf.Keys.Rope, gguf.Keys.SSM)
    known = {name for group in groups for name in vars(group).values() if str(name).startswith("{arch}.")}
    for key in entries.header.entries:
        begin, _, rest = key.partition(".")
        if "{arch}." + rest in known and begin != entries.architecture:
            entries.refuse(f"it says {key}, but its architecture is {entries.architecture}")


# -- what some architectures have beside the rest ---------------------------------------------------------------------


def _has(entries: Entries, *endings: str) -> bool:
    """Whether any tensor ends so."""
    return any(name.endswith(endings) for name in entries.header.tensors)


def _window(entries: Entries, settings: Settings) -> int | None:
    """The sliding window, None where the whole context fits into it."""
    window = entries.whole("attention.sliding_window", 0, least=0)
    return window if 0 < window < settings["max_position_embeddings"] else None


def _windows(entries: Entries, settings: Settings) -> None:
    settings["sliding_window"] = _window(entries, settings)


def _llama(entries: Entries, settings: Settings) -> None:
    settings["attention_bias"] = _has(entries, "attn_q.bias", "attn_output.bias")
    settings["mlp_bias"] = _has(entries, "ffn_gate.bias", "ffn_up.bias", "ffn_down.bias")
    if window := _window(entries, settings):  # the same layers under a window
        settings |= {"model_type": "mistral", "sliding_window": window}


def _qwen(entries: Entries, settings: Settings) -> None:
    if window := _window(entries, settings):
        layers = ["sliding_attention"] * settings["num_hidden_layers"]
        settings |= {"use_sliding_window": True, "sliding_window": window, "max_window_layers": 0}
        settings["layer_types"] = layers
    if entries.architecture.startswith("qwen3"):
        settings["attention_bias"] = _has(entries, "attn_q.bias", "attn_output.bias")


def _qwen_experts(entries: Entries, settings: Settings) -> None:
    _qwen(entries, settings)
    settings["num_experts"] = entries.whole("expert_count")
    settings["num_experts_per_tok"] = entries.whole("expert_used_count")
    if settings["num_experts_per_tok"] > settings["num_experts"]:
        entries.refuse(f"{entries.architecture}.expert_used_count is more than there are experts")
    settings["intermediate_size"] = entries.whole("feed_forward_length", 1)
    settings["norm_topk_prob"] = bool(entries.take("expert_weights_norm", entries.architecture == "qwen3moe"))
    gate = entries.header.tensors.get("blk.0.ffn_gate_exps.weight")
    settings["moe_intermediate_size"] = entries.whole("expert_feed_forward_length", gate.shape[-2] if gate else None)
    if entries.architecture == "qwen2moe":
        shared = entries.header.tensors.get("blk.0.ffn_gate_shexp.weight")
        wide = entries.whole("expert_shared_feed_forward_length", shared.shape[0] if shared else None)
        settings["shared_expert_intermediate_size"] = wide


def _gemma(entries: Entries, settings: Settings) -> None:
    """Of Gemma 2 and 3. The largest of both scale attention as if heads had the width that the hidden size allots."""
    layers, rope = settings["num_hidden_layers"], settings["rope_parameters"]
    largest = layers == {"gemma2": 46, "gemma3": 62}[entries.architecture]
    own = settings["hidden_size"] // settings["num_attention_heads"] if largest else settings["head_dim"]
    settings["query_pre_attn_scalar"] = entries.number("attention.scale", own**-0.5) ** -2
    if math.isclose(settings["query_pre_attn_scalar"], round(settings["query_pre_attn_scalar"]), rel_tol=1e-6):
        settings["query_pre_attn_scalar"] = round(settings["query_pre_attn_scalar"])
    settings["sliding_window"] = entries.whole("attention.sliding_window", 4096)
    pattern = entries.take("attention.sliding_window_pattern", {"gemma2": 2, "gemma3": 6}[entries.architecture])
    if isinstance(pattern, list):
        slides = [bool(one) for one in pattern][:layers]
    elif type(pattern) is int and pattern > 0:
        slides = [(layer + 1) % pattern > 0 for layer in range(layers)]
    else:
        entries.refuse(f"its attention.sliding_window_pattern is {shown(pattern)}")
    settings["layer_types"] = ["sliding_attention" if slide else "full_attention" for slide in slides]
    old = {"attn": 50.0, "final": 30.0} if entries.architecture == "gemma2" else {"attn": 0.0, "final": 0.0}
    for part, default in old.items():
        cap = entries.number(f"{part}_logit_softcapping", default, zero=True)
        settings[f"{part}_logit_softcapping"] = cap or None
    if entries.architecture == "gemma3":
        theta = entries.number("rope.freq_base_swa", 10000.0)
        if entries.whole("rope.dimension_count_swa", settings["head_dim"]) != settings["head_dim"]:
            entries.refuse("gemma3.rope.dimension_count_swa isn't the width of its heads")
        sliding = {"rope_type": "default", "rope_theta": theta}
        settings["rope_parameters"] = {"full_attention": rope, "sliding_attention": sliding}


def _granite(entries: Entries, settings: Settings) -> None:
    settings["attention_bias"] = _has(entries, "attn_q.bias", "attn_output.bias")
    settings["mlp_bias"] = _has(entries, "ffn_gate.bias", "ffn_up.bias", "ffn_down.bias")
    settings["attention_multiplier"] = entries.number("attention.scale", settings["head_dim"] ** -0.5)
    settings["embedding_multiplier"] = entries.number("embedding_scale", 1.0)
    settings["residual_multiplier"] = entries.number("residual_scale", 1.0)
    settings["logits_scaling"] = entries.number("logit_scale", 1.0)


def _falcon(entries: Entries, settings: Settings) -> None:
    if settings["num_key_value_heads"] != 1 or _has(entries, "attn_norm_2.weight"):
        entries.refuse("of Falcon's, only models with one head of keys and values can be read, as Falcon-7B has")
    settings |= {"multi_query": True, "parallel_attn": True, "new_decoder_architecture": False, "alibi": False}
    settings["bias"] = _has(entries, "attn_qkv.bias")


def _stablelm(entries: Entries, settings: Settings) -> None:
    settings["use_qkv_bias"] = _has(entries, "attn_q.bias", "attn_k.bias", "attn_v.bias")
    settings["use_parallel_residual"] = not _has(entries, "ffn_norm.weight")
    if (
        bool(entries.take("use_parallel_residual", settings["use_parallel_residual"]))
        != (settings["use_parallel_residual"])
    ):
        entries.refuse("stablelm.use_parallel_residual disagrees with its norms")


def _phi3(entries: Entries, settings: Settings) -> None:
    _windows(entries, settings)
    rope = settings["rope_parameters"]
    if rope["rope_type"] == "longrope":
        settings["original_max_position_embeddings"] = rope["original_max_position_embeddings"]


def _nemotron(entries: Entries, settings: Settings) -> None:
    settings["attention_bias"] = _has(entries, "attn_q.bias", "attn_output.bias")
    settings["mlp_bias"] = _has(entries, "ffn_up.bias", "ffn_down.bias")


def _starcoder2(entries: Entries, settings: Settings) -> None:
    _windows(entries, settings)
    settings["use_bias"] = _has(entries, "attn_q.bias")


_GPT2 = {
    "hidden_size": "n_embd", "num_hidden_layers": "n_layer", "num_attention_heads": "n_head",
    "max_position_embeddings": "n_positions", "intermediate_size": "n_inner",
}  # fmt: skip
FAMILIES: dict[str, Family] = {
    "llama": Family("llama", more=_llama),
    "qwen2": Family("qwen2", more=_qwen),
    "qwen2moe": Family("qwen2_moe", more=_qwen_experts),
    "qwen3": Family("qwen3", more=_qwen),
    "qwen3moe": Family("qwen3_moe", more=_qwen_experts),
    "gemma": Family("gemma"),
    "gemma2": Family("gemma2", more=_gemma),
    "gemma3": Family("gemma3_text", scalings=("linear",), more=_gemma),
    "granite": Family("granite", more=_granite),
    "phi3": Family("phi3", turned="some", scalings=("factors",), more=_phi3),
    "starcoder2": Family("starcoder2", "norm_epsilon", layer_norm=True, more=_starcoder2),
    "stablelm": Family("stablelm", "layer_norm_eps", layer_norm=True, head_dim=False, turned="some", more=_stablelm),
    "nemotron": Family("nemotron", "norm_eps", layer_norm=True, turned="some", more=_nemotron),
    "falcon": Family(
        "falcon", "layer_norm_epsilon", layer_norm=True, head_dim=False, more=_falcon,
        names={"num_key_value_heads": "num_kv_heads", "intermediate_size": "ffn_hidden_size"},
    ),
    "gpt2": Family("gpt2", "layer_norm_epsilon", layer_norm=True, head_dim=False, turned="none", names=_GPT2),
}  # fmt: skip
