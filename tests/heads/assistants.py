"""Tiny Gemma 4 models with an assistant, and what transformers' own assistant says."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    DynamicCache,
    Gemma4AssistantConfig,
    Gemma4AssistantForCausalLM,
    Gemma4TextConfig,
    PreTrainedModel,
)

from tests.tiny_models import CONTEXT, VOCAB, WINDOW, randomised, save_model, tiny_other

KINDS = ["sliding_attention", "full_attention"]


@dataclass(frozen=True, eq=False)
class Assisted:
    """A target in ``folder``, and an assistant of it in ``heads``."""

    folder: Path
    heads: Path
    target: PreTrainedModel
    assistant: PreTrainedModel

    @torch.inference_mode()
    def said(self, tokens: list[int], path: list[int]) -> torch.Tensor:
        """float32[vocab]: the log-probabilities after ``tokens`` and ``path``, all computed anew: the target has read
        ``tokens`` but the last."""
        cache = DynamicCache()
        read: Any = self.target(
            input_ids=torch.tensor([tokens[:-1]]), past_key_values=cache, output_hidden_states=True,
            return_shared_kv_states=True,
        )  # fmt: skip
        layers: Any = cache.layers
        last = {kind: (layers[number - 2].keys, layers[number - 2].values) for number, kind in enumerate(KINDS)}
        shared = dict(read.shared_kv_states) or last  # transformers 5.23 has none where the target's layers share none
        known, embed = read.hidden_states[-1][:, -1:], self.target.get_input_embeddings()
        for token in (tokens[-1], *path):
            given: Any = self.assistant(
                inputs_embeds=torch.cat([embed(torch.tensor([[token]])), known], -1),
                position_ids=torch.tensor([[len(tokens) - 1]]), shared_kv_states=shared,
            )  # fmt: skip
            known = given.last_hidden_state
        said: torch.Tensor = given.logits[0, -1].float().log_softmax(-1)
        return said


def save_assisted(place: Path, ordered: bool = False, shared: int = 2, **options: Any) -> Assisted:
    """Writes a tiny target, of whose four layers the last ``shared`` ones read others' keys and values, and an
    assistant, with clusters of tokens if it is ``ordered``."""
    double = {"use_double_wide_mlp": shared > 0}
    target = tiny_other("gemma4_text", num_kv_shared_layers=shared, **double)
    assistant = tiny_assistant(ordered, **options)
    save_model(place / "target", target)
    save_model(place / "assistant", assistant)
    return Assisted(place / "target", place / "assistant", target, assistant)


def tiny_assistant(ordered: bool = False, hidden_size: int = 64, **options: Any) -> PreTrainedModel:
    """An assistant of targets of this width, with random weights."""
    sizes = {
        "vocab_size": VOCAB, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 4,
        "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "global_head_dim": 32,
        "layer_types": [*KINDS[:1] * 3, *KINDS[1:]], "sliding_window": WINDOW, "hidden_size_per_layer_input": 0,
        "vocab_size_per_layer_input": 0, "max_position_embeddings": CONTEXT, **options,
    }  # fmt: skip
    config = Gemma4AssistantConfig(
        text_config=Gemma4TextConfig(**sizes), backbone_hidden_size=hidden_size, use_ordered_embeddings=ordered,
        num_centroids=12, centroid_intermediate_top_k=3,
    )  # fmt: skip
    count = config.text_config.num_hidden_layers
    with torch.random.fork_rng(devices=[]), pytest.MonkeyPatch.context() as patch:
        patch.setattr(Gemma4TextConfig, "kv_sharing_modes", ["reuse"] * count)  # transformers 5.23 raises
        made = randomised(Gemma4AssistantForCausalLM(config), seed=3)
    for number, layer in enumerate(made.model.layers):  # type: ignore[union-attr, arg-type]
        layer.layer_scalar.fill_(0.8 + 0.2 * number)  # type: ignore[union-attr, operator]
    if ordered:
        ordering: Any = made.masked_embedding
        ordering.token_ordering.copy_(torch.randperm(VOCAB, generator=torch.Generator().manual_seed(4)))
    return made
