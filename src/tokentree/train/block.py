"""Training a block head on a target that stays as it is (DFlash, arXiv:2602.06036, and DFlash 2; DSpark,
arXiv:2607.05147)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn.functional import cross_entropy

from tokentree.heads.block import BlockHead
from tokentree.heads.markov import Selector
from tokentree.train.features import HiddenTexts
from tokentree.train.looks import LOOK, KindLook, joined, looked_at
from tokentree.train.loop import Figures

MASKED = -1e9
# ids int64[n] of a text; the target's hidden states float32[n, width]: those that the head reads, then the last one;
# and bool[n], which tokens the model wrote, if it is not all of them
TextStates = tuple[torch.Tensor, torch.Tensor] | tuple[torch.Tensor, torch.Tensor, torch.Tensor]


@dataclass(frozen=True, eq=False)
class Guesses:
    """What a head guesses behind some anchors, of all places that the text has, behind one another.

    Args:
        logits: [n, tokens that it knows], after the token before; of a head with a selector, without it.
        states: [n, hidden size], of the rows.
        before, labels: int64[n], the text's tokens before each place and there, in the target's ids.
        target: [n, tokens], the target's own logits there.
        places: int64[n], how many guesses come before each one in its block.
        asked: bool[n], whether a guess is learnt.
        told: [n, rank], what `Markov.told` gives; [n, 0] of a head without such a part.
    """

    logits: torch.Tensor
    states: torch.Tensor
    before: torch.Tensor
    labels: torch.Tensor
    target: torch.Tensor
    places: torch.Tensor
    asked: torch.Tensor
    told: torch.Tensor


class BlockWithLoss(nn.Module):
    """A head and what it loses. What a selector loses is added: the cross entropy of the text among its candidates.

    Args:
        head: its parameters are trained.
        embedding: float32[vocab, hidden size], of the target, where the head has none of its own.
        output: float32[tokens, hidden size] and a bias or None, the target's output layer for the tokens that the head
            knows.
        anchors: the most blocks that are laid into a text.
        fade: places behind the anchor after which a guess counts for 1/e.
        pace: if it is given, guesses count by how often a block comes so far instead (D-PACE, arXiv:2605.18810), where
            the head's probability of each token is raised by this share of what it lacks.
        distil: the share of the loss that is the distance from the target's distribution; the rest is the cross entropy
            of the text.
    """

    def __init__(
        self, head: BlockHead, embedding: torch.Tensor, output: tuple[torch.Tensor, torch.Tensor | None],
        anchors: int = 64, fade: float = 4.0, distil: float = 0.9, pace: float | None = None,
    ) -> None:  # fmt: skip
        super().__init__()
        self.head, self.anchors, self.fade, self.distil, self.pace = head, anchors, fade, distil, pace
        self.embedding: torch.Tensor
        self.weight: torch.Tensor
        self.bias: torch.Tensor | None
        self.known: torch.Tensor | None
        self.register_buffer("embedding", embedding, persistent=False)
        self.register_buffer("weight", output[0], persistent=False)
        self.register_buffer("bias", output[1], persistent=False)
        known = None
        if head.token_map is not None:  # the head's own number of each token, -100 where it knows none
            known = torch.full((head.sizes.vocab_size,), -100)
            known[head.token_map] = torch.arange(len(head.token_map))
        self.register_buffer("known", known, persistent=False)

    def forward(self, texts: Sequence[TextStates], seed: int) -> torch.Tensor:
        """The loss over ``texts``, see `guesses`, a scalar; ``seed`` chooses the anchors."""
        found = self.guesses(texts, seed)
        labels = found.labels if self.known is None else self.known[found.labels]
        logits = found.logits.float()
        entropy = cross_entropy(logits, labels, reduction="none")
        weights = torch.exp(-found.places / self.fade)
        if self.pace is not None:
            probs = torch.where(labels >= 0, torch.exp(-entropy.detach()), 0.0)
            weights = paced(probs, found.places, self.head.sizes.num_guesses, self.pace)
        weights = weights * found.asked
        away = (logits.softmax(-1) - found.target.float().softmax(-1)).abs().sum(-1)
        loss = ((1 - self.distil) * entropy + self.distil * away) * weights
        if self.head.confidence is not None:
            sure = self.head.confidences(found.states, found.before)
            right = (1 - away / 2).detach()
            loss = loss + weights * nn.functional.binary_cross_entropy_with_logits(sure, right, reduction="none")
        lost, selector = _mean(loss, weights), self._selector
        return lost if selector is None else lost + _lost_by(selector, found, labels, entropy, weights)

    def first(self, found: Guesses) -> torch.Tensor:
        """int64[n], the tokens that the head finds most probable after the text, in the target's ids."""
        selector = self._selector
        numbers = (found.logits if selector is None else selector.after(found.logits, found.told)).argmax(-1)
        return numbers if self.head.token_map is None else self.head.token_map[numbers]

    def guesses(self, texts: Sequence[TextStates], seed: int) -> Guesses:
        """What the head guesses behind anchors at random places of each text.

        Args:
            texts: each has at least 3 tokens.
        """
        generator = torch.Generator().manual_seed(seed)
        return _joined([self._of(text, generator) for text in texts])

    def _of(self, text: TextStates, generator: torch.Generator) -> Guesses:
        head, sizes, (ids, states, *answers) = self.head, self.head.sizes, text
        width = sizes.target_hidden_size or sizes.hidden_size
        read, last = states[:, : len(sizes.taps) * width], states[:, -width:]
        anchors = 1 + torch.randperm(len(ids) - 2, generator=generator)
        if answers:  # those behind which there is anything to learn
            anchors = anchors[answers[0].cpu()[anchors + 1]] if bool(answers[0][2:].any()) else anchors
        anchors = anchors[: self.anchors].to(ids.device)
        places = torch.arange(len(ids), device=ids.device)
        kept = head.keys_values(head.context(read), places)
        positions = anchors[:, None] + torch.arange(sizes.block_size, device=ids.device)
        attend = _Attend(head, kept, places < anchors[:, None], positions)
        rows = head(head.embed(ids[anchors], lambda x: self.embedding[x]), positions, attend)  # [blocks, guesses, size]
        number = torch.arange(sizes.num_guesses, device=ids.device)
        guessed = anchors[:, None] + 1 + number  # [blocks, guesses], which token each one is
        there = (guessed < len(ids)).flatten().nonzero()[:, 0]
        before = ids[(guessed - 1).clamp(max=len(ids) - 1)]
        told = rows[..., :0] if head.markov is None else head.markov.told_along(before, rows)
        guessed, rows, told = guessed.flatten()[there], *(part.flatten(0, 1)[there] for part in (rows, told))
        logits = head.logits(rows, self._output)
        if head.markov is not None and self._selector is None:
            logits = head.markov.after(logits, told)
        with torch.no_grad():
            target = self._output(last[guessed - 1])
        asked = answers[0][guessed] if answers else torch.ones_like(guessed, dtype=torch.bool)
        return Guesses(logits, rows, ids[guessed - 1], ids[guessed], target, there % sizes.num_guesses, asked, told)

    @property
    def _selector(self) -> Selector | None:
        return self.head.markov if isinstance(self.head.markov, Selector) else None

    def _output(self, hidden: torch.Tensor) -> torch.Tensor:
        return nn.functional.linear(hidden, self.weight, self.bias)


