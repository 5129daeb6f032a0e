"""Training Medusa heads together with the model that they draft for (Medusa-2: Cai et al. 2024, arXiv:2401.10774,
section 2.2.2).

The model learns to be easier to look ahead from. So that it keeps its quality, it is held to what it said before: the
loss has the divergence from its former self (section 2.3.2's self-distillation), which the paper puts in the place of
the cross entropy where a model's own training data isn't to be had.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import nn
from torch.nn.functional import cross_entropy, kl_div
from transformers import PreTrainedModel

from tokentree.errors import OptionError
from tokentree.heads.medusa import MedusaHeads
from tokentree.train.loop import Figures
from tokentree.train.medusa import importance

WAYS = ("lora", "full")
HEADS_WEIGHT = 0.2  # of their loss beside the model's own, as in the paper's recipe
FASTER = 4.0  # the heads' learning rate, in the model's


def check_way(way: str) -> None:
    """Raises `OptionError` if there is no such way."""
    if way not in WAYS:
        raise OptionError(f"unknown way {way!r} to train a model: choose one of {', '.join(WAYS)}")


class ModelWithHeads(nn.Module):
    """A model that is trained, its former self, and heads.

    Args:
        model: a decoder-only model; it is changed.
        heads: that share its output layer, all tokens of it.
        way: ``lora``: low-rank updates of its linear layers (through peft), whose absence is the former self; or
            ``full``: all its weights, beside a copy that stays as it was.
        decay: of the heads' weights in the loss.

    Raises:
        OptionError: if there is no such way, or the heads share nothing.
    """

    def __init__(
        self, model: PreTrainedModel, heads: MedusaHeads, way: str, decay: float = 0.8, rank: int = 16
    ) -> None:
        super().__init__()
        check_way(way)
        if heads.projection is not None:
            raise OptionError("heads with projections of their own can't be trained with a model")
        self.heads, self.way = heads, way
        self.former: list[PreTrainedModel] = []  # no module of this one: it has no part in its state
        self.model: Any
        if way == "lora":
            from peft import LoraConfig, get_peft_model

            config = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules="all-linear", task_type="CAUSAL_LM")
            self.model = get_peft_model(model, config)
        else:
            self.former = [copy.deepcopy(model).eval().requires_grad_(False)]
            self.model = model
        self.importance: torch.Tensor
        self.register_buffer("importance", importance(heads.num_heads, decay), persistent=False)

    def forward(self, ids: torch.Tensor, mask: torch.Tensor) -> tuple[torch.Tensor, dict[str, float]]:
        """The loss over texts int64[texts, tokens], of which ``mask`` tells what is text; and its parts."""
        out = self.model(input_ids=ids, attention_mask=mask, output_hidden_states=True, use_cache=False)
        with torch.no_grad(), self.model.disable_adapter() if self.way == "lora" else nullcontext():
            before = (self.former or [self.model])[0](input_ids=ids, attention_mask=mask, use_cache=False).logits
        text = mask.bool()
        kept = kl_div(
            out.logits[text].float().log_softmax(-1), before[text].float().log_softmax(-1), log_target=True,
            reduction="batchmean",
        )  # fmt: skip
        ahead = self.loss_of_heads(out.hidden_states[-1], ids, text)
        return kept + HEADS_WEIGHT * ahead, {"divergence": float(kept.detach()), "heads": float(ahead.detach())}

    def loss_of_heads(self, hidden: torch.Tensor, ids: torch.Tensor, text: torch.Tensor) -> torch.Tensor:
        total = hidden.new_zeros((), dtype=torch.float32)
        layer = self.model.get_output_embeddings()
        states = self.heads(hidden.flatten(0, 1).to(self.heads.weight.dtype)).unflatten(1, ids.shape)
        for head in range(self.heads.num_heads):
            ahead = head + 2
            if ids.shape[1] > ahead:
                asked = text[:, ahead:]
                logits = layer(states[head][:, :-ahead][asked].to(hidden.dtype)).float()
                total = total + self.importance[head] * cross_entropy(logits, ids[:, ahead:][asked])
        return total

    def groups(self) -> list[dict[str, Any]]:
        """Parameters for the optimizer: the heads learn faster."""
        model = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        return [{"params": model}, {"params": list(self.heads.parameters()), "scale": FASTER}]

    def merged(self) -> PreTrainedModel:
        """The model as it is now, without anything of peft's."""
        merged: PreTrainedModel = self.model.merge_and_unload() if self.way == "lora" else self.model
        return merged


class TextTask:
    """Whole texts, some of them held back.

    Args:
        texts: token ids.
        held_back: the share of them that is only looked at, at least one text.
    """

    def __init__(self, texts: Sequence[list[int]], held_back: float) -> None:
        cut = min(len(texts) - 1, int(len(texts) * (1 - held_back)))
        self._texts, self._held_back = texts[:cut], texts[cut:]
        self.size = len(self._texts)

    def loss(self, model: nn.Module, places: torch.Tensor) -> torch.Tensor:
        loss: torch.Tensor = model(*_padded([self._texts[i] for i in places.tolist()], model))[0]
        return loss

    @torch.inference_mode()
    def evaluate(self, model: nn.Module) -> tuple[float, Figures]:
        total, sums = 0.0, Figures()
        for ids in self._held_back:
            loss, parts = model(*_padded([ids], model))
            total += float(loss)
            sums = {name: sums.get(name, 0.0) + value / len(self._held_back) for name, value in parts.items()}
        return total / len(self._held_back), sums


def _padded(texts: list[list[int]], model: nn.Module) -> tuple[torch.Tensor, torch.Tensor]:
    device, longest = next(model.parameters()).device, max(map(len, texts))
    ids = torch.tensor([[*text, *[0] * (longest - len(text))] for text in texts], device=device)
    mask = torch.tensor([[1] * len(text) + [0] * (longest - len(text)) for text in texts], device=device)
    return ids, mask
