"""Tiny models with a layer for multi-token prediction in their checkpoints, and what it says by the formats."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import PreTrainedModel

from tests.hybrids import tiny_hybrid
from tests.tiny_models import tiny_other

FILE = "model.safetensors"
# families, and which layer of a tiny model is such as a layer for multi-token prediction is: it sees all, with experts
# where the family has some
FAMILIES = {"qwen3_5_text": 3, "qwen3_5": 3, "qwen3_next": 3, "deepseek_v3": 1, "glm4_moe_lite": 1}
QWEN = {
    "layer": "mtp.layers.0.", "embedding": "mtp.pre_fc_norm_embedding.weight",
    "hidden": "mtp.pre_fc_norm_hidden.weight", "projection": "mtp.fc.weight", "norm": "mtp.norm.weight",
}  # fmt: skip
DEEPSEEK = {
    "layer": "model.layers.2.", "embedding": "model.layers.2.enorm.weight", "hidden": "model.layers.2.hnorm.weight",
    "projection": "model.layers.2.eh_proj.weight", "norm": "model.layers.2.shared_head.norm.weight",
}  # fmt: skip


@dataclass(frozen=True, eq=False)
class WithLayer:
    """A model in a folder, with such a layer.

    Args:
        target: the model.
        names: what the layer's parts are called.
        weights: its norms and its projection, by the keys of ``names``.
        layer, rotary: what another model of the family has in its place.
        gain: what is added to the weights of norms.
    """

    folder: Path
    target: PreTrainedModel
    names: dict[str, str]
    weights: dict[str, torch.Tensor]
    layer: nn.Module
    rotary: Any
    gain: float

    @torch.inference_mode()
    def said(self, tokens: list[int], path: list[int]) -> torch.Tensor:
        """float32[vocab]: the log-probabilities after ``tokens`` and ``path``, all computed anew: the target has read
        ``tokens`` but the last; the layer's own states stand for what comes behind."""
        known = self.target.base_model(input_ids=torch.tensor([tokens[:-1]])).last_hidden_state[0]
        embed: Any = self.target.get_input_embeddings()
        text = [*tokens[1:], *path]
        for end in range(len(tokens) - 1, len(text) + 1):
            both = self._normed(embed(torch.tensor(text[:end])), "embedding"), self._normed(known, "hidden")
            x, positions = (torch.cat(both, -1) @ self.weights["projection"].T)[None], torch.arange(end)[None]
            mask = torch.full((end, end), -torch.inf).triu(1)[None, None]
            given = self.layer(
                x, position_embeddings=self.rotary(x, positions), attention_mask=mask, position_ids=positions
            )
            last = self._normed(given[0, -1:], "norm")
            known = torch.cat([known, last])
        output: Any = self.target.get_output_embeddings()
        said: torch.Tensor = output(last)[0].log_softmax(-1)
        return said

    def _normed(self, x: torch.Tensor, name: str) -> torch.Tensor:
        eps = self.target.config.get_text_config().rms_norm_eps
        normed: torch.Tensor = x / (x.pow(2).mean(-1, keepdim=True) + eps).sqrt() * (self.gain + self.weights[name])
        return normed

    def change(self, **tensors: torch.Tensor | None) -> None:
        """Changes tensors of its checkpoint, by the keys of `names` or their own names with ``__`` for points; those
        that are None are taken out."""
        found = load_file(self.folder / FILE)
        named = {self.names.get(name, name.replace("__", ".")): tensor for name, tensor in tensors.items()}
        kept = {name: tensor for name, tensor in (found | named).items() if tensor is not None}
        save_file(kept, self.folder / FILE, {"format": "pt"})


def save_with_layer(folder: Path, family: str, dtype: torch.dtype = torch.float32, **options: Any) -> WithLayer:
    """Writes a tiny model of ``family``, and a layer that is another tiny model's, by the names of its format."""
    make = tiny_hybrid if family.startswith("qwen") else tiny_other
    target, other = make(family, dtype, **options), make(family, torch.float32, seed=7, **options)
    names, number = QWEN if family.startswith("qwen") else DEEPSEEK, FAMILIES.get(family, 1)
    for model, place in ((target, folder), (other, folder / "other")):
        model.save_pretrained(place)
    generator = torch.Generator().manual_seed(5)
    size = other.config.get_text_config().hidden_size
    gain = 0.0 if names is DEEPSEEK else 1.0
    weights = {
        name: torch.rand(size, generator=generator) + 0.5 - gain for name in ("embedding", "hidden", "norm")
    }  # fmt: skip
    weights["projection"] = torch.randn(size, 2 * size, generator=generator) * (2 * size) ** -0.5
    tensors = {names[name]: weight for name, weight in weights.items()}
    parts = load_file(folder / "other" / FILE)
    for name, tensor in parts.items():
        if f"layers.{number}." in name and "visual" not in name:
            tensors[names["layer"] + name.partition(f"layers.{number}.")[2]] = tensor
    if names is DEEPSEEK:
        tensors |= {
            f"{names['layer']}{copy}.weight": torch.zeros(3, 3) for copy in ("shared_head.head", "embed_tokens")
        }  # fmt: skip
    made = {name: tensor.to(dtype) if "bias" not in name else tensor for name, tensor in tensors.items()}
    save_file(load_file(folder / FILE) | made, folder / FILE, {"format": "pt"})
    text: Any = getattr(other.base_model, "language_model", other.base_model)
    text.config._attn_implementation = "eager"
    layer = text.layers[number]
    return WithLayer(folder, target, names, weights, layer, text.rotary_emb, gain)