class _Attend:
    """Attention of many blocks of a text at once: each sees the tokens before its anchor, and itself.

    Args:
        kept: for each layer, keys and values [tokens, KV heads, head_dim] of the text.
        before: bool[blocks, tokens], whether a token comes before the block's anchor.
        positions: int64[blocks, rows].
    """

    def __init__(
        self, head: BlockHead, kept: list[tuple[torch.Tensor, torch.Tensor]], before: torch.Tensor,
        positions: torch.Tensor,
    ) -> None:  # fmt: skip
        self._sizes, self._kept = head.sizes, kept
        blocks, tokens = before.shape
        keys = torch.arange(tokens, device=before.device).expand(blocks, tokens)
        rows = positions.shape[1]
        seen = [before[:, None].expand(-1, rows, -1), before.new_ones(blocks, rows, rows)]
        for part, where in enumerate((keys, positions)):
            if (near := head.sees(positions, where)) is not None:
                seen[part] = seen[part] & near
        self._seen = torch.cat(seen, -1)[:, None, None]  # [blocks, 1, 1, rows, tokens + rows]

    def __call__(self, layer: int, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        groups = self._sizes.num_heads // self._sizes.num_kv_heads
        query = query.unflatten(2, (-1, groups)) * self._sizes.head_dim**-0.5  # [blocks, rows, KV heads, groups, width]
        keys, values = self._kept[layer]
        scores = torch.cat([
            torch.einsum("brhgd,thd->bhgrt", query, keys), torch.einsum("brhgd,bthd->bhgrt", query, key)
        ], -1)  # fmt: skip
        weights = scores.masked_fill(~self._seen, MASKED).softmax(-1)
        before, own = weights.split([len(keys), key.shape[1]], -1)
        out = torch.einsum("bhgrt,thd->brhgd", before, values) + torch.einsum("bhgrt,bthd->brhgd", own, value)
        return out.flatten(2)


class BlockTask:
    """A head over texts whose hidden states were computed before. Places are texts of at least 3 tokens.

    Args:
        texts: to train on; held_back: to look at.
        look: texts held back that each look reads, of each kind as many.
    """

    def __init__(self, texts: HiddenTexts, held_back: HiddenTexts, look: int = LOOK) -> None:
        self._texts, self._held_back = texts, held_back
        self._spans, self._looked = _long(texts), looked_at(held_back, _long(held_back), look)
        self.size = len(self._spans)

    def loss(self, model: nn.Module, places: torch.Tensor) -> torch.Tensor:
        texts = [_text(self._texts, self._spans[place], _device(model)) for place in places.tolist()]
        loss: torch.Tensor = model(texts, int(places.sum()))
        return loss

    @torch.inference_mode()
    def evaluate(self, model: nn.Module) -> tuple[float, Figures]:
        """The loss; at each depth, how often the head's first choice is the text's token if those before it were; and
        the mean number of tokens of a step that takes first choices alone, the target's own included. The loss and
        these are told of each kind too."""
        assert isinstance(model, BlockWithLoss)
        guesses = model.head.sizes.num_guesses
        right, asked, kinds, number = torch.zeros(guesses), torch.zeros(guesses), list[KindLook](), 0
        for kind, spans in self._looked.items():
            look = KindLook(kind)
            for span in spans:
                texts = [_text(self._held_back, span, _device(model))]
                found = model.guesses(texts, number)
                hits = model.first(found) == found.labels
                going, runs, blocks = True, 0, 0
                for place, hit, there in zip(
                    found.places.tolist(), hits.tolist(), found.asked.tolist(), strict=True
                ):  # fmt: skip
                    going = (going or place == 0) and there
                    blocks += place == 0 and there
                    if going:
                        asked[place] += 1
                        right[place] += hit
                        runs += hit
                        going = hit
                if blocks:
                    look.note(float(model(texts, number)), 1, runs, blocks)
                number += 1
            kinds.append(look)
        rates = (right / asked.clamp(min=1)).tolist()
        loss, figures = joined(kinds)
        return loss, {f"depth {depth} top-1": rate for depth, rate in enumerate(rates, start=1)} | figures


def _long(texts: HiddenTexts) -> list[tuple[int, int]]:
    return [(start, end) for start, end in texts.spans() if end - start > 2]


def _text(texts: HiddenTexts, span: tuple[int, int], device: torch.device) -> TextStates:
    part = slice(*span)
    found = texts.ids[part].to(device), texts.hidden[part].float().to(device)
    return found if texts.answers is None else (*found, texts.answers[part].to(device))


def paced(probs: torch.Tensor, places: torch.Tensor, guesses: int, raised: float) -> torch.Tensor:
    """float[n], what guesses count for: how many of their block are taken from each one on, by what the head says.

    Args:
        probs: float[n], of the text's tokens.
        places: int64[n], how many guesses come before each one in its block of at most ``guesses``.
        raised: see `BlockWithLoss`.
    """
    block = (places == 0).cumsum(0) - 1
    taken = probs.new_zeros(int(block[-1]) + 1, guesses)
    taken[block, places] = raised + (1 - raised) * probs
    return taken.cumprod(1).flip(1).cumsum(1).flip(1)[block, places]


def _joined(parts: list[Guesses]) -> Guesses:
    names = ("logits", "states", "before", "labels", "target", "places", "asked", "told")
    return Guesses(*(torch.cat([getattr(part, name) for part in parts]) for name in names))


def _lost_by(
    selector: Selector, found: Guesses, labels: torch.Tensor, entropy: torch.Tensor, weights: torch.Tensor
) -> torch.Tensor:  # fmt: skip
    """The cross entropy of the text among the tokens that a selector takes from. Where the text's token is none of
    them, the selector can't learn: that counts as much as the row by itself loses, so that no head seems better for it.

    Args:
        labels: int64[n], the text's tokens, by the head's own numbers.
        entropy: float[n], the cross entropy that the rows lose by themselves.
        weights: float[n].
    """
    numbers, scores = selector.among(found.logits, found.told)
    right = numbers == labels[:, None]
    among = -(scores.float().log_softmax(-1) * right).sum(-1)
    return _mean(torch.where(right.any(-1), among, entropy.detach()) * weights, weights)


def _mean(values: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """Of what is weighed already."""
    return values.sum() / weights.sum().clamp(min=1e-9)


def _device(model: nn.Module) -> torch.device:
    return next(model.parameters()).device
