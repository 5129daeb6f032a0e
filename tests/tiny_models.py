"""Tiny models with random weights, and other small helpers that several tests share."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch import nn
from transformers import (
    CONFIG_MAPPING,
    AutoModelForCausalLM,
    CLIPVisionConfig,
    FalconConfig,
    FalconForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GPT2Config,
    GPT2LMHeadModel,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    LlavaConfig,
    LlavaForConditionalGeneration,
    MistralConfig,
    MistralForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    Phi3Config,
    Phi3ForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)
from transformers.pytorch_utils import Conv1D

from tokentree import LLM
from tokentree.engines.kv_engine import KVEngine
from tokentree.engines.model_engine import ModelEngine
from tokentree.engines.program import ProgramEngine
from tokentree.sampling import SamplingParams, seeded_noise
from tokentree.sequence import Sequence as Request
from tokentree.tree import TokenTree

VOCAB = 120
CONTEXT = 320
WINDOW = 7  # of the models that have a sliding window

_IDS: dict[str, Any] = {"vocab_size": VOCAB, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
_SIZE: dict[str, Any] = {
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": CONTEXT,
}
_GROUPED: dict[str, Any] = {**_IDS, **_SIZE, "num_key_value_heads": 2}
_SLIDING: dict[str, Any] = {"sliding_window": WINDOW, "layer_types": ["sliding_attention", "full_attention"]}


def _llama(**options: Any) -> PreTrainedModel:
    return LlamaForCausalLM(LlamaConfig(**{**_GROUPED, **options}))


def _qwen2(**options: Any) -> PreTrainedModel:
    return Qwen2ForCausalLM(Qwen2Config(**{**_GROUPED, **options}))


def _qwen3(**options: Any) -> PreTrainedModel:
    return Qwen3ForCausalLM(Qwen3Config(**{**_GROUPED, "head_dim": 16, **options}))


def _mistral(**options: Any) -> PreTrainedModel:
    return MistralForCausalLM(MistralConfig(**{**_GROUPED, "sliding_window": WINDOW, **options}))


def _gemma2(**options: Any) -> PreTrainedModel:
    caps = {"attn_logit_softcapping": 2.0, "final_logit_softcapping": 20.0}
    return Gemma2ForCausalLM(Gemma2Config(**{**_GROUPED, **_SLIDING, **caps, "head_dim": 16, **options}))


def _gemma3(**options: Any) -> PreTrainedModel:
    return Gemma3ForCausalLM(Gemma3TextConfig(**{**_GROUPED, **_SLIDING, "head_dim": 16, **options}))


def _phi3(**options: Any) -> PreTrainedModel:
    return Phi3ForCausalLM(Phi3Config(**{**_GROUPED, **options}))


def _gpt2(**options: Any) -> PreTrainedModel:
    sizes = {"n_embd": 48, "n_layer": 2, "n_head": 4, "n_positions": CONTEXT}
    return GPT2LMHeadModel(GPT2Config(**{**_IDS, **sizes, **options}))


def _opt(**options: Any) -> PreTrainedModel:
    sizes = {**_SIZE, "ffn_dim": 80, "word_embed_proj_dim": 48}
    return OPTForCausalLM(OPTConfig(**{**_IDS, **sizes, **options}))


def _gpt_neox(**options: Any) -> PreTrainedModel:
    return GPTNeoXForCausalLM(GPTNeoXConfig(**{**_IDS, **_SIZE, **options}))


def _falcon(**options: Any) -> PreTrainedModel:
    kind = {"new_decoder_architecture": True, "num_kv_heads": 2, "alibi": False}
    return FalconForCausalLM(FalconConfig(**{**_IDS, **_SIZE, **kind, **options}))


def _falcon_old(**options: Any) -> PreTrainedModel:
    return _falcon(new_decoder_architecture=False, multi_query=True, **options)


def _mixtral(**options: Any) -> PreTrainedModel:
    experts = {"num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": None}
    return MixtralForCausalLM(MixtralConfig(**{**_GROUPED, **experts, **options}))


FAMILIES: dict[str, Callable[..., PreTrainedModel]] = {
    "llama": _llama,
    "qwen2": _qwen2,
    "qwen3": _qwen3,
    "mistral": _mistral,
    "gemma2": _gemma2,
    "gemma3": _gemma3,
    "phi3": _phi3,
    "gpt2": _gpt2,
    "opt": _opt,
    "gpt_neox": _gpt_neox,
    "falcon": _falcon,
    "falcon_old": _falcon_old,
    "mixtral": _mixtral,
}


_LATENT: dict[str, Any] = {
    "num_attention_heads": 4, "num_key_value_heads": 4, "kv_lora_rank": 32, "q_lora_rank": 32, "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 8, "v_head_dim": 24, "head_dim": 8,
}  # fmt: skip
_EXPERTS: dict[str, Any] = {"num_local_experts": 4, "num_experts": 4, "num_experts_per_tok": 2}
_ROUTED: dict[str, Any] = {
    "n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 64, "n_group": 1, "topk_group": 1,
    "first_k_dense_replace": 1, "n_shared_experts": 1,
}  # fmt: skip
_INDEXED: dict[str, Any] = {"index_topk": 8, "index_head_dim": 16, "index_n_heads": 8}  # few heads make equal scores
_WINDOWED: dict[str, Any] = {
    "swa_num_attention_heads": 4, "swa_num_key_value_heads": 4, "swa_q_lora_rank": 32, "swa_kv_lora_rank": 32,
    "swa_head_dim": 24, "swa_qk_nope_head_dim": 16, "swa_v_head_dim": 24, "sliding_window": WINDOW,
}  # fmt: skip
_ENCODER: dict[str, Any] = {"is_decoder": True, "tie_word_embeddings": False}  # which is a decoder then
_SHARED: dict[str, Any] = {"indexer_types": ["full", "shared"], "mlp_layer_types": ["dense", "sparse"]}
_PAIR = ["sliding_attention", "full_attention"]
# Families by the names of their configurations, and what their tiny ones have beside `_GROUPED`.
OTHERS: dict[str, dict[str, Any]] = {
    "axk2": {**_LATENT, **_ROUTED, **_INDEXED},
    "bart": {
        "d_model": 64, "decoder_layers": 2, "decoder_attention_heads": 4, "decoder_ffn_dim": 96, "encoder_layers": 2,
        "forced_eos_token_id": None,
    },
    "bert": _ENCODER,
    "bloom": {"n_layer": 2, "n_head": 4, "tie_word_embeddings": False},
    "codegen": {"n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": CONTEXT, "n_inner": 96, "rotary_dim": 8},
    "dbrx": {
        "d_model": 64, "n_layers": 2, "n_heads": 4, "max_seq_len": CONTEXT,
        "attn_config": {"kv_n_heads": 2, "clip_qkv": 8.0, "rope_theta": 10000.0},
        "ffn_config": {"ffn_hidden_size": 96, "moe_num_experts": 4, "moe_top_k": 2},
    },
    "deepseek_v2": {**_LATENT, **_ROUTED},
    "deepseek_v3": {**_LATENT, **_ROUTED},
    "deepseek_v32": {**_LATENT, **_ROUTED, **_INDEXED},
    "diffllama": {},
    "dots3_note_text": {
        **_LATENT, **_ROUTED, **_INDEXED, **_WINDOWED, "layer_types": ["sliding_attention", "indexed_attention"],
    },
    "ernie4_5_moe": {"moe_num_experts": 4, "moe_k": 2, "moe_intermediate_size": 64, "moe_layer_start_index": 1},
    "falcon": {"new_decoder_architecture": False, "multi_query": True, "alibi": True},
    "gemma3n_text": {
        "num_hidden_layers": 4, "num_kv_shared_layers": 2, "layer_types": _PAIR * 2, "sliding_window": WINDOW,
        "head_dim": 16, "hidden_size_per_layer_input": 8, "vocab_size_per_layer_input": VOCAB, "intermediate_size": 96,
        "activation_sparsity_pattern": [0.5, 0.0, 0.0, 0.0], "laurel_rank": 8, "altup_num_inputs": 2,
        "tie_word_embeddings": False,
    },
    "gemma4_text": {
        "num_hidden_layers": 4, "num_kv_shared_layers": 2, "layer_types": _PAIR * 2, "sliding_window": WINDOW,
        "head_dim": 16, "global_head_dim": 32, "hidden_size_per_layer_input": 8, "vocab_size_per_layer_input": VOCAB,
        "use_double_wide_mlp": True, "tie_word_embeddings": False,
    },
    "glm4_moe_lite": {**_LATENT, **_ROUTED},
    "glm_moe_dsa": {**_LATENT, **_ROUTED, **_INDEXED, **_SHARED},
    "gpt_neo": {
        "num_layers": 2, "num_heads": 4, "intermediate_size": 96, "window_size": WINDOW,
        "attention_types": [[["global", "local"], 1]],
    },
    "gpt_neox_japanese": {"intermediate_multiple_size": 2},
    "gpt_oss": {**_EXPERTS, **_SLIDING, "head_dim": 16},
    "granitemoehybrid": {
        **_EXPERTS, "shared_intermediate_size": 48, "layer_types": ["full_attention"] * 2, "mamba_n_heads": 8,
        "position_embedding_type": "rope",
    },
    "gptj": {"n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": CONTEXT, "n_inner": 96, "rotary_dim": 8},
    "hy_v4": {**_LATENT, **_ROUTED, **_INDEXED, **_SHARED},
    "llama4_text": {
        "num_local_experts": 4, "num_experts_per_tok": 1, "head_dim": 16, "intermediate_size_mlp": 96,
        "layer_types": ["chunked_attention", "full_attention"], "no_rope_layers": [1, 0],
        "attention_chunk_size": 2 * WINDOW, "floor_scale": 3, "attn_scale": 0.5, "moe_layers": [1],
    },
    "longcat_flash": {
        **_LATENT, "num_layers": 2, "head_dim": 8, "ffn_hidden_size": 96, "expert_ffn_hidden_size": 64, "moe_topk": 2,
        "n_routed_experts": 4, "zero_expert_num": 2,
    },
    "megatron-bert": _ENCODER,
    "minicpm3": {**_LATENT},
    "mpt": {"d_model": 64, "n_layers": 2, "n_heads": 4, "max_seq_len": CONTEXT},
    "mvp": {
        "d_model": 64, "decoder_layers": 2, "decoder_attention_heads": 4, "decoder_ffn_dim": 96, "encoder_layers": 2,
        "forced_eos_token_id": None,
    },
    "nemotron": {"head_dim": 16},
    "openai-gpt": {"n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": CONTEXT},
    "phimoe": {**_EXPERTS, "sliding_window": WINDOW},
    "qwen2_moe": {**_EXPERTS, "moe_intermediate_size": 64, "shared_expert_intermediate_size": 64},
    "roberta": {**_ENCODER, "max_position_embeddings": CONTEXT + 1},  # of which one is of padding
    "roformer": {**_ENCODER, "embedding_size": 64, "rotary_value": True},
    "stablelm": {},
    "whisper": {
        "d_model": 64, "decoder_layers": 2, "decoder_attention_heads": 4, "decoder_ffn_dim": 96, "encoder_layers": 2,
        "max_target_positions": CONTEXT, "forced_decoder_ids": None,
    },
    "xglm": {"d_model": 64, "num_layers": 2, "attention_heads": 4, "ffn_dim": 96, "tie_word_embeddings": False},
    "youtu": {**_LATENT},
}  # fmt: skip
INDEXED = [name for name, options in OTHERS.items() if "index_topk" in options]


def tiny_other(family: str, dtype: torch.dtype = torch.float32, seed: int = 0, **options: Any) -> PreTrainedModel:
    """A model of one of `OTHERS` with random weights."""
    sizes = {**_GROUPED, "hidden_size": 64, "intermediate_size": 96, **OTHERS[family], **options}
    config = CONFIG_MAPPING[family](**sizes)
    with torch.random.fork_rng(devices=[]):
        model = AutoModelForCausalLM.from_config(config)
    made: PreTrainedModel = randomised(model, seed).to(dtype)  # type: ignore[arg-type]
    return made


def tiny_vision(dtype: torch.dtype = torch.float32, layers: int = 1) -> PreTrainedModel:
    """A language model of two layers behind a vision model of some: Llava's."""
    vision = CLIPVisionConfig(
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=layers,
        num_attention_heads=2,
        image_size=14,
        patch_size=7,
    )
    text = LlamaConfig(**{**_GROUPED, "hidden_size": 64, "intermediate_size": 96})
    with torch.random.fork_rng(devices=[]):
        model = LlavaForConditionalGeneration(LlavaConfig(vision_config=vision, text_config=text, image_token_index=3))
    made: PreTrainedModel = randomised(model).to(dtype)  # type: ignore[arg-type]
    return made


