"""What a GGUF file says is what decodes: logits are those of the model that transformers makes of equal settings."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from transformers import (
    GemmaConfig,
    GemmaForCausalLM,
    GraniteConfig,
    GraniteForCausalLM,
    NemotronConfig,
    NemotronForCausalLM,
    PreTrainedModel,
    Qwen2MoeConfig,
    Qwen2MoeForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
    StableLmConfig,
    StableLmForCausalLM,
    Starcoder2Config,
    Starcoder2ForCausalLM,
)

from tests.engines.test_engine import verified
from tests.gguf_files import finish, write_gguf
from tests.tiny_models import _GROUPED, CONTEXT, WINDOW, full_logits, randomised, request, some_tokens, tiny
from tokentree import LLM, SamplingParams
from tokentree.engines.base import EngineOptions
from tokentree.errors import ModelError
from tokentree.gguf.settings import FAMILIES
from tokentree.loading import load_engine, load_model
from tokentree.tree import TokenTree

CPU = torch.device("cpu")
TOKENS = some_tokens(70)


def same_logits(path: Path, model: PreTrainedModel) -> None:
    """Of a text that is longer than a window, and of the second load, which is from the cache."""
    expected = full_logits(model, TOKENS)
    for _ in range(2):
        torch.testing.assert_close(
            full_logits(load_model(path, "float32", CPU), TOKENS), expected, rtol=2e-4, atol=2e-4
        )


def made(config: type, model: type, **options: Any) -> Callable[[], PreTrainedModel]:
    return lambda: randomised(model(config(**{**_GROUPED, **options})))


MOE = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
PLAIN: dict[str, tuple[str, Callable[[], PreTrainedModel], dict[str, Any]]] = {
    "llama": ("llama", lambda: tiny("llama"), {}),
    "llama with another head width": ("llama", lambda: tiny("llama", head_dim=16), {".rope.dimension_count": 16}),
    "llama tied": ("llama", lambda: tiny("llama", tie_word_embeddings=True), {}),
    "llama with biases": ("llama", lambda: tiny("llama", attention_bias=True, mlp_bias=True), {}),
    "a window": ("llama", lambda: tiny("mistral"), {".attention.sliding_window": WINDOW}),
    "another epsilon": ("llama", lambda: tiny("llama", rms_norm_eps=0.02), {}),
    "qwen2": ("qwen2", lambda: tiny("qwen2"), {}),
    "qwen2 with windows": (
        "qwen2", lambda: tiny("qwen2", use_sliding_window=True, sliding_window=WINDOW, max_window_layers=0),
        {".attention.sliding_window": WINDOW},
    ),
    "qwen3": ("qwen3", lambda: tiny("qwen3"), {}),
    "qwen2moe": (
        "qwen2moe", made(Qwen2MoeConfig, Qwen2MoeForCausalLM, shared_expert_intermediate_size=40, **MOE),
        {".expert_count": 4, ".expert_used_count": 2, ".expert_feed_forward_length": 32,
         ".expert_shared_feed_forward_length": 40},
    ),
    "qwen3moe": (
        "qwen3moe", made(Qwen3MoeConfig, Qwen3MoeForCausalLM, head_dim=16, norm_topk_prob=True, **MOE),
        {".expert_count": 4, ".expert_used_count": 2, ".expert_feed_forward_length": 32},
    ),
    "qwen3moe that doesn't norm": (
        "qwen3moe", made(Qwen3MoeConfig, Qwen3MoeForCausalLM, head_dim=16, norm_topk_prob=False, **MOE),
        {".expert_count": 4, ".expert_used_count": 2, ".expert_weights_norm": False},
    ),
    "gemma": ("gemma", made(GemmaConfig, GemmaForCausalLM, head_dim=16), {}),
    "gemma2": (
        "gemma2", lambda: tiny("gemma2", query_pre_attn_scalar=16),
        {".attention.sliding_window": WINDOW, ".attn_logit_softcapping": 2.0, ".final_logit_softcapping": 20.0},
    ),
    "gemma2 with a scale": (
        "gemma2", lambda: tiny("gemma2"),
        {".attention.sliding_window": WINDOW, ".attn_logit_softcapping": 2.0, ".final_logit_softcapping": 20.0,
         ".attention.scale": 1 / 16},
    ),
    "gemma3": (
        "gemma3", lambda: tiny("gemma3", query_pre_attn_scalar=16),
        {".attention.sliding_window": WINDOW, ".attention.sliding_window_pattern": 2, ".rope.freq_base_swa": 10000.0},
    ),
    "gemma3 by layers": (
        "gemma3", lambda: tiny("gemma3", query_pre_attn_scalar=16, final_logit_softcapping=4.0),
        {".attention.sliding_window": WINDOW, ".attention.sliding_window_pattern": [True, False],
         ".final_logit_softcapping": 4.0},
    ),
    "granite": (
        "granite", made(GraniteConfig, GraniteForCausalLM, attention_multiplier=0.2, embedding_multiplier=3.0,
                        residual_multiplier=0.5, logits_scaling=2.0),
        {".attention.scale": 0.2, ".embedding_scale": 3.0, ".residual_scale": 0.5, ".logit_scale": 2.0},
    ),
    "phi3": ("phi3", lambda: tiny("phi3", sliding_window=None), {}),
    "phi3 with a window": ("phi3", lambda: tiny("phi3", sliding_window=WINDOW), {".attention.sliding_window": WINDOW}),
    "phi3 that turns a part": (
        "phi3", lambda: tiny("phi3", rope_parameters={"rope_type": "default", "rope_theta": 1e4,
                                                      "partial_rotary_factor": 0.5}),
        {".rope.dimension_count": 6},
    ),
    "starcoder2": (
        "starcoder2", made(Starcoder2Config, Starcoder2ForCausalLM,
                           rope_parameters={"rope_type": "default", "rope_theta": 5e5}), {},
    ),
    "stablelm": (
        "stablelm", made(StableLmConfig, StableLmForCausalLM, rope_parameters={
            "rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5}), {".rope.dimension_count": 6},
    ),
    "nemotron": (
        "nemotron", made(NemotronConfig, NemotronForCausalLM, rope_parameters={
            "rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5}), {".rope.dimension_count": 6},
    ),
    "falcon": ("falcon", lambda: tiny("falcon_old"), {}),
    "gpt2": ("gpt2", lambda: tiny("gpt2"), {}),
}  # fmt: skip


@pytest.mark.parametrize("case", PLAIN)
def test_an_architecture_s_entries_are_honoured(case: str, tmp_path: Path) -> None:
    architecture, make, entries = PLAIN[case]
    model = make()
    write_gguf(tmp_path / "tiny.gguf", model, architecture=architecture, entries=entries)
    same_logits(tmp_path / "tiny.gguf", model)


# -- positions -------------------------------------------------------------------------------------------------------

HALF = 6  # pairs in a head of tiny models


def rope(**options: Any) -> dict[str, Any]:
    return {"rope_parameters": {"rope_theta": 1e4, **options}}


def llama3_factors(factor: float, low: float, high: float, context: int, pairs: int = HALF) -> np.ndarray:
    """As llama.cpp's converter computes ``rope_freqs.weight``."""
    waves = 2 * np.pi * 1e4 ** (np.arange(pairs) / pairs)
    smooth = (context / waves - low) / (high - low)
    middle = 1 / ((1 - smooth) / factor + smooth)
    return np.where(waves < context / high, 1, np.where(waves > context / low, factor, middle)).astype(np.float32)


LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
LIST = [1.0, 1.2, 1.5, 2.0, 3.0, 8.0]
LONG = {"rope_type": "longrope", "short_factor": LIST, "long_factor": [2 * one for one in LIST],
        "original_max_position_embeddings": 160, "attention_factor": 1.25}  # fmt: skip
ROPES: dict[str, tuple[str, dict[str, Any], dict[str, Any], dict[str, Any]]] = {
    "linear": ("llama", rope(rope_type="linear", factor=4.0),
               {".rope.scaling.type": "linear", ".rope.scaling.factor": 4.0}, {}),
    "linear by default": ("qwen2", rope(rope_type="linear", factor=4.0), {".rope.scaling.factor": 4.0}, {}),
    "linear as it was written once": ("llama", rope(rope_type="linear", factor=4.0), {".rope.scale_linear": 4.0}, {}),
    "none": ("llama", {}, {".rope.scaling.type": "none", ".rope.scaling.factor": 4.0}, {}),
    "another base": ("qwen2", {"rope_parameters": {"rope_type": "default", "rope_theta": 5e5}}, {}, {}),
    "no base": ("llama", rope(rope_type="default"), {".rope.freq_base": None}, {}),
    "yarn": ("qwen2", rope(rope_type="yarn", factor=4.0, original_max_position_embeddings=80),
             {".rope.scaling.type": "yarn", ".rope.scaling.factor": 4.0, ".rope.scaling.original_context_length": 80},
             {}),
    "yarn with all": (
        "qwen3", rope(rope_type="yarn", factor=4.0, original_max_position_embeddings=80, beta_fast=16.0, beta_slow=2.0,
                      attention_factor=0.5 * (0.1 * np.log(4.0) + 1)),
        {".rope.scaling.type": "yarn", ".rope.scaling.factor": 4.0, ".rope.scaling.original_context_length": 80,
         ".rope.scaling.attn_factor": 0.5, ".rope.scaling.yarn_beta_fast": 16.0, ".rope.scaling.yarn_beta_slow": 2.0,
         ".rope.scaling.finetuned": True}, {}),
    "llama 3.1's": ("llama", rope(original_max_position_embeddings=8192, **LLAMA3), {},
                    {"rope_freqs.weight": llama3_factors(8, 1, 4, 8192)}),
    "like llama 3.1's": (
        "llama", rope(original_max_position_embeddings=80, **LLAMA3), {".rope.scaling.original_context_length": 80},
        {"rope_freqs.weight": llama3_factors(8, 1, 4, 80)}),
    "like llama 3.1's, of another length": ("llama", rope(original_max_position_embeddings=100, **LLAMA3), {},
                                            {"rope_freqs.weight": llama3_factors(8, 1, 4, 100)}),
    "factors of no known making": (
        "llama", rope(rope_type="longrope", short_factor=LIST, long_factor=LIST, attention_factor=1.0,
                      original_max_position_embeddings=CONTEXT), {}, {"rope_freqs.weight": LIST}),
    "factors and a linear one": (
        "llama", rope(rope_type="longrope", short_factor=[2 * one for one in LIST],
                      long_factor=[2 * one for one in LIST], attention_factor=1.0,
                      original_max_position_embeddings=CONTEXT), {".rope.scaling.factor": 2.0},
        {"rope_freqs.weight": LIST}),
    "factors of one": ("llama", {}, {}, {"rope_freqs.weight": [1.0] * HALF}),
    "phi3's": (
        "phi3", {**rope(**LONG), "original_max_position_embeddings": 160, "sliding_window": None},
        {".rope.scaling.original_context_length": 160, ".rope.scaling.attn_factor": 1.25},
        {"rope_factors_short.weight": LONG["short_factor"], "rope_factors_long.weight": LONG["long_factor"]}),
}  # fmt: skip


