"""ALiBi: families whose scores grow with the position of a key, and that attend by code of their own.

Their biases come from transformers' functions, with the roundings that these have.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch

from tokentree.engines.cpu.attention import Attending, Biases, Rule, one, running


def bloom_biases(heads: int, dtype: torch.dtype) -> Biases:
    """BLOOM's."""
    from transformers.models.bloom.modeling_bloom import build_alibi_tensor  # takes seconds

    def make(positions: int) -> torch.Tensor:
        return build_alibi_tensor(torch.ones(1, positions, dtype=torch.int64), heads, dtype)[:, 0]

    return Biases(make)


def falcon_biases(heads: int, dtype: torch.dtype, width: int) -> Biases:
    """Falcon's, which are scaled as its scores are."""
    from transformers.models.falcon.modeling_falcon import build_alibi_tensor

    def make(positions: int) -> torch.Tensor:
        return build_alibi_tensor(torch.ones(1, positions, dtype=torch.int64), heads, dtype)[:, 0] / math.sqrt(width)

    return Biases(make)


def mpt_biases(heads: int) -> Biases:
    """MPT's, in float32 whatever the model's type is."""
    from transformers.models.mpt.modeling_mpt import build_mpt_alibi_tensor

    def make(positions: int) -> torch.Tensor:
        back: torch.Tensor = build_mpt_alibi_tensor(heads, positions)[:, 0]  # counted from the last one
        return -back.flip(-1)

    return Biases(make)


def bloom(module: Any) -> None:
    """Has BLOOM's attention attend through `attention.running`."""
    from transformers.models.bloom.modeling_bloom import dropout_add

    if module.pretraining_tp > 1 and module.slow_but_exact:  # its output layer is another product then
        return
    rule = Rule(module.inv_norm_factor, biases=bloom_biases(module.num_heads, module.dense.weight.dtype))

    def attend(attends: Attending, hidden_states: torch.Tensor, residual: torch.Tensor, *_: Any, **__: Any) -> Any:
        query, key, value = module._reshape(module.query_key_value(hidden_states))
        out = module.dense(one(attends, query, key, value, rule).transpose(1, 2).flatten(2))
        return dropout_add(out, residual, 0.0, False), None

    _replace(module, attend)


def mpt(module: Any) -> None:
    """Has MPT's attention attend through `attention.running`."""
    rule = Rule(module.softmax_scale, biases=mpt_biases(module.n_heads))

    def attend(attends: Attending, hidden_states: torch.Tensor, *_: Any, **__: Any) -> Any:
        mixed = module.Wqkv(hidden_states)
        if module.clip_qkv:
            mixed = mixed.clamp(min=-module.clip_qkv, max=module.clip_qkv)
        query, key, value = mixed.unflatten(2, (3, module.n_heads, -1)).permute(2, 0, 3, 1, 4)
        return module.out_proj(one(attends, query, key, value, rule).transpose(1, 2).flatten(2)), None

    _replace(module, attend)


def _replace(module: Any, attend: Callable[..., Any]) -> None:
    """Has ``attend`` stand for the forward of ``module`` where something attends for the model."""
    own = module.forward

    def forward(*args: Any, **kwargs: Any) -> Any:
        attends = running()
        return own(*args, **kwargs) if attends is None else attend(attends, *args, **kwargs)

    module.forward = forward
