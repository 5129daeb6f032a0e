"""A block head on the target's hidden states, with the keys and values that it keeps of each text."""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Sequence as SequenceOf

import numpy as np
import torch
from torch import nn
from torch.nn.functional import scaled_dot_product_attention

from tokentree.engines.drafting import CANDIDATES, Features, HasHiddenStates, Slots
from tokentree.engines.head_engine import beside, features_read
from tokentree.engines.kv import KVLayout, SequenceKV, Storages
from tokentree.engines.radix import shared_length
from tokentree.errors import PairingError
from tokentree.heads.block import BlockHead
from tokentree.heads.markov import Markov
from tokentree.kernels.topk import top_logprobs
from tokentree.sequence import Sequence

ROWS = 256  # of a text, that are computed together
FEW = 16  # rows that are computed sooner than others are looked through for them


class Blocks(ABC):
    """Guesses a block of tokens behind each text, in one pass; a subclass has the pass.

    It keeps keys and values of all tokens that the target has read, one row for each position, computed from the
    target's hidden states. Rows of blocks are never kept. So there is nothing to commit and nothing to drop, and where
    the target takes back the end of a text, rows are overwritten.

    Args:
        head: made for this target; it stays as it is.
        target: its engine.
        blocked: how keys and values lie, see `KVLayout`.

    Attributes:
        sizes: of the head.
        markov: its Markov part, in the target's type, or None.
        context: the most positions that it can take.

    Raises:
        PairingError: if the head doesn't fit the target.
    """

    markov: Markov | None

    def __init__(self, head: BlockHead, target: HasHiddenStates, blocked: bool) -> None:
        self.sizes = sizes = head.sizes
        features = features_read(sizes, target, "block")
        if sizes.hidden_size != features.hidden_size and not (sizes.own_output and sizes.own_embedding):
            raise PairingError("this block head has no embedding or output layer, and the target's have another width")
        self.context, self._target, self._features = min(target.context, sizes.context), target, features
        self._output = features.output_layer
        self._map = np.arange(sizes.vocab_size) if head.token_map is None else head.token_map.cpu().numpy()
        if int(self._map.max()) >= target.vocab_size:
            raise PairingError("this block head knows tokens that the target doesn't have")
        if head.token_map is not None and head.lm_head is None:
            self._output = features.linear(*features.output_weights(head.token_map.to(features.device)))
        shape = (sizes.num_kv_heads, sizes.head_dim, sizes.head_dim)
        layout = KVLayout((shape,) * sizes.num_layers, features.dtype, features.device, blocked=blocked)
        self._storages, self._kept = Storages(layout), dict[int, tuple[Sequence, SequenceKV]]()

    @abstractmethod
    def _store(self, kv: SequenceKV, states: torch.Tensor) -> None:
        """Commits the rows of the next tokens, of the target's hidden states there, [taps, rows, its hidden size]."""

    @abstractmethod
    def guess(self, seqs: SequenceOf[Sequence]) -> tuple[torch.Tensor, torch.Tensor]:
        """See `BlockEngine`."""

    @abstractmethod
    def slots(self, seqs: SequenceOf[Sequence]) -> list[Slots]:
        """See `BlockEngine`."""

    @torch.inference_mode()
    def prefill(self, seq: Sequence, upto: int | None = None) -> int:
        """Computes the rows of the first ``upto`` tokens, by default of all, as far as the target has read them."""
        kv, read = self._kv(seq), self._target.committed(seq)
        kv.length, end = min(kv.length, read), read if upto is None else min(read, upto)
        if end - kv.length > FEW:
            self._take_over(seq, kv, read)
        while kv.length < end:
            self._store(kv, self._states(seq, kv.length, min(kv.length + ROWS, end)))
        return 0

    def committed(self, seq: Sequence) -> int:
        """The number of rows that are kept of ``seq``."""
        return min(self._kv(seq).length, self._target.committed(seq))

    def release(self, seqs: SequenceOf[Sequence]) -> None:
        """Drops what is kept of ``seqs``."""
        self._storages.give([self._kept.pop(seq.id)[1] for seq in seqs if seq.id in self._kept])

    def _states(self, seq: Sequence, first: int, end: int) -> torch.Tensor:
        """[taps, n, its hidden size], the target's hidden states at positions ``first`` to ``end``."""
        return self._target.hidden_rows(seq, self.sizes.taps, first, end)

    def _kv(self, seq: Sequence) -> SequenceKV:
        if seq.id not in self._kept:
            most = min(len(seq.prompt_ids) + seq.params.max_tokens, self.context)
            rows = self._storages.layout.first_rows(min(len(seq.tokens), self.context), most)
            self._kept[seq.id] = seq, self._storages.take(rows)
        return self._kept[seq.id][1]

    def _take_over(self, seq: Sequence, kv: SequenceKV, most: int) -> None:
        """Copies rows of a live text that begins alike: the prompt of other samples, the beginning of other beams."""
        tokens, best, rows = np.array(seq.tokens), kv, kv.length
        for other, known in self._kept.values():
            alike = min(shared_length(tokens, np.array(other.tokens)), known.length, most)
            if known is not kv and alike > rows:
                best, rows = known, alike
        if best is not kv:
            kv.copy_rows(best, rows)