def tiny(family: str, dtype: torch.dtype = torch.float32, seed: int = 0, **options: Any) -> PreTrainedModel:
    """A model of ``family`` with random weights; ``options`` go to its configuration."""
    with torch.random.fork_rng(devices=[]):
        model = FAMILIES[family](**options)
    made: PreTrainedModel = randomised(model, seed).to(dtype)  # type: ignore[arg-type]
    return made


@torch.no_grad()
def randomised(model: PreTrainedModel, seed: int = 0) -> PreTrainedModel:
    """Weights so large that every part of the model shows in the logits: fresh ones leave attention almost flat."""
    generator = torch.Generator().manual_seed(seed)
    for module in model.modules():
        for weight in module.parameters(recurse=False):
            noise = torch.randn(weight.shape, generator=generator)
            if isinstance(module, nn.Embedding):
                weight.copy_(noise * 0.5)
            elif weight.ndim > 1:
                inputs = weight.shape[0] if isinstance(module, Conv1D) else weight.shape[-1]
                weight.copy_(noise * 1.5 * inputs**-0.5)
            else:  # norms and biases
                weight.add_(noise * 0.2)
    model.eval()
    return model


def tiny_pair(target_vocab: int = VOCAB, draft_vocab: int = VOCAB, **options: Any) -> tuple[PreTrainedModel, ...]:
    """A target and a smaller draft model that often agrees with it: the target without its last layer.

    ``options`` go to both configurations, those under ``draft`` to that of the draft model alone.
    """
    only_draft = options.pop("draft", {})
    target = tiny("llama", vocab_size=target_vocab, **options)
    draft = tiny("llama", vocab_size=draft_vocab, **{**options, "num_hidden_layers": 1, **only_draft})
    both = min(target_vocab, draft_vocab)
    with torch.no_grad():
        known = target.state_dict()
        for name in ("self_attn.o_proj", "mlp.down_proj"):
            known[f"model.layers.1.{name}.weight"].mul_(0.6)
        for name, weight in draft.state_dict().items():
            rows = both if weight.shape[:1] == (draft_vocab,) else len(weight)
            weight[:rows] = known[name][:rows]
        for model in (target, draft):  # padding is never the most probable
            model.state_dict()["lm_head.weight"][both:] = 0
    return target, draft


