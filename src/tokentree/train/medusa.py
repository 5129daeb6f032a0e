"""Training Medusa heads on a target that stays as it is (Medusa-1: Cai et al. 2024, arXiv:2401.10774, section 2.2)."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import torch
from torch import nn
from torch.nn.functional import cross_entropy

from tokentree.heads.medusa import MedusaHeads
from tokentree.train.features import HiddenTexts
from tokentree.train.looks import KindLook, joined
from tokentree.train.loop import Figures

RANKS = 10  # of the candidates whose accuracy is told
LOOK = 4096  # tokens held back that each look reads
GRID = torch.linspace(0.6, 2.4, 37)  # temperatures that are tried


class HeadsWithLoss(nn.Module):
    """Heads, the output layer that they share, and what they lose.

    Args:
        heads: their parameters are trained.
        weight, bias: of the shared output layer [vocab, hidden] and [vocab] (or None), for the tokens that the heads
            know; None for heads with projections of their own.
        decay: the loss of head k weighs decay ** k, as the paper has it, of which the weights are divided by their sum.
    """

    def __init__(
        self, heads: MedusaHeads, weight: torch.Tensor | None, bias: torch.Tensor | None = None, decay: float = 0.8
    ) -> None:
        super().__init__()
        self.heads = heads
        self.weight: torch.Tensor | None
        self.bias: torch.Tensor | None
        self.register_buffer("weight", weight, persistent=False)
        self.register_buffer("bias", bias, persistent=False)
        self.importance: torch.Tensor
        self.register_buffer("importance", importance(heads.num_heads, decay), persistent=False)

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """[heads, rows, tokens that the heads know]"""
        weight, bias = self.weight, self.bias
        return self.heads.logits(hidden, None if weight is None else lambda x: nn.functional.linear(x, weight, bias))

    def forward(self, hidden: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """The loss, a scalar: the cross entropy of each head, weighted; ``hidden`` [rows, hidden], ``labels``
        int64[heads, rows], -100 where nothing is asked."""
        logits = self.logits(hidden).float()
        losses = cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="none").view_as(labels)
        asked = (labels >= 0).sum(1).clamp(min=1)
        return (losses.sum(1) / asked * self.importance).sum()


def importance(num_heads: int, decay: float) -> torch.Tensor:
    """float[num_heads]: what the loss of each head weighs, ``decay ** k`` over their sum."""
    weights = decay ** torch.arange(num_heads)
    return weights / weights.sum()


class MedusaTask:
    """Heads over hidden states that were computed before.

    Args:
        texts: to train on; held_back: to look at.
        token_map: int64[vocab of the heads], or None if they know all tokens.
        vocab_size: of the target.
    """

    def __init__(
        self, texts: HiddenTexts, held_back: HiddenTexts, num_heads: int, vocab_size: int,
        token_map: torch.Tensor | None,
    ) -> None:  # fmt: skip
        self._texts, self._held_back, self._num_heads = texts, held_back, num_heads
        self._own = torch.arange(vocab_size)  # the target's ids -> the heads', -100 for those that they don't know
        if token_map is not None:
            self._own = torch.full((vocab_size,), -100).index_put((token_map,), torch.arange(len(token_map)))
        self._places = torch.nonzero(texts.labels(torch.arange(len(texts)), 1)[0] >= 0)[:, 0]
        self.size = len(self._places)

    def loss(self, model: nn.Module, places: torch.Tensor) -> torch.Tensor:
        loss: torch.Tensor = model(*self._batch(self._texts, self._places[places], model))
        return loss

    def evaluate(self, model: nn.Module) -> tuple[float, Figures]:
        loss, rates, kinds = self._look(model)
        figures = Figures()
        for head, by_rank in enumerate(rates, start=1):
            figures |= {f"head {head} top-1": by_rank[0], f"head {head} top-5": sum(by_rank[:5])}
        return loss, figures | joined(kinds)[1]

    def accuracies(self, model: nn.Module) -> list[list[float]]:
        """Per head and rank, how often that candidate is the token that comes, of what is held back."""
        return self._look(model)[1]

    @torch.inference_mode()
    def _look(self, model: nn.Module) -> tuple[float, list[list[float]], list[KindLook]]:
        """The loss over what is held back, the accuracies, and what is told of each kind."""
        assert isinstance(model, HeadsWithLoss)
        loss, right, asked = 0.0, torch.zeros(self._num_heads, RANKS), torch.zeros(self._num_heads)
        kinds, looks = self._kinds(), list[KindLook]()
        for kind in sorted({*kinds}):
            look = KindLook(kind)
            chosen = torch.tensor([one == kind for one in kinds])
            for places in self._looked_at()[chosen].split(512):
                hidden, labels = self._batch(self._held_back, places, model)
                value, logits = float(model(hidden, labels)), model.logits(hidden)
                loss += value * len(places)
                right += hits_by_rank(logits, labels)
                # known to the heads or not
                there = self._held_back.labels(places, self._num_heads) >= 0
                asked += there.sum(1)
                runs = (logits.argmax(-1) == labels).cumprod(0).sum()
                look.note(value, len(places), int(runs), int(there[0].sum()))
            looks.append(look)
        rates: list[list[float]] = (right / asked.clamp(min=1)[:, None]).tolist()
        return loss / len(self._looked_at()), rates, looks

    @torch.inference_mode()
    def temperatures(self, model: HeadsWithLoss) -> list[float]:
        """Per head, the temperature at which it finds what is held back the most probable."""
        losses = torch.zeros(len(GRID), self._num_heads)
        for places in self._looked_at().split(512):
            hidden, labels = self._batch(self._held_back, places, model)
            logits = model.logits(hidden).float().cpu()
            for i, temperature in enumerate(GRID):
                for head in range(self._num_heads):
                    losses[i, head] += cross_entropy(logits[head] / temperature, labels[head].cpu(), reduction="sum")
        found: list[float] = GRID[losses.argmin(0)].tolist()
        return found

    def _looked_at(self) -> torch.Tensor:
        """Places spread evenly over what the heads learn of what is held back."""
        every = torch.arange(len(self._held_back))
        if self._held_back.answers is not None:
            every = every[self._held_back.labels(every, 1)[0] >= 0]
        return every[:: max(1, len(every) // LOOK)]

    def _kinds(self) -> list[str]:
        """The kind of the text of each of these places."""
        kinds = dict(zip((end for _, end in self._held_back.spans()), self._held_back.kinds_of(), strict=True))
        return [kinds[end] for end in self._held_back.ends[self._looked_at()].tolist()]

    def _batch(self, texts: HiddenTexts, places: torch.Tensor, model: nn.Module) -> tuple[torch.Tensor, torch.Tensor]:
        device = next(model.parameters()).device
        labels = texts.labels(places, self._num_heads)
        labels = torch.where(labels >= 0, self._own[labels.clamp(min=0)], labels)
        return texts.hidden[places.to(texts.hidden.device)].float().to(device), labels.to(device)


def hits_by_rank(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """float[heads, RANKS], how often the candidate of each rank is right."""
    best = logits.topk(min(RANKS, logits.shape[-1]), dim=-1).indices
    hits = (best == labels[..., None]).sum(1).float().cpu()
    return nn.functional.pad(hits, (0, RANKS - hits.shape[1]))


def frequent_tokens(texts: Sequence[list[int]], count: int, vocab_size: int) -> torch.Tensor | None:
    """int64[count], ascending: the most frequent tokens of ``texts``, and of those that don't occur the lowest, which
    tokenizers made of pairs learnt first. None if ``count`` is the whole vocabulary or more."""
    if count >= vocab_size:
        return None
    seen = Counter(token for ids in texts for token in ids)
    order = sorted(range(vocab_size), key=lambda token: (-seen[token], token))
    return torch.tensor(sorted(order[:count]))
