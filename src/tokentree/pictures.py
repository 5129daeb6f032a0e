"""Prompts with more in them than tokens: the model reads them by itself, and trees begin behind them."""

from __future__ import annotations

from collections.abc import Sequence as SequenceOf
from typing import Any

import torch
from transformers import Cache, DynamicCache, PreTrainedModel

from tokentree.engines.support import cache_names
from tokentree.errors import OptionError
from tokentree.hf_options import KINDS_OF_TOKENS
from tokentree.prompt_kv import PromptKV

OF_TOKENS = {"attention_mask", "position_ids", *KINDS_OF_TOKENS}  # what `generate` prepares for each of them


@torch.inference_mode()
def read_by_the_model(
    model: PreTrainedModel, input_ids: torch.Tensor, model_kwargs: dict[str, Any], paddings: SequenceOf[int]
) -> list[PromptKV]:
    """What ``model`` keeps of each row of a batch.

    Args:
        input_ids: int64[rows, n], padded on the left.
        model_kwargs: what transformers' ``generate`` has prepared for the model's first forward.
        paddings: how many tokens of each row are padding.

    Raises:
        OptionError: if the prompt ends within a picture, or the model keeps something else than keys and values.
    """
    length = input_ids.shape[1]
    inner = {getattr(model.config, f"{kind}_token_id", None) for kind in ("image", "video", "audio")}
    if inner & {*input_ids[:, -1].tolist()}:
        raise OptionError("a prompt that ends within a picture has no token from which a tree can grow")
    own: Any = model
    cache = DynamicCache(config=model.config.get_text_config(decoder=True))
    kept = dict.fromkeys(cache_names(model), cache)
    before = {name: _without_last(name, value) for name, value in model_kwargs.items()} | kept
    inputs = own.prepare_inputs_for_generation(input_ids[:, :-1], is_first_iteration=True, **before)
    own(**inputs, return_dict=True)
    layers_of = [_layers(cache, row, padding, length) for row, padding in enumerate(paddings)]
    behind = model_kwargs | kept
    inputs = own.prepare_inputs_for_generation(input_ids, next_sequence_length=1, is_first_iteration=False, **behind)
    logits = own(**inputs, return_dict=True).logits[:, -1]
    return [
        PromptKV(length - padding - 1, layers, _shift(model_kwargs.get("position_ids"), row, length - padding), said)
        for row, (padding, layers, said) in enumerate(zip(paddings, layers_of, logits, strict=True))
    ]


def _without_last(name: str, value: Any) -> Any:
    """What there is of each token, without the last one's."""
    return value[..., :-1] if name in OF_TOKENS and isinstance(value, torch.Tensor) else value


def _layers(cache: Cache, row: int, padding: int, length: int) -> tuple[tuple[torch.Tensor, torch.Tensor], ...]:
    from transformers.cache_utils import DummyLayer  # older versions, which are refused, have no such

    found = list[tuple[torch.Tensor, torch.Tensor]]()
    for layer in cache.layers:
        if isinstance(layer, DummyLayer):  # it reads another one's
            continue
        keys, values = getattr(layer, "keys", None), getattr(layer, "values", None)
        if not isinstance(keys, torch.Tensor) or not isinstance(values, torch.Tensor):
            raise OptionError("a model that keeps more than keys and values can't read a prompt with pictures here")
        first = max(0, padding - (length - 1 - keys.shape[2]))  # it may have the last rows alone
        found.append((keys[row, :, first:].clone(), values[row, :, first:].clone()))
    return tuple(found)


def _shift(position_ids: torch.Tensor | None, row: int, length: int) -> int:
    """How far the last token's position is from its place in the text. Several positions of a token are those of time,
    height and width, which are the same for text."""
    if position_ids is None:
        return 0
    last = position_ids[..., row, -1].reshape(-1)[-1]
    return int(last) - (length - 1)