@torch.inference_mode()
def full_logits(model: PreTrainedModel, tokens: Sequence[int]) -> torch.Tensor:
    """float32[len(tokens), vocab]: what transformers says of the whole text at once, without a cache."""
    logits: torch.Tensor = model(input_ids=torch.tensor([list(tokens)]), use_cache=False).logits
    return logits[0].float()


def request(tokens: Sequence[int], max_tokens: int = 64, **options: Any) -> Request:
    """A sequence that holds ``tokens`` as its prompt. Its ``context`` is that of the models here, without another."""
    context = options.pop("context", CONTEXT)
    params = SamplingParams(max_tokens=max_tokens, **options)
    return Request([int(token) for token in tokens], params, seeded_noise(params.seed or 0, 0), context)


def some_tokens(count: int, seed: int = 0, vocab: int = VOCAB) -> list[int]:
    """Random token ids, none of them special."""
    return [int(token) for token in np.random.default_rng(seed).integers(3, vocab, count)]


def some_tree(root: int, nodes: int, seed: int = 0, vocab: int = VOCAB, depth: int = 6) -> TokenTree:
    """A random tree with branches of different lengths, whose nodes lie in no helpful order."""
    rng = np.random.default_rng(seed)
    tokens, parents, depths, known = [root], [-1], [0], set[tuple[int, int]]()
    while len(tokens) < nodes:
        shallow = [node for node, below in enumerate(depths) if below < depth]
        parent, token = int(rng.choice(shallow[-12:])), int(rng.integers(3, vocab))
        if (parent, token) not in known:
            known.add((parent, token))
            tokens.append(token)
            parents.append(parent)
            depths.append(depths[parent] + 1)
    return TokenTree(np.array(tokens), np.array(parents))