class TorchBlocks(Blocks):
    """Runs the head's own modules.

    Attributes:
        head: a copy in the target's type.
    """

    def __init__(self, head: BlockHead, target: HasHiddenStates) -> None:
        super().__init__(head, target, blocked=False)
        self.head = _fast(head, self._features)
        self.markov = self.head.markov

    def _store(self, kv: SequenceKV, states: torch.Tensor) -> None:
        first, end = kv.length, kv.length + states.shape[1]
        kv.reserve(end)
        positions = torch.arange(first, end, device=states.device)
        for layer, pair in enumerate(self.head.keys_values(self.head.context(beside(states)), positions)):
            kv.write(layer, first, *(part.transpose(0, 1) for part in pair))
        kv.length = end

    @torch.inference_mode()
    def guess(self, seqs: SequenceOf[Sequence]) -> tuple[torch.Tensor, torch.Tensor]:
        for seq in seqs:
            self.prefill(seq)
        anchors = torch.tensor([seq.tokens[-1] for seq in seqs], device=self._features.device)
        starts = torch.tensor([len(seq.tokens) - 1 for seq in seqs], device=self._features.device)
        positions = starts[:, None] + torch.arange(self.sizes.block_size, device=starts.device)
        kept = [self._kv(seq) for seq in seqs]
        for kv in kept:
            kv.reserve(kv.length + self.sizes.block_size)
        masks = [self._mask(kv.length) for kv in kept]

        def attend(layer: int, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
            found = []
            for text, (kv, mask) in enumerate(zip(kept, masks, strict=True)):
                kv.write(layer, kv.length, key[text].transpose(0, 1), value[text].transpose(0, 1))
                end = kv.length + key.shape[1]
                keys, values = (part[None, :, :end] for part in kv.layer(layer))
                own = query[text].transpose(0, 1)[None]
                out = scaled_dot_product_attention(own, keys, values, mask, enable_gqa=True)
                found.append(out[0].transpose(0, 1).flatten(1))
            return torch.stack(found)

        states = self.head(self.head.embed(anchors, self._features.embedding), positions, attend)
        return states, self.head.logits(states, self._output)

    @torch.inference_mode()
    def slots(self, seqs: SequenceOf[Sequence]) -> list[Slots]:
        found = list[Slots]()
        for seq, states, logits in zip(seqs, *self.guess(seqs), strict=True):
            if self.markov is None:
                logprobs, ids = top_logprobs(logits, min(CANDIDATES, logits.shape[1]), divisor_of(seq))
                found.append(Slots.independent(self._map[ids], np.exp(logprobs).astype(np.float64)))
            else:
                found.append(self._chained(self.markov, seq, states, logits.float()))
        return found

    def _chained(self, markov: Markov, seq: Sequence, states: torch.Tensor, logits: torch.Tensor) -> Slots:
        """Those of each place after each of those of the place before, or after each of some paths to it."""
        places, k, divisor = len(logits), self.sizes.candidates or min(CANDIDATES, logits.shape[1]), divisor_of(seq)
        found, onward = Slots.empty(places, k), by_path if markov.remembered else by_token
        before, memory = torch.tensor(seq.tokens[-1:], device=logits.device), markov.at_anchor(1)
        reached = logits.new_ones(1)  # [before], how probable each is
        for place, (state, row) in enumerate(zip(states, logits, strict=True)):
            told, memory = markov.told(before, state.expand(len(before), -1), memory)  # [before, rank or remembered]
            said = markov.after(row, told[0]).float() / divisor
            best = said.topk(k)
            pairs = best.values + markov.added(told - told[:1], best.indices.expand(len(before), -1)).float() / divisor
            sums = torch.logsumexp(best.values, 0) - torch.logsumexp(said, 0)
            shares = (pairs.log_softmax(-1) + sums).exp()
            parents, children, rank_of = onward(reached[:, None] * shares)
            ordered = torch.sort(shares, dim=-1, descending=True, stable=True)
            ids, order, count = self._map[best.indices.cpu().numpy()], ordered.indices, len(before)
            found.tokens[place, :count] = ids[order.cpu().numpy()]
            found.ranks[place, :count] = rank_of.gather(1, order).cpu().numpy()
            found.probs[place, :count] = ordered.values.cpu().numpy()
            before = torch.from_numpy(ids).to(logits.device)[children]
            memory, reached = memory[parents], reached[parents] * shares[parents, children]
        return found

    def _mask(self, before: int) -> torch.Tensor | None:
        """Which of the rows ``before`` the block, and in it, each of its rows sees; None: all."""
        keys = torch.arange(before + self.sizes.block_size, device=self._features.device)
        return self.head.sees(keys[before:], keys)


def by_token(joint: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Which guesses the next place is guessed after, if these depend on the last token alone: on each one once.

    Args:
        joint: [before, k], how probable the guesses of a place are, with what stands before them.

    Returns:
        int64[n], after which ``before`` each of them comes, and int64[n], which of the k it is; and int64[before, k],
        which of them each guess is, or -1.
    """
    numbers = torch.arange(joint.shape[1], device=joint.device)
    return torch.zeros_like(numbers), numbers, numbers.expand_as(joint)


def by_path(joint: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Likewise, if they depend on the whole path: the k most probable."""
    best = joint.flatten().topk(joint.shape[1]).indices
    ranks = best.new_full((joint.numel(),), -1)
    ranks[best] = torch.arange(len(best), device=joint.device)
    return best // joint.shape[1], best % joint.shape[1], ranks.view_as(joint)


def divisor_of(seq: Sequence) -> float:
    """What logits are divided by."""
    return 1.0 if seq.params.is_greedy else seq.params.temperature


def converted(head: BlockHead, features: Features) -> BlockHead:
    """A copy of ``head`` in the target's type, where the target is."""
    made = copy.deepcopy(head).to(features.device, features.dtype).requires_grad_(False).eval()
    made.rotary = copy.deepcopy(head.rotary).to(features.device)  # its frequencies need float32
    return made


def _fast(head: BlockHead, features: Features) -> BlockHead:
    """A copy of ``head`` on the linear layers that the target's engine runs fastest, in its type."""
    made = converted(head, features)
    for module in [one for one in made.modules() if not isinstance(one, Markov)]:  # single rows of its weights are read
        for name, layer in list(module.named_children()):
            if isinstance(layer, nn.Linear):
                setattr(module, name, features.linear(layer.weight.detach(), layer.bias))
    return made
