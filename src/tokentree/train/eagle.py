"""Training an EAGLE head on a target that stays as it is.

EAGLE-1 (Li et al. 2024, arXiv:2401.15077, section 3.2) learns the target's next hidden state, and its next token
through the target's output layer. EAGLE-3 (arXiv:2503.01840, section 3.2) learns the target's distributions alone, and
goes on from its own states as it will when it drafts: the training-time test.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn.functional import smooth_l1_loss

from tokentree.heads.eagle import EagleHead
from tokentree.train.features import HiddenTexts
from tokentree.train.looks import LOOK, KindLook, joined, looked_at
from tokentree.train.loop import Figures

DECAY = 0.8  # of the weight of each further step of the training-time test
TOKEN_WEIGHT = 0.1  # of EAGLE-1's loss on tokens beside that on states
NOISE = 0.1  # added to the states that EAGLE-1 is trained on, at most
MASKED = -1e9


@dataclass(frozen=True, eq=False)
class Batch:
    """Texts side by side, shorter ones filled up.

    Args:
        ids: int64[texts, length].
        states: float32[texts, length, width], the target's hidden states: those that the head reads, then the last one.
        lengths: int64[texts], in the CPU's memory.
        asked: bool[texts, length], there too, whether a head learns what the target says behind a token.
    """

    ids: torch.Tensor
    states: torch.Tensor
    lengths: torch.Tensor
    asked: torch.Tensor


@dataclass(frozen=True, eq=False)
class Step:
    """What a head said at one step of the training-time test; row i is that of token i + 1 + step.

    Args:
        given: [texts, rows, hidden size], what it knows of the next positions.
        logits: [texts, rows, tokens that it is trained on].
        target: [texts, rows, tokens], the target's own logits there.
        tokens: int64[texts, rows], what the text has there, in the target's ids; -1 behind its end.
        asked: int64[n], where it is learnt, of all rows behind one another.
    """

    given: torch.Tensor
    logits: torch.Tensor
    target: torch.Tensor
    tokens: torch.Tensor
    asked: torch.Tensor


class EagleWithLoss(nn.Module):
    """A head and what it loses.

    Args:
        head: its parameters are trained.
        embedding: float32[vocab, hidden size], of the target, where the head has none of its own.
        output: float32[tokens, hidden size] and a bias or None, the target's output layer for the tokens that the head
            is trained on.
        unroll: steps of EAGLE-3's training-time test; 1 is without.
        noise: see `NOISE`.
    """

    def __init__(
        self, head: EagleHead, embedding: torch.Tensor, output: tuple[torch.Tensor, torch.Tensor | None],
        unroll: int = 5, noise: float = NOISE,
    ) -> None:  # fmt: skip
        super().__init__()
        self.head, self.unroll, self.noise = head, unroll, noise
        self.embedding: torch.Tensor
        self.weight: torch.Tensor
        self.bias: torch.Tensor | None
        self.register_buffer("embedding", embedding, persistent=False)
        self.register_buffer("weight", output[0], persistent=False)
        self.register_buffer("bias", output[1], persistent=False)

    def forward(self, batch: Batch, seed: int | None = None) -> torch.Tensor:
        """The loss, a scalar; ``seed`` is that of EAGLE-1's noise, and None is without."""
        if self.head.sizes.version == 1:
            (step,) = self.steps(batch, 1, seed)
            ahead = batch.states[:, 1 : 1 + step.given.shape[1]]
            state_loss = smooth_l1_loss(_asked(step.given, step), _asked(ahead, step), reduction="sum")
            state_loss = state_loss / max(1, len(step.asked) * ahead.shape[-1])
            return state_loss + TOKEN_WEIGHT * _divergence(step)
        losses = [_divergence(step) * DECAY**number for number, step in enumerate(self.steps(batch, self.unroll))]
        return torch.stack(losses).sum() / sum(DECAY**number for number in range(self.unroll))

    def steps(self, batch: Batch, count: int, seed: int | None = None) -> list[Step]:
        """What the head says at each step; from the second on, it goes on from its own states."""
        sizes, length = self.head.sizes, batch.ids.shape[1]
        width = len(sizes.taps) * (sizes.target_hidden_size or sizes.hidden_size)
        read, last = batch.states[..., :width], batch.states[..., -(sizes.target_hidden_size or sizes.hidden_size) :]
        if seed is not None and sizes.version == 1:
            generator = torch.Generator().manual_seed(seed)
            spread = torch.rand(read.shape, generator=generator).to(read.device) * 2 - 1
            read = read + self.noise * spread
        rows, found = length - 1, list[Step]()
        with torch.no_grad():
            said = self._output(last)
        known, attended = self.head.fuse(read[:, :rows]), _Attended(self.head)
        for number in range(count):
            ids = _shifted(batch.ids, 1 + number, rows)
            embedded = self.embedding[ids] if self.head.embed_tokens is None else self.head.embed_tokens(ids)
            known = self.head(embedded, known, attended)
            logits = self.head.logits(known, self._output)
            asked = _shifted(batch.asked, 1 + number, rows).flatten().nonzero()[:, 0]
            there = (torch.arange(rows) + 2 + number < batch.lengths[:, None]).to(ids.device)
            tokens = torch.where(there, _shifted(batch.ids, 2 + number, rows), -1)
            found.append(Step(known, logits, _shifted(said, 1 + number, rows), tokens, asked.to(ids.device)))
        return found

    def _output(self, hidden: torch.Tensor) -> torch.Tensor:
        return nn.functional.linear(hidden, self.weight, self.bias)