# -- text ------------------------------------------------------------------------------------------------------------

TEXTS = [
    "The quick brown fox jumps over the lazy dog.",
    "A tree of tokens grows level by level, and the target reads all of it at once.",
    "Grüße aus Köln: ein Baum, viele Äste. 東京の木。",
    "one two three four five six seven eight nine ten",
]
CHAT = (
    "{% for message in messages %}<|{{ message.role }}|>{{ message.content }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def tiny_tokenizer(texts: Sequence[str] = TEXTS, size: int = 300) -> PreTrainedTokenizerFast:
    """Byte-level BPE with an end token and a chat template."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<|end|>", "<|user|>", "<|assistant|>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=size, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|end|>")
    fast.add_special_tokens({"additional_special_tokens": special[1:]})
    fast.chat_template = CHAT
    return fast


def save_model(folder: Path, model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast | None = None) -> Path:
    """Writes what `tokentree.LLM` loads; returns the folder."""
    model.save_pretrained(folder)
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)
    return folder


def parts_of(engine: KVEngine) -> list[nn.Module]:
    """All modules that an engine computes with."""
    if isinstance(engine, ModelEngine):
        return list(engine._model.modules())
    assert isinstance(engine, ProgramEngine)
    return list(engine._program.stack.modules())


def kv_engine(llm: LLM) -> KVEngine:
    """The engine of a transformers model."""
    assert isinstance(llm.engine, KVEngine)
    return llm.engine


def sentence_pieces(texts: Sequence[str] = TEXTS, size: int = 400, with_bytes: bool = True) -> PreTrainedTokenizerFast:
    """BPE as SentencePiece writes it: spaces are signs, one is put before a text, and what has no token is spelled in
    bytes, or without these is unknown. It puts a special token before a text."""
    trained = Tokenizer(models.BPE())
    trained.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    trained.train_from_iterator(texts, trainers.BpeTrainer(vocab_size=size - 260, show_progress=False))
    said = json.loads(trained.to_str())["model"]
    names = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256) if with_bytes), *said["vocab"]]
    vocab = {name: place for place, name in enumerate(names)}
    merges = [(one[0], one[1]) for one in said["merges"]]
    tokenizer = Tokenizer(models.BPE(vocab, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=with_bytes))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    parts = [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    tokenizer.decoder = decoders.Sequence(parts)
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    tokenizer.add_special_tokens(["<unk>", "<s>", "</s>"])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>")
