"""What a GGUF file says of its model, as the settings of a transformers configuration.

Each entry is taken by what honours it. What nothing took is refused by name: an entry that is dropped gives other logits
without a word. `FAMILIES` says which architectures there are; docs/gguf.md is the same as a table.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NoReturn

import numpy as np

from tokentree.gguf_header import GgufError, Header

RULES = 1  # of this module and `gguf_tokenizer`: what was converted by others is converted again
ROPE_TENSORS = ("rope_freqs.weight", "rope_factors_short.weight", "rope_factors_long.weight")
Settings = dict[str, Any]

# entries that change nothing, and those that change nothing where they have one of these values
INFORMATIVE = ("rope.scaling.finetuned", "tensor_data_layout", "quantized_by")
OFF = (0, 0.0, False)
NEUTRAL: dict[str, tuple[Any, ...]] = {
    "attention.causal": (True,), "attention.clamp_kqv": OFF, "attention.max_alibi_bias": OFF,
    "attention.sliding_window": OFF, "attention.temperature_scale": OFF, "attn_logit_softcapping": OFF,
    "embedding_scale": (0.0, 1.0), "expert_count": OFF, "expert_gating_func": (0, 1), "expert_group_count": OFF,
    "expert_shared_count": OFF, "expert_used_count": OFF, "expert_weights_scale": (0.0, 1.0),
    "final_logit_softcapping": OFF, "leading_dense_block_count": OFF, "logit_scale": (0.0, 1.0),
    "nextn_predict_layers": OFF, "pooling_type": OFF, "residual_scale": (0.0, 1.0), "use_parallel_residual": OFF,
}  # fmt: skip


@dataclass
class Entries:
    """The entries of a header, each to be taken once.

    Raises:
        GgufError: from all methods, if an entry is missing, of another type, or makes no sense.
    """

    header: Header
    architecture: str
    _left: Settings = field(init=False)

    def __post_init__(self) -> None:
        begin = f"{self.architecture}."
        own = self.header.entries.items()
        self._left = {key.removeprefix(begin): value for key, value in own if key.startswith(begin)}

    def refuse(self, why: str) -> NoReturn:
        raise GgufError(why)

    def take(self, key: str, default: Any = None) -> Any:
        return self._left.pop(key, default)

    def whole(self, key: str, default: int | None = None, least: int = 1) -> int:
        """A whole number of at least ``least``; without a default it has to be there."""
        value = self.take(key, default)
        if value is None:
            self.refuse(f"it doesn't say {self.architecture}.{key}")
        if type(value) is not int or not least <= value < 1 << 31:
            self.refuse(f"{self.architecture}.{key} is {_shown(value)}, which no {self.architecture} here has")
        return value

    def number(self, key: str, default: float | None = None, zero: bool = False) -> float:
        """A finite number above zero, or at least ``zero``, as the shortest decimal that is the file's float32."""
        value = self.take(key, default)
        if value is None:
            self.refuse(f"it doesn't say {self.architecture}.{key}")
        fits = type(value) in (int, float) and math.isfinite(value) and (value > 0 or (zero and value == 0))
        if not fits:
            self.refuse(f"{self.architecture}.{key} is {_shown(value)}, which no {self.architecture} here has")
        return float(str(np.float32(value)))

    def refuse_rest(self) -> None:
        """Raises `GgufError` for an entry that nothing took and that may change the text."""
        for key, value in self._left.items():
            if key not in INFORMATIVE and value not in NEUTRAL.get(key, ()):
                self.refuse(f"it says {self.architecture}.{key} = {_shown(value)}, which can't be honoured here")


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
    kind = header.entries.get("general.type", "model")
    entries = Entries(header, str(architecture))
    if kind != "model":
        entries.refuse(f"it is of type {_shown(kind)}, not a model by itself")
    if architecture not in FAMILIES:
        entries.refuse(f"its architecture {_shown(architecture)} isn't read here, only {', '.join(FAMILIES)}")
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
        settings["rope_parameters"] = _rope(entries, family, width, settings["max_position_embeddings"])
    else:
        entries.take("rope.dimension_count")  # written by habit, where positions are learnt
    family.more(entries, settings)
    if math.isclose(entries._left.get("attention.scale", 0), width**-0.5, rel_tol=1e-6):
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
        raise GgufError(f"{key} is {_shown(token)}, and it has {count} tokens")
    return token


