"""What transformers' ``generate`` may be asked for, and what of it `hf.generator` honours."""

from __future__ import annotations

from typing import Any

import torch
from transformers import GenerationConfig, PreTrainedModel
from transformers.generation.utils import MULTIMODAL_INPUTS_TO_DROP_OUTSIDE_PREFILL

from tokentree.engines.support import KEPT
from tokentree.errors import ModelError, OptionError

# All that a generation config may ask for: what is honoured, what changes nothing here, and what can't be honoured.
HONOURED = {
    "max_length", "max_new_tokens", "min_length", "min_new_tokens", "max_time", "stop_strings", "do_sample",
    "temperature", "top_k", "top_p", "min_p", "top_h", "typical_p", "epsilon_cutoff", "eta_cutoff",
    "repetition_penalty", "no_repeat_ngram_size", "bad_words_ids", "renormalize_logits", "forced_bos_token_id",
    "forced_eos_token_id", "remove_invalid_values", "exponential_decay_length_penalty", "suppress_tokens",
    "begin_suppress_tokens", "sequence_bias", "watermarking_config", "num_return_sequences",
    "return_dict_in_generate", "pad_token_id", "bos_token_id", "eos_token_id",
    "guidance_scale", "encoder_repetition_penalty", "encoder_no_repeat_ngram_size",  # or refused: see `UNFIT`
}  # fmt: skip
UNUSED = {
    "use_cache", "cache_config", "max_cache_len", "prefill_chunk_size", "compile_config", "disable_compile",
    "low_memory", "continuous_batching_config", "transformers_version",  # how, not what
    "early_stopping", "length_penalty", "diversity_penalty",  # of beams
    "decoder_start_token_id",  # of an encoder's
    "num_assistant_tokens", "num_assistant_tokens_schedule", "assistant_confidence_threshold",
    "max_matching_ngram_size", "assistant_lookbehind", "target_lookbehind",  # of drafts
}  # fmt: skip
_BEAMS = "it keeps no beams here: use LLM(model).generate(prompt, SamplingParams(num_beams=...))"
_MOVED = "transformers itself no longer has it: it is in the Hub repository transformers-community/"
OWN_DRAFTS = 'drafts are asked of generator(): pass it draft_model= or drafter="ngram"'
_NO_SCORES = "it computes scores only where they decide something"
_NO_STATES = "attention weights and hidden states are not kept"
REFUSED = {
    "num_beams": _BEAMS,
    "num_beam_groups": f"{_MOVED}group-beam-search",
    **dict.fromkeys(("constraints", "force_words_ids"), f"{_MOVED}constrained-beam-search"),
    "penalty_alpha": "contrastive search picks tokens by the hidden states of several candidates, and not by the "
    f"logits that a tree is verified with; {_MOVED}contrastive-search",
    "dola_layers": f"it compares the logits of several layers, and a tree is verified with the last; {_MOVED}dola",
    **dict.fromkeys(("prompt_lookup_num_tokens", "assistant_early_exit", "use_mtp"), OWN_DRAFTS),
    **dict.fromkeys(("assistant_ensemble_weight", "speculation_type"), OWN_DRAFTS),
    "is_assistant": "a draft model is given to generator(), and stops by the tree's shape",
    **dict.fromkeys(("output_scores", "output_logits"), _NO_SCORES),
    **dict.fromkeys(("output_attentions", "output_hidden_states"), _NO_STATES),
    "token_healing": "it rewrites the prompt, whose mask and positions are those of before",
    "cache_implementation": "it keeps KV in storage of its own",
}
HARMLESS = {"num_beams": 1, "num_beam_groups": 1, "cache_implementation": "dynamic"}
OF_SAMPLING = {"penalty_alpha"}  # with do_sample, transformers doesn't look at these

# What `generate` hands over besides, and why it is not needed.
PREPARED = {
    *KEPT, "attention_mask", "position_ids", "use_cache", "logits_to_keep",
    "output_attentions", "output_hidden_states",  # the configuration has them too
}  # fmt: skip
KINDS_OF_TOKENS = {"mm_token_type_ids", "token_type_ids"}  # which of them are pictures


def check_config(config: GenerationConfig) -> None:
    """Raises `OptionError` if anything in ``config`` can't be honoured, or isn't known."""
    for name, why in REFUSED.items():
        value = getattr(config, name, None)
        ignored = (name in OF_SAMPLING and config.do_sample) or (
            name.startswith("output_") and not config.return_dict_in_generate
        )
        if value and value != HARMLESS.get(name) and not ignored:
            raise OptionError(f"tokentree can't honour {name}={value!r}: {why}")
    for name in vars(GenerationConfig()):
        value = getattr(config, name, None)
        known = name in HONOURED or name in UNUSED or name in REFUSED or name.startswith("_")
        if not known and value and value != config._get_default_generation_params().get(name):
            raise OptionError(f"tokentree doesn't know {name}={value!r}, which this version of transformers has")


def check_prepares(model: PreTrainedModel) -> None:
    """Raises `ModelError` if something stands between texts and ``model``, as peft's prompts and prefixes do."""
    prepares = vars(model).get("prepare_inputs_for_generation")
    usual = getattr(type(model), "prepare_inputs_for_generation", None)
    if prepares is not None and getattr(prepares, "__func__", prepares) is not usual:
        raise ModelError(
            f"what {type(model).__name__} is given is prepared by {getattr(prepares, '__qualname__', prepares)!r}, and "
            "tokentree gives it token ids alone: peft's prompts and prefixes, for instance, can't be honoured"
        )


def beside_tokens(model: PreTrainedModel, model_kwargs: dict[str, Any]) -> list[str]:
    """What ``model`` would be given beside tokens, their mask and their positions, by name. That is nothing, or
    something that its first forward alone reads, such as pictures.

    Raises:
        OptionError: if it is anything else.
    """
    for name in KEPT:
        if getattr(model_kwargs.get(name), "_is_user_defined", False):
            raise OptionError(f"tokentree can't honour {name}: it keeps KV in storage of its own")
    sees, found = "image" in model.input_modalities, list[str]()
    for name, value in model_kwargs.items():
        if name in PREPARED or value is None or value is False:
            continue
        if isinstance(value, dict | list | tuple) and not value:  # such as what pictures were encoded to, without any
            continue
        if sees and name in KINDS_OF_TOKENS and isinstance(value, torch.Tensor) and not value.any():
            continue
        found.append(name)
    if found and ("inputs_embeds" in found or not {*found} & {*MULTIMODAL_INPUTS_TO_DROP_OUTSIDE_PREFILL}):
        value = model_kwargs[found[0]]
        what = f"the {' and '.join(value)} in {found[0]}" if isinstance(value, dict) else found[0]
        raise OptionError(f"tokentree can't honour {what}: it decodes from token ids and an attention mask alone")
    return found
