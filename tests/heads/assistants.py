"""Tiny Gemma 4 models with an assistant, and what transformers' own assistant says."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, DynamicCache, PreTrainedModel

from tests.tiny_models import CONTEXT, VOCAB, WINDOW, randomised, save_model
from tokentree.engines.support import cache_names

KINDS = ["sliding_attention", "full_attention"]
SIZES: dict[str, Any] = {
    "vocab_size": VOCAB, "num_hidden_layers": 4, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16,
    "global_head_dim": 32, "sliding_window": WINDOW, "max_position_embeddings": CONTEXT,
}  # fmt: skip
PER_LAYER = {"hidden_size_per_layer_input": 8, "vocab_size_per_layer_input": VOCAB}
NONE = dict.fromkeys(PER_LAYER, 0)


@dataclass(frozen=True, eq=False)
class Assisted:
    """A target in ``folder``, and an assistant of it in ``heads``."""

    folder: Path
    heads: Path
    target: PreTrainedModel
    assistant: PreTrainedModel
    known: dict[Any, Any] = field(default_factory=dict, repr=False)

    def said(self, tokens: list[int], path: list[int]) -> torch.Tensor:
        """float32[vocab]: the log-probabilities after ``tokens`` and ``path``, when the target has read ``tokens`` but
        the last."""
        logits: torch.Tensor = self._given(tuple(tokens), tuple(path)).logits
        return logits[0, -1].float().log_softmax(-1)

    @torch.inference_mode()
    def _given(self, tokens: tuple[int, ...], path: tuple[int, ...]) -> Any:
        """What the assistant gives for the last one of all these, kept for what comes below."""
        if (tokens, path) not in self.known:
            shared, known = self._read(tokens[:-1])
            if path:
                known = self._given(tokens, path[:-1]).last_hidden_state
            embedded = self.target.get_input_embeddings()(torch.tensor([[*tokens[-1:], *path][-1:]]))
            self.known[tokens, path] = self.assistant(
                inputs_embeds=torch.cat([embedded, known], -1), position_ids=torch.tensor([[len(tokens) - 1]]),
                shared_kv_states=shared,
            )  # fmt: skip
        return self.known[tokens, path]

    def _read(self, tokens: tuple[int, ...]) -> Any:
        """Keys and values of ``tokens`` in the layers that are read, and the last hidden state."""
        if tokens not in self.known:
            cache = DynamicCache()
            read: Any = self.target(
                input_ids=torch.tensor([tokens]), **dict.fromkeys(cache_names(self.target), cache),
                output_hidden_states=True, return_shared_kv_states=True,
            )  # fmt: skip
            layers: Any = cache.layers[-2:]
            last = {kind: (layer.keys, layer.values) for kind, layer in zip(KINDS, layers, strict=True)}
            # transformers 5.23 shares none where the target's layers share none
            self.known[tokens] = dict(read.shared_kv_states) or last, read.hidden_states[-1][:, -1:]
        return self.known[tokens]


def save_assisted(place: Path, family: str = "gemma4", shared: int = 2, ordered: bool = False) -> Assisted:
    """Writes a tiny target, of whose four layers the last ``shared`` ones read others' keys and values, and an
    assistant, with clusters of tokens if it is ``ordered``."""
    target, assistant = tiny_target(family, shared), tiny_assistant(family, ordered)
    save_model(place / "target", target)
    save_model(place / "assistant", assistant)
    return Assisted(place / "target", place / "assistant", target, assistant)


def tiny_target(family: str = "gemma4", shared: int = 2, **options: Any) -> PreTrainedModel:
    """A target with random weights."""
    sizes = {"hidden_size": 64, "intermediate_size": 96, "layer_types": KINDS * 2, "num_kv_shared_layers": shared}
    return _made(
        CONFIG_MAPPING[f"{family}_text"](**{**SIZES, **(PER_LAYER if family == "gemma4" else {}), **sizes, **options})
    )


def tiny_assistant(
    family: str = "gemma4", ordered: bool = False, target_size: int = 64, **options: Any
) -> PreTrainedModel:
    """An assistant of targets of the width ``target_size``, with random weights."""
    sizes = {"hidden_size": 32, "intermediate_size": 64, "layer_types": KINDS[:1] * 3 + KINDS[1:]}
    text = CONFIG_MAPPING[f"{family}_text"](**{**SIZES, **(NONE if family == "gemma4" else {}), **sizes, **options})
    kind: Any = CONFIG_MAPPING[f"{family}_assistant"]
    config = kind(
        text_config=text, backbone_hidden_size=target_size, use_ordered_embeddings=ordered, num_centroids=12,
        centroid_intermediate_top_k=3,
    )  # fmt: skip
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(type(text), "kv_sharing_modes", ["reuse"] * 4, raising=False)  # transformers 5.23 has no answer
        made: Any = _made(config)
    for number, layer in enumerate(made.model.layers):
        layer.layer_scalar.fill_(0.8 + 0.2 * number)
    if ordered:
        made.masked_embedding.token_ordering.copy_(torch.randperm(VOCAB, generator=torch.Generator().manual_seed(4)))
    model: PreTrainedModel = made
    return model


def _made(config: Any) -> PreTrainedModel:
    with torch.random.fork_rng(devices=[]):
        return randomised(AutoModelForCausalLM.from_config(config))