# the tokens that end a turn or a text in llama.cpp wherever a vocabulary has them as control tokens
ENDS = frozenset({
    "<|eot_id|>", "<|eom_id|>", "<|im_end|>", "<|end|>", "<|return|>", "<|call|>", "<end_of_turn>", "<|endoftext|>",
    "<|end_of_text|>", "<end_of_utterance>", "<EOT>", "_<EOT>", "[EOT]", "[EOS]", "<eos>", "<｜end▁of▁sentence｜>",
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


def _rope(entries: Entries, family: Family, width: int, context: int) -> Settings:
    """How positions turn keys and queries."""
    rope: Settings = {"rope_type": "default", "rope_theta": entries.number("rope.freq_base", 10000.0)}
    turned = entries.whole("rope.dimension_count", width)
    if turned > width or turned % 2 or (turned < width and family.turned == "all"):
        entries.refuse(f"{entries.architecture}.rope.dimension_count is {turned}, where heads are {width} wide")
    if family.turned == "some":
        rope["partial_rotary_factor"] = turned / width
        if int(width * rope["partial_rotary_factor"]) != turned:
            rope["partial_rotary_factor"] = math.nextafter(turned / width, 1)
    old = entries.number("rope.scale_linear", 1.0, zero=True)
    factor = entries.number("rope.scaling.factor", old, zero=True) or 1.0
    kind = entries.take("rope.scaling.type", "linear")
    original = entries.whole("rope.scaling.original_context_length", context, least=0) or context
    attention = entries.number("rope.scaling.attn_factor", 1.0)
    factors = _factors(entries, turned)
    if kind == "yarn":
        scaling = "yarn"
        rope |= _yarn(entries, factor, original, attention)
    elif len(factors) == 2:
        scaling = "factors"
        rope |= explicit_factors(*factors, original, attention)
    elif kind in ("linear", "none"):
        factor = factor if kind == "linear" else 1.0
        scaling = "factors" if factors else "linear" if factor != 1 else ""
        if factors and any(one != 1 for one in factors[0]):
            known = llama3(factors[0], rope["rope_theta"], turned, original) if factor == 1 else None
            same = [one * factor for one in factors[0]]
            rope |= known or explicit_factors(same, same, context, 1.0)
        elif factor != 1:
            rope |= {"rope_type": "linear", "factor": factor}
    if kind not in ("yarn", "linear", "none") and len(factors) < 2:
        entries.refuse(f"{entries.architecture}.rope.scaling.type is {_shown(kind)}, which can't be honoured here")
    if scaling and scaling not in family.scalings:
        entries.refuse(f"it scales its positions ({scaling}), which transformers' {family.model_type} can't")
    if kind == "yarn" and factors:
        entries.refuse(f"it has {ROPE_TENSORS[0]} and yarn, which can't be honoured together")
    if attention != 1 and kind != "yarn" and len(factors) < 2:
        entries.refuse(f"{entries.architecture}.rope.scaling.attn_factor is {attention}, which can't be honoured here")
    return rope


def _yarn(entries: Entries, factor: float, original: int, attention: float) -> Settings:
    """YaRN (Peng et al. 2023, arXiv:2309.00071); llama.cpp's attention factor comes on top of the paper's."""
    for key, plain in (("yarn_ext_factor", (-1, 1)), ("yarn_attn_factor", (1,)), ("yarn_log_multiplier", (0,))):
        if (given := entries.take(f"rope.scaling.{key}", plain[0])) not in plain:
            entries.refuse(f"{entries.architecture}.rope.scaling.{key} is {given}, which can't be honoured here")
    rope: Settings = {"rope_type": "yarn", "factor": factor, "original_max_position_embeddings": original}
    for name, plain in (("beta_fast", 32.0), ("beta_slow", 1.0)):
        if (given := entries.number(f"rope.scaling.yarn_{name}", plain)) != plain:
            rope[name] = given
    if attention != 1:
        rope["attention_factor"] = attention * (0.1 * math.log(factor) + 1 if factor > 1 else 1.0)
    return rope


def _factors(entries: Entries, turned: int) -> list[list[float]]:
    """What the wavelengths of all pairs are multiplied by: none, one list, or one for short texts and one for long."""
    found = [entries.header.tensors[name] for name in ROPE_TENSORS if name in entries.header.tensors]
    lists = [[float(one) for one in entries.header.values(tensor).ravel()] for tensor in found]
    for tensor, factors in zip(found, lists):
        if len(factors) != turned // 2 or not all(math.isfinite(one) and one > 0 for one in factors):
            entries.refuse(f"its tensor {tensor.name} isn't {turned // 2} factors")
    if len(found) not in (0, 1 if ROPE_TENSORS[0] in entries.header.tensors else 2):
        entries.refuse(f"of {', '.join(ROPE_TENSORS)} it has an odd choice")
    return lists


def explicit_factors(short: list[float], long: list[float], original: int, attention: float) -> Settings:
    """LongRoPE's form (Ding et al. 2024, arXiv:2402.13753), which takes any factors."""
    return {
        "rope_type": "longrope", "short_factor": short, "long_factor": long, "attention_factor": attention,
        "original_max_position_embeddings": original,
    }  # fmt: skip


def llama3(factors: list[float], theta: float, turned: int, original: int) -> Settings | None:
    """The settings of Llama 3.1 that these factors were computed from, or None: no file has the settings themselves.
    By them, frequencies are the original's to the last bit."""
    waves = 2 * math.pi * theta ** (np.arange(0, turned, 2) / turned)
    factor = float(str(np.float32(max(factors))))
    for context in dict.fromkeys((8192, original)):
        smooth = np.clip((context / waves - 1) / 3, 0, 1)
        if np.allclose(1 / ((1 - smooth) / factor + smooth), factors, rtol=1e-5, atol=0):
            return {
                "rope_type": "llama3", "factor": factor, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
                "original_max_position_embeddings": context,
            }  # fmt: skip
    return None


def _refuse_strangers(entries: Entries) -> None:
    """Raises `GgufError` if an entry is written as that of another architecture: what it says of numbers is lost."""
    import gguf

    groups = (gguf.Keys.LLM, gguf.Keys.Attention, gguf.Keys.Rope, gguf.Keys.SSM)
    known = {name for group in groups for name in vars(group).values() if str(name).startswith("{arch}.")}
    for key in entries.header.entries:
        begin, _, rest = key.partition(".")
        if "{arch}." + rest in known and begin != entries.architecture:
            entries.refuse(f"it says {key}, but its architecture is {entries.architecture}")


def _shown(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


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
    settings["moe_intermediate_size"] = entries.whole("expert_feed_forward_length", gate and gate.shape[-2])
    if entries.architecture == "qwen2moe":
        shared = entries.header.tensors.get("blk.0.ffn_gate_shexp.weight")
        wide = entries.whole("expert_shared_feed_forward_length", shared and shared.shape[0])
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
        entries.refuse(f"its attention.sliding_window_pattern is {_shown(pattern)}")
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