class _Attended:
    """Attention of one step after another: of a row to all rows before it at the first step, and to its own at the
    others, as along a path of a tree."""

    def __init__(self, head: EagleHead) -> None:
        self._head = head
        self._keys: list[torch.Tensor] = []
        self._values: list[torch.Tensor] = []

    def __call__(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        sizes, number = self._head.sizes, len(self._keys)
        rows = query.shape[1]
        positions = torch.arange(rows, device=query.device).expand(len(query), rows) + number
        query, key = self._head.rotate(query, positions), self._head.rotate(key, positions)
        groups = sizes.num_heads // sizes.num_kv_heads
        key, value = (x.repeat_interleave(groups, 2).transpose(1, 2) for x in (key, value))
        query = query.transpose(1, 2) * sizes.head_dim**-0.5  # [texts, heads, rows, width]
        self._keys.append(key)
        self._values.append(value)
        later = torch.ones(rows, rows, dtype=torch.bool, device=query.device).triu(1)
        scores = (query @ self._keys[0].transpose(2, 3)).masked_fill(later, MASKED)
        own = [(query * key).sum(-1, keepdim=True) for key in self._keys[1:]]
        weights = torch.cat([scores, *own], -1).softmax(-1)
        out = weights[..., :rows] @ self._values[0]
        for place, value in enumerate(self._values[1:], start=rows):
            out = out + weights[..., place : place + 1] * value
        return out.transpose(1, 2).flatten(2)


class EagleTask:
    """A head over texts whose hidden states were computed before. Places are texts.

    Args:
        texts: to train on; held_back: to look at.
        depth: how deep figures are told, in tokens ahead of the first.
        look: texts held back that each look reads, of each kind as many.
    """

    def __init__(self, texts: HiddenTexts, held_back: HiddenTexts, depth: int = 5, look: int = LOOK) -> None:
        self._texts, self._held_back, self._depth = texts, held_back, depth
        self._spans, self._looked = texts.spans(), looked_at(held_back, held_back.spans(), look)
        self.size = len(self._spans)

    def loss(self, model: nn.Module, places: torch.Tensor) -> torch.Tensor:
        batch = batch_of(self._texts, [self._spans[place] for place in places.tolist()], _device(model))
        loss: torch.Tensor = model(batch, int(places.sum()))
        return loss

    @torch.inference_mode()
    def evaluate(self, model: nn.Module) -> tuple[float, Figures]:
        """The loss; at each depth how often the head's first choice is the target's, of the tokens that the head knows,
        going on from itself; and how many tokens a step takes of a text that takes first choices alone. The loss and
        these are told of each kind too."""
        assert isinstance(model, EagleWithLoss)
        right, asked, kinds = torch.zeros(self._depth), torch.zeros(self._depth), list[KindLook]()
        for kind, spans in self._looked.items():
            look = KindLook(kind)
            for begin in range(0, len(spans), 4):
                batch = batch_of(self._held_back, spans[begin : begin + 4], _device(model))
                steps = model.steps(batch, self._depth)
                if not len(steps[0].asked):
                    continue
                look.note(float(model(batch)), len(batch.ids), *_runs(steps, model.head.token_map))
                for number, step in enumerate(steps):
                    hits = step.logits.argmax(-1) == step.target.argmax(-1)
                    right[number] += int(_asked(hits, step).sum())
                    asked[number] += len(step.asked)
            kinds.append(look)
        rates = (right / asked.clamp(min=1)).tolist()
        loss, figures = joined(kinds)
        return loss, {f"depth {depth} top-1": rate for depth, rate in enumerate(rates, start=1)} | figures


def batch_of(texts: HiddenTexts, spans: Sequence[tuple[int, int]], device: torch.device) -> Batch:
    """The texts with these first and last tokens."""
    lengths = torch.tensor([end - start for start, end in spans])
    longest = int(lengths.max())
    ids, asked = torch.zeros(len(spans), longest, dtype=torch.int64), torch.zeros(len(spans), longest, dtype=torch.bool)
    states = torch.zeros(len(spans), longest, texts.hidden.shape[1], device=texts.hidden.device)
    for row, (start, end) in enumerate(spans):
        ids[row, : end - start] = texts.ids[start:end]
        states[row, : end - start] = texts.hidden[start:end]
        if texts.answers is None:
            asked[row, : end - start] = True
        else:
            asked[row, : end - start - 1] = texts.answers[start + 1 : end]
    return Batch(ids.to(device), states.to(device), lengths, asked)


def _runs(steps: Sequence[Step], token_map: torch.Tensor | None) -> tuple[int, int]:
    """How many first choices are the text's tokens where all before them were, and behind how many places."""
    going, total = torch.ones(1, dtype=torch.bool), 0
    for step in steps:
        said = step.logits.argmax(-1)
        hits = (said if token_map is None else token_map.to(said.device)[said]) == step.tokens
        there = torch.zeros(hits.numel(), dtype=torch.bool, device=hits.device).index_fill(0, step.asked, True)
        going = going.to(hits.device) & hits.flatten() & there
        total += int(going.sum())
    return total, len(steps[0].asked)


def _divergence(step: Step) -> torch.Tensor:
    """The cross entropy of what the head says against what the target does, over the tokens that the head knows."""
    probs = _asked(step.target, step).float().softmax(-1)
    losses = -(probs * _asked(step.logits, step).float().log_softmax(-1)).sum(-1)
    return losses.sum() / max(1, len(losses))


def _asked(x: torch.Tensor, step: Step) -> torch.Tensor:
    """The rows of ``x`` [texts, rows, ...] that ``step`` is asked about. Picked by numbers: a mask would be counted,
    for which the CPU would wait for a GPU."""
    return x.flatten(0, 1)[step.asked]


def _shifted(x: torch.Tensor, by: int, rows: int) -> torch.Tensor:
    """Rows ``by`` and on of ``x`` [texts, length, ...], filled up with zeros."""
    part = x[:, by : by + rows]
    missing = rows - part.shape[1]
    return torch.cat([part, part.new_zeros(len(part), missing, *part.shape[2:])], 1) if missing else part


def _device(model: nn.Module) -> torch.device:
    return next(model.parameters()).device