@pytest.mark.parametrize("case", ROPES)
def test_how_positions_turn_is_honoured(case: str, tmp_path: Path) -> None:
    family, options, entries, tensors = ROPES[case]
    model = tiny(family, **options)
    write_gguf(tmp_path / "tiny.gguf", model, architecture=family, entries=entries, tensors=tensors)
    same_logits(tmp_path / "tiny.gguf", model)


def test_global_layers_of_gemma3_are_scaled_and_local_ones_are_not(tmp_path: Path) -> None:
    turns = {
        "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
        "sliding_attention": {"rope_type": "default", "rope_theta": 2e4},
    }
    model = tiny("gemma3", query_pre_attn_scalar=16, rope_parameters=turns)
    entries = {
        ".rope.scaling.type": "linear", ".rope.scaling.factor": 8.0, ".rope.freq_base_swa": 2e4,
        ".attention.sliding_window": WINDOW, ".attention.sliding_window_pattern": 2,
    }  # fmt: skip
    write_gguf(tmp_path / "tiny.gguf", model, architecture="gemma3", entries=entries)
    same_logits(tmp_path / "tiny.gguf", model)


@pytest.mark.parametrize("quantization", [None, "gguf", "int8"])
@pytest.mark.parametrize("made", ["as Llama 3.1's", "otherwise"])
def test_a_first_and_a_later_start_decode_as_the_original(
    quantization: str | None, made: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The later one maps packed weights, and never sees transformers' model."""
    monkeypatch.setenv("TOKENTREE_CACHE", str(tmp_path / "cache"))
    factors = [*LIST, 9.0, 10.0] if made == "otherwise" else [float(one) for one in llama3_factors(8, 1, 4, 8192, 8)]
    known = rope(original_max_position_embeddings=8192, **LLAMA3)
    given = rope(rope_type="longrope", short_factor=factors, long_factor=factors, attention_factor=1.0,
                 original_max_position_embeddings=CONTEXT)  # fmt: skip
    sizes: dict[str, Any] = {"hidden_size": 64, "intermediate_size": 96}
    model = tiny("llama", **sizes, **(given if made == "otherwise" else known))
    write_gguf(tmp_path / "tiny.gguf", model, tensors={"rope_freqs.weight": factors})
    engines = list[str]()
    texts = list[list[int]]()
    for _ in range(2):
        llm = LLM(tmp_path / "tiny.gguf", quantization=quantization, shape="2x2")
        engines.append(type(llm.engine).__name__)
        texts.append(llm.generate(TOKENS[:40], SamplingParams(max_tokens=30))[0].token_ids)
    assert engines == ["ProgramEngine", "ReadyEngine"]
    assert texts[0] == texts[1]
    if quantization != "gguf":
        model.save_pretrained(tmp_path / "folder")
        expected = LLM(tmp_path / "folder", quantization=quantization).plain()
        assert texts[0] == expected.generate(TOKENS[:40], SamplingParams(max_tokens=30))[0].token_ids


# -- what is refused -------------------------------------------------------------------------------------------------

REFUSED: dict[str, tuple[dict[str, Any], dict[str, Any], str]] = {
    "an entry that nothing honours": ({".attention.scale": 0.5}, {}, r"it says llama\.attention\.scale = 0\.5"),
    "a soft cap": ({".attn_logit_softcapping": 30.0}, {}, r"llama\.attn_logit_softcapping = 30"),
    "a scale of logits": ({".logit_scale": 0.5}, {}, r"llama\.logit_scale = 0\.5"),
    "experts": ({".expert_count": 8}, {}, r"llama\.expert_count = 8"),
    "no causal mask": ({".attention.causal": False}, {}, r"llama\.attention\.causal = False"),
    "an entry that nobody knows": ({".rope.freq_bsae": 1e6}, {}, r"llama\.rope\.freq_bsae"),
    "another architecture's entry": ({"lmama.rope.freq_base": 1e6}, {}, r"lmama\.rope\.freq_base, but .* is llama"),
    "a scaling of positions": ({".rope.scaling.type": "dynamic"}, {}, r"llama\.rope\.scaling\.type is 'dynamic'"),
    "yarn's log": (
        {".rope.scaling.type": "yarn", ".rope.scaling.factor": 2.0, ".rope.scaling.yarn_log_multiplier": 0.1}, {},
        r"llama\.rope\.scaling\.yarn_log_multiplier",
    ),
    "an attention factor alone": ({".rope.scaling.attn_factor": 2.0}, {}, r"llama\.rope\.scaling\.attn_factor"),
    "a part of the head": ({".rope.dimension_count": 6}, {}, r"llama\.rope\.dimension_count is 6"),
    "keys and values of different widths": ({".attention.value_length": 8}, {}, "keys and values have different"),
    "a list where there is a number": ({".attention.head_count_kv": [2, 2]}, {}, r"head_count_kv is \[2, 2\]"),
    "no number of layers": ({".block_count": None}, {}, r"doesn't say llama\.block_count"),
    "no epsilon": ({".attention.layer_norm_rms_epsilon": None}, {}, r"doesn't say llama\.attention\.layer_norm_rms"),
    "zero heads": ({".attention.head_count": 0}, {}, r"llama\.attention\.head_count is 0"),
    "too few heads": ({".attention.head_count": 3}, {}, r"attention\.head_count_kv doesn't divide the 3 heads"),
    "a negative base": ({".rope.freq_base": -5.0}, {}, r"llama\.rope\.freq_base is -5"),
    "no number": ({".rope.freq_base": float("nan")}, {}, r"llama\.rope\.freq_base is nan"),
    "another vocabulary": ({".vocab_size": 119}, {}, "vocab_size is 119, but it has 120 embeddings"),
    "a LoRA adapter": ({"general.type": "adapter"}, {}, "it is of type 'adapter', not a model"),
    "a part that sees pictures": ({"general.type": "mmproj"}, {}, "it is of type 'mmproj'"),
    "an adapter's entry": ({"adapter.type": "lora"}, {}, r"it says adapter\.type, so it is a part of a model"),
    "an entry of a vision part": ({"clip.has_vision_encoder": True}, {}, r"it says clip\.has_vision_encoder"),
    "old blocks": ({"general.quantization_version": 1}, {}, "general.quantization_version is 1, and only 2 can"),
    "parts that aren't counted": ({"split.count": "3"}, {}, "its split.count is '3'"),
    "one part of three": ({"split.count": 3, "split.no": 0}, {}, "it is one of 3 parts: join them first"),
    "a tensor that nothing reads": ({}, {"blk.0.attn_q_norm.weight": np.ones(12)}, "reads blk.0.attn_q_norm.weight"),
    "a layer too many": ({}, {"blk.2.attn_norm.weight": np.ones(48)}, "block_count is 2, but it has 3 blocks"),
    "a billion layers": ({".block_count": 1 << 30}, {}, "block_count is 1073741824, but it has 2 blocks"),
    "another width": ({".embedding_length": 49}, {}, "embedding_length is 49, but embeddings 48"),
    "a bias alone": ({}, {"blk.0.attn_q.bias": np.ones(48)}, "it has no weights .*bias"),
    "a missing tensor": ({}, {"blk.1.ffn_up.weight": None}, "it has no weights .*layers.1.mlp.up_proj"),
    "a matrix of another size": ({}, {"blk.1.ffn_up.weight": np.ones((79, 48))}, "is 79x48, and 80x48"),
    "no embeddings": ({}, {"token_embd.weight": None}, "no matrix token_embd.weight"),
    "factors of another width": ({}, {"rope_freqs.weight": [1.0] * 7}, "rope_freqs.weight isn't 6 factors"),
    "factors that make no sense": ({}, {"rope_freqs.weight": [0.0] * 6}, "rope_freqs.weight isn't 6 factors"),
    "half of long factors": ({}, {"rope_factors_long.weight": LIST}, "an odd choice"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_what_can_t_be_honoured_is_refused_by_name(case: str, tmp_path: Path) -> None:
    entries, tensors, says = REFUSED[case]
    path = tmp_path / "tiny.gguf"
    write_gguf(path, tiny("llama"), entries=entries, tensors=tensors)
    with pytest.raises(ModelError, match=f"can't load the model '.*tiny.gguf': .*{says}") as raised:
        load_model(path, "float32", CPU)
    assert "\n" not in str(raised.value)


INFORMATIVE: dict[str, Any] = {
    "general.name": "mistral", "general.quantized_by": "somebody", "general.tags": ["a"], "quantize.imatrix.file": "f",
    "somebody.quantize_version": 2, ".expert_count": 0, ".attention.causal": True, ".attention.scale": 12**-0.5,
    ".tensor_data_layout": "Meta AI original pth", ".rope.scaling.finetuned": False, "split.count": 0,
}  # fmt: skip


def test_what_changes_nothing_is_taken(tmp_path: Path) -> None:
    model = tiny("llama")
    write_gguf(tmp_path / "tiny.gguf", model, entries=INFORMATIVE)
    same_logits(tmp_path / "tiny.gguf", model)


@pytest.mark.parametrize("architecture", ["t5", "mamba", "bloom", "gemma4", "gpt-oss", "deci", "clip"])
def test_an_architecture_that_is_not_read_is_named(architecture: str, tmp_path: Path) -> None:
    path = tmp_path / "tiny.gguf"
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_tensor("token_embd.weight", np.zeros((8, 8), np.float32))
    finish(writer)
    with pytest.raises(ModelError, match=f"its architecture '{architecture}' isn't read here, only llama, qwen2, "):
        load_model(path, "float32", CPU)


@pytest.mark.parametrize(
    "case", ["llama", "qwen2", "qwen3", "gemma", "gemma3", "granite", "phi3", "starcoder2", "stablelm"]
)
def test_in_the_file_s_bits_it_is_the_same_model(case: str, tmp_path: Path) -> None:
    """Up to what 8 bits lose: a layer whose rows were in another order would give quite other logits."""
    architecture, make, entries = PLAIN[case]
    path = tmp_path / "tiny.gguf"
    model = make()
    write_gguf(path, model, architecture=architecture, entries=entries)
    engine: Any = load_engine(path, EngineOptions(device=CPU, quantization="gguf"))
    assert engine.quantization == "gguf"
    expected = full_logits(model, TOKENS[:20])[-1]
    seq = request(TOKENS[:20])
    got = verified(engine, seq, TokenTree(np.array(TOKENS[19:20]), np.array([-1])))[0]
    assert float(torch.corrcoef(torch.stack([got.float(), expected]))[0, 1]) > 0.99


def test_the_manual_s_table_has_all_architectures_and_no_other() -> None:
    page = (Path(__file__).parents[2] / "docs" / "gguf.md").read_text(encoding="utf-8")
    rows = page.split("## Entries of a model")[0].split("|---|---|---|")[1].strip().splitlines()
    named = [name for row in rows if row.startswith("|") for name in re.findall(r"`([a-z0-9]+)`", row.split("|")[1])]
    assert sorted(named) == sorted(FAMILIES)
