"""A block head on the target's hidden states, with the keys and values that it keeps of each text."""

from __future__ import annotations

import copy
from collections.abc import Sequence as SequenceOf

import numpy as np
import torch
from torch import nn
from torch.nn.functional import scaled_dot_product_attention

from tokentree.engines.base import Features, HasHiddenStates
from tokentree.engines.kv import KVLayout, SequenceKV, Storages
from tokentree.engines.radix import shared_length
from tokentree.errors import PairingError
from tokentree.heads.block import BlockHead, Markov
from tokentree.sequence import Sequence

ROWS = 256  # of a prompt, that are computed together


class TorchBlocks:
    """Guesses a block of tokens behind each text, in one pass.

    It keeps keys and values of all tokens that the target has read, one row for each position, computed from the
    target's hidden states. Rows of blocks are never kept. So there is nothing to commit and nothing to drop, and where
    the target takes back the end of a text, rows are overwritten.

    Args:
        head: made for this target; it stays as it is.
        target: its engine.

    Attributes:
        head: a copy in the target's type.
        context: the most positions that it can take.

    Raises:
        PairingError: if the head doesn't fit the target.
    """

    def __init__(self, head: BlockHead, target: HasHiddenStates) -> None:
        sizes = head.sizes
        features = target.capture(sizes.taps)
        if (sizes.target_hidden_size or sizes.hidden_size) != features.hidden_size:
            raise PairingError(
                f"this block head reads hidden states of {sizes.target_hidden_size or sizes.hidden_size} numbers, and "
                f"the target has {features.hidden_size}: it was made for another model"
            )
        if sizes.vocab_size != target.vocab_size:
            raise PairingError(
                f"this block head is for a target with {sizes.vocab_size} tokens, and this one has {target.vocab_size}"
            )
        if sizes.hidden_size != features.hidden_size and not (sizes.own_output and sizes.own_embedding):
            raise PairingError("this block head has no embedding or output layer, and the target's have another width")
        self.context, self._target, self._features = min(target.context, sizes.context), target, features
        self.head = _fast(head, features)
        self._output = features.output_layer
        if head.token_map is not None and head.lm_head is None:
            if int(head.token_map.max()) >= target.vocab_size:
                raise PairingError("this block head knows tokens that the target doesn't have")
            self._output = features.linear(*features.output_weights(head.token_map.to(features.device)))
        shape = (sizes.num_kv_heads, sizes.head_dim, sizes.head_dim)
        self._storages = Storages(KVLayout((shape,) * sizes.num_layers, features.dtype, features.device))
        self._kept: dict[int, tuple[Sequence, SequenceKV]] = {}

    @torch.inference_mode()
    def read(self, seqs: SequenceOf[Sequence]) -> None:
        """Computes the rows of all tokens that the target has read since the last time."""
        for seq in seqs:
            kv, end = self._kv(seq), self._target.committed(seq)
            kv.length = min(kv.length, end)
            if not kv.length:
                self._take_over(seq, kv, end)
            while kv.length < end:
                first = kv.length
                last = min(first + ROWS, end)
                kv.reserve(last)
                states = torch.cat([self._target.hidden(seq, tap)[first:last] for tap in self.head.sizes.taps], -1)
                positions = torch.arange(first, last, device=states.device)
                for layer, pair in enumerate(self.head.keys_values(self.head.context(states), positions)):
                    kv.write(layer, first, *(part.transpose(0, 1) for part in pair))
                kv.length = last

    def rows(self, seq: Sequence) -> int:
        """The number of rows that are kept of ``seq``."""
        return self._kv(seq).length

    @torch.inference_mode()
    def guess(self, seqs: SequenceOf[Sequence]) -> tuple[torch.Tensor, torch.Tensor]:
        """The states [texts, guesses, hidden size] of a block behind each of ``seqs``, and the logits [texts, guesses,
        tokens that the head knows] of what it guesses at each place, see `BlockHead`."""
        self.read(seqs)
        anchors = torch.tensor([seq.tokens[-1] for seq in seqs], device=self._features.device)
        starts = torch.tensor([len(seq.tokens) - 1 for seq in seqs], device=self._features.device)
        positions = starts[:, None] + torch.arange(self.head.sizes.block_size, device=starts.device)
        kept = [self._kv(seq) for seq in seqs]
        for kv in kept:
            kv.reserve(kv.length + self.head.sizes.block_size)
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

    def release(self, seqs: SequenceOf[Sequence]) -> None:
        """Drops what is kept of ``seqs``."""
        self._storages.give([self._kept.pop(seq.id)[1] for seq in seqs if seq.id in self._kept])

    def _kv(self, seq: Sequence) -> SequenceKV:
        if seq.id not in self._kept:
            most = min(len(seq.prompt_ids) + seq.params.max_tokens, self.context)
            rows = self._storages.layout.first_rows(min(len(seq.tokens), self.context), most)
            self._kept[seq.id] = seq, self._storages.take(rows)
        return self._kept[seq.id][1]

    def _take_over(self, seq: Sequence, kv: SequenceKV, most: int) -> None:
        """Copies rows of a live text that begins alike: the prompt of other samples, the beginning of other beams."""
        tokens, best, rows = np.array(seq.tokens), kv, 0
        for other, known in self._kept.values():
            alike = min(shared_length(tokens, np.array(other.tokens)), known.length, most)
            if known is not kv and alike > rows:
                best, rows = known, alike
        if rows:
            kv.copy_rows(best, rows)

    def _mask(self, before: int) -> torch.Tensor | None:
        """Which of the rows ``before`` the block, and in it, each of its rows sees; None: all."""
        keys = torch.arange(before + self.head.sizes.block_size, device=self._features.device)
        return self.head.sees(keys[before:], keys)


def _fast(head: BlockHead, features: Features) -> BlockHead:
    """A copy of ``head`` on the linear layers that the target's engine runs fastest, in its type."""
    made = copy.deepcopy(head).to(features.device, features.dtype).requires_grad_(False).eval()
    made.rotary = copy.deepcopy(head.rotary).to(features.device)  # its frequencies need float32
    for module in [one for one in made.modules() if not isinstance(one, Markov)]:  # single rows of its weights are read
        for name, layer in list(module.named_children()):
            if isinstance(layer, nn.Linear):
                setattr(module, name, features.linear(layer.weight.detach(), layer.bias))
    return made
