"""Attention of families that multiply queries and keys by code of their own: their projections stay, ours attends."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch

from tokentree.engines.cpu.attention import Rule, one, running, window_and_chunk
from tokentree.errors import ModelError


def bart(module: Any) -> None:
    """Has the attention of a Bart's relative attend through `attention.running`."""

    def attend(given: dict[str, Any]) -> Any:
        _check_own(module, given, "key_value_states", "attn_prompt")
        x = given["hidden_states"]
        parts = (module.q_proj(x) * module.scaling, module.k_proj(x), module.v_proj(x))
        return module.out_proj(_attended(module, parts, module.num_heads, 1.0, given)), None

    _replace(module, attend)


def bert(module: Any) -> None:
    """Likewise, of a BERT's relative; RoFormer's rotary positions come with the call."""

    def attend(given: dict[str, Any]) -> Any:
        _check_own(module, given, "encoder_hidden_states")
        x, heads = given["hidden_states"], module.num_attention_heads
        parts = tuple(_heads(project(x), heads) for project in (module.query, module.key, module.value))
        if (turns := given.get("sinusoidal_pos")) is not None:
            turned = module.apply_rotary_position_embeddings(turns, *(parts if module.rotary_value else parts[:2]))
            parts = (*turned, *parts[len(turned) :])
        scale = module.attention_head_size**-0.5
        return _attended(module, parts, None, scale, given), None

    _replace(module, attend)


def gpt(module: Any) -> None:
    """Likewise, of the first GPT."""
    own, scale = module._attn, module.split_size // module.n_head

    def attend(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *args: Any) -> Any:
        forward = running()
        if forward is None:
            return own(query, key, value, *args)
        return [one(forward, query, key.transpose(2, 3), value, Rule(scale**-0.5 if module.scale else 1.0))]

    module._attn = attend


def _heads(x: torch.Tensor, heads: int) -> torch.Tensor:
    """[1, heads, rows, width] of [1, rows, heads * width]."""
    parts: torch.Tensor = x.unflatten(-1, (heads, -1))
    return parts.transpose(1, 2)


def _attended(
    module: Any, parts: tuple[torch.Tensor, ...], heads: int | None, scale: float, given: dict[str, Any]
) -> torch.Tensor:  # fmt: skip
    """[1, rows, heads * width] of queries, keys and values, which are split into ``heads`` if there is a number."""
    query, key, value = parts if heads is None else (_heads(part, heads) for part in parts)
    window, chunk = window_and_chunk(module, given.get("attention_mask"))
    out = one(given["forward"], query, key, value, Rule(scale, window, chunk=chunk))
    rows: torch.Tensor = out.transpose(1, 2).flatten(2)
    return rows


def _check_own(module: Any, given: dict[str, Any], *names: str) -> None:
    """Raises `ModelError` if a module is to attend to something else than the rows of a text."""
    if other := [name for name in names if given.get(name) is not None]:
        raise ModelError(f"{type(module).__name__} is given {', '.join(other)}, which is unknown here")


def _replace(module: Any, attend: Callable[[dict[str, Any]], Any]) -> None:
    """Has ``attend``, which is told what the forward of ``module`` is given, by names, stand for it where something
    attends for the model."""
    own, signature = module.forward, inspect.signature(type(module).forward)

    def forward(*args: Any, **kwargs: Any) -> Any:
        runs = running()
        if runs is None:
            return own(*args, **kwargs)
        return attend({**signature.bind(module, *args, **kwargs).arguments, "forward": runs})

    module.forward = forward
