"""A block head's pass in one compiled call."""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from tokentree.engines.cpu.fused import FusedNorm, HeadNorms
from tokentree.engines.cpu.linear import PackedLinear, outputs_from
from tokentree.engines.cpu.packing import Packing
from tokentree.engines.cpu.quantized import QuantizedLinear
from tokentree.engines.cpu.step_loops import FOLLOW, FollowStep
from tokentree.engines.cpu.steps import Behind, OwnHeads, Step, Steps, Stretch
from tokentree.engines.cpu.turns import RotaryTables, Turns
from tokentree.engines.drafting import CANDIDATES, Features, Slots
from tokentree.engines.kv import SequenceKV
from tokentree.engines.segment import Segment, end_of, inputs_of
from tokentree.heads.block import BlockHead, BlockLayer, BlockSizes
from tokentree.heads.markov import Markov
from tokentree.kernels.tile import BLOCK
from tokentree.tree import Ints, TokenTree


@dataclass(frozen=True)
class _Layer:
    """A layer's weights; ``kv`` and ``kv_norms`` are those of keys and values alone."""

    norm: FusedNorm
    qkv: PackedLinear | QuantizedLinear
    norms: HeadNorms
    behind: Behind
    kv: PackedLinear | QuantizedLinear
    kv_norms: HeadNorms


@dataclass(eq=False)
class BlockRows(Segment):
    """The rows of a block, each of which sees those before it.

    Args:
        more: rows that the same call commits before.
    """

    more: int = 0

    @property
    def prefix(self) -> int:
        return self.kv.length + self.more


class MutualRows(BlockRows):
    """Those of a block whose rows all see one another."""

    @property
    def _rows(self) -> tuple[Ints, int, Ints, Ints]:
        found = super()._rows
        found[0][:, 0] = len(self.tree)
        return found


class BlockProgram(Steps):
    """What `BlockHead.context`, `keys_values` and `forward` do, the output layer, and what `BlockEngine.slots` makes of
    its logits, step by step, in bfloat16 on a CPU, with weights in 8 bits: drafts needn't be exact.

    Its stretches: anchors are looked up; rows of the target's hidden states; rows of blocks; and what is picked of
    these, of a head with a Markov part one place of all texts after another.

    Args:
        head: in bfloat16, with sizes that `fits` allows; it stays as it is.
        embedding: given token ids int64[n], bfloat16[n, hidden size].
        output: makes logits.
        token_map: int64[tokens that the head knows], the target's ids of them.
    """

    def __init__(
        self, head: BlockHead, embedding: Callable[[torch.Tensor], torch.Tensor],
        output: PackedLinear | QuantizedLinear, token_map: Ints,
    ) -> None:  # fmt: skip
        self._sizes = sizes = head.sizes
        scale = sizes.head_dim**-0.5
        self._heads = OwnHeads(sizes.num_heads, sizes.num_kv_heads, sizes.head_dim, scale, sizes.window)
        self._kv_heads = OwnHeads(0, sizes.num_kv_heads, sizes.head_dim, scale, sizes.window)
        packing: Any = Packing(QuantizedLinear)
        layers: list[Any] = list(head.layers)
        self._layers = [self._packed(layer, packing) for layer in layers]
        self._fc, self._hidden_norm, self._norm = packing.pack(head.fc), *map(FusedNorm, (head.hidden_norm, head.norm))
        self._rotary, self._output, self._map = RotaryTables([head.rotary]), output, np.ascontiguousarray(token_map)
        self._embedding, mask = embedding, head.mask_embedding
        self._mask = embedding(torch.tensor([sizes.mask_token])) if mask is None else mask.detach()[None].clone()
        self._markov, self._kept = head.markov, min(CANDIDATES, output.num_outputs)
        self._second = None if head.markov is None else packing.pack(head.markov.second)
        self._tree = TokenTree.chain(0, [0] * (sizes.block_size - 1))
        self._rows_of_block = BlockRows if sizes.causal else MutualRows
        wide = sizes.num_heads * sizes.head_dim
        super().__init__(max(head.fc.in_features, sizes.hidden_size, sizes.intermediate_size, wide, sizes.markov_rank))

    @staticmethod
    def fits(sizes: BlockSizes, features: Features) -> bool:
        """Whether it can run heads of these sizes beside that target: one in bfloat16 on a CPU, whose output layer is
        packed. Not those that see a window to both sides, those whose Markov part isn't the plain one, or that have
        convolutions or scales, as DFlash 2's."""
        wide, narrow = sizes.num_heads * sizes.head_dim, sizes.num_kv_heads * sizes.head_dim
        columns = [sizes.hidden_size, sizes.intermediate_size, wide, 2 * narrow]
        packed = isinstance(features.output_layer, PackedLinear | QuantizedLinear)
        return (
            features.device.type == "cpu"
            and features.dtype is torch.bfloat16
            and not features.recorded
            and (packed or sizes.own_output or sizes.draft_vocab_size is not None)
            and not any(count % BLOCK for count in columns)
            and (sizes.causal or sizes.window is None)
            and sizes.markov == "vanilla"
            and not sizes.conv_taps
            and (sizes.embedding_scale, sizes.logit_scale, sizes.softcap) == (1, 1, None)
        )

    @staticmethod
    def _packed(layer: BlockLayer, packing: Any) -> _Layer:
        wide = layer.q_proj.out_features
        qkv, query, key = packing.pack(layer.q_proj, layer.kv_proj), FusedNorm(layer.q_norm), FusedNorm(layer.k_norm)
        heads, kv_heads = wide // layer.head_dim, layer.kv_proj.out_features // (2 * layer.head_dim)
        behind = Behind(
            packing.pack(layer.o_proj), FusedNorm(layer.post_attention_layernorm), packing.pack_halves(layer.gate_up),
            packing.pack(layer.down_proj),
        )  # fmt: skip
        return _Layer(
            FusedNorm(layer.input_layernorm), qkv, HeadNorms(query, key, heads, kv_heads), behind,
            outputs_from(qkv, wide), HeadNorms(query, key, 0, kv_heads),
        )  # fmt: skip

    # -- runs ------------------------------------------------------------------------------------------------------

    def read(self, kv: SequenceKV, states: torch.Tensor) -> None:
        """Commits the rows of the next tokens of a text, where the target's hidden states are bfloat16[taps, rows, its
        hidden size]."""
        count = states.shape[1]
        kv.reserve(kv.length + count)
        self.reserve(count)
        self.run_all([self._reading([kv], [states])])
        kv.length += count

    def guess(
        self, kvs: SequenceOf[SequenceKV], states: SequenceOf[torch.Tensor], anchors: Ints,
        divisors: NDArray[np.float32] | None,
    ) -> None:  # fmt: skip
        """A block behind each text: `said` and, if there are divisors, `slots` are of it then.

        Args:
            kvs: of the texts.
            states: of each text, those of the tokens that weren't read yet, see `read`: that is done first.
            anchors: int64[texts].
            divisors: float32[texts], of logits.
        """
        size, texts, more = self._sizes.block_size, len(kvs), [own.shape[1] for own in states]
        for kv, count in zip(kvs, more, strict=True):
            kv.reserve(kv.length + count + size)
        self.reserve(max(texts * size, sum(more)))
        embedded = self._rows.residual[: texts * size].view(texts, size, -1)
        embedded[:, 1:] = self._mask
        blocks = [
            self._rows_of_block(kv, self._tree, 0, size * text, more=count)
            for text, (kv, count) in enumerate(zip(kvs, more, strict=True))
        ]
        turns = self._rotary.at(inputs_of(blocks)[1], end_of(blocks))
        stretches = [self._reading(kvs, states)] if any(more) else []
        if self._looked_up:
            stretches.append(Stretch(0, self._looked_up, (), turns.of(texts), anchors))
        else:
            embedded[:, 0] = self._embedding(torch.from_numpy(anchors))
        stretches.append(Stretch(self._guessing, self._picking, blocks, turns))
        if divisors is not None:
            stretches.append(self._picked(blocks, turns, anchors, divisors))
        self.run_all(stretches)
        for kv, count in zip(kvs, more, strict=True):
            kv.length += count

    def said(self, texts: int) -> tuple[torch.Tensor, torch.Tensor]:
        """See `BlockEngine.guess`; they are overwritten by the next call."""
        logits = self._guesses(self._logits, texts)[..., : self._output.num_outputs]
        return self._guesses(self._rows.normed, texts), logits

    def slots(self, texts: int) -> list[Slots]:
        """See `BlockEngine.slots`."""
        if self._markov is None:
            values, sums, divisors = (
                self._guesses(part, texts).numpy() for part in (self._values, self._sums, self._divisors)
            )
            tokens, probs = self._map[self._guesses(self._tokens_kept, texts).numpy()], np.exp(values / divisors - sums)
            return [Slots.independent(*own) for own in zip(tokens, probs.astype(np.float64), strict=True)]
        shape = texts, self._sizes.num_guesses, self._kept, self._kept
        parts = [part[:texts].numpy().copy().reshape(shape) for part in self._found]
        return [Slots(*own) for own in zip(*parts, strict=True)]

    def _guesses(self, rows: torch.Tensor, texts: int) -> torch.Tensor:
        """[texts, guesses, columns], of the rows of blocks."""
        size = self._sizes.block_size
        return rows[: texts * size].view(texts, size, -1)[:, size - self._sizes.num_guesses :]

    def _reading(self, kvs: SequenceOf[SequenceKV], states: SequenceOf[torch.Tensor]) -> Stretch:
        """The rows of hidden states of each text."""
        segments, start = list[Segment](), 0
        for kv, own in zip(kvs, states, strict=True):
            end = start + own.shape[1]
            self._read[:, start:end] = own
            if start < end:
                segments.append(Segment(kv, TokenTree.chain(0, [0] * (end - start - 1)), 0, start))
            start = end
        turns = self._rotary.at(inputs_of(segments)[1], end_of(segments))
        return Stretch(self._looked_up, self._guessing, segments, turns)

    def _picked(self, blocks: list[BlockRows], turns: Turns, anchors: Ints, divisors: NDArray[np.float32]) -> Stretch:
        """What finds the slots: of a row for each row of a block, or for each text."""
        if self._markov is None:
            divisors = divisors.repeat(self._sizes.block_size)
            self._divisors[: len(divisors), 0] = torch.from_numpy(divisors)
            return Stretch(self._picking, len(self._steps), blocks, turns)
        self._divisors[: len(divisors), 0] = torch.from_numpy(divisors)
        self._before[: len(anchors), 0] = torch.from_numpy(anchors)
        return Stretch(self._picking, len(self._steps), (), turns.of(len(anchors)), anchors)

    # -- steps -----------------------------------------------------------------------------------------------------

    def build(self) -> list[Step]:
        sizes, heads = self._sizes, self._heads
        self._rows = at = self.rows_of_a_layer(sizes.hidden_size, sizes.intermediate_size, heads)
        self._logits = self.room(self._output.num_results)
        self._divisors = self.room(1, torch.float32)
        anchors = at.residual[:: sizes.block_size]
        steps = self.embed(self._embedding, anchors) if self.embeds(self._embedding) else []
        self._looked_up = len(steps)
        steps += self._read_states()
        self._guessing, update = len(steps), None
        for number, layer in enumerate(self._layers):
            steps += self.norm(layer.norm, at.residual, at.normed, layer.qkv, update)
            steps += self.multiply(layer.qkv, at.normed, at.qkv)
            steps += self.norm_heads(layer.norms, at.qkv)
            steps += self.rotary(number, heads, at.qkv, at.queries)
            steps += self.after_rotary(number, heads, layer.behind, at)
            update = at.added
        steps += self.norm(self._norm, at.residual, at.normed, self._output, update)
        steps += self.multiply(self._output, at.normed, self._logits)
        self._picking = len(steps)
        return steps + (self._pick() if self._markov is None else self._follow(self._markov))

    def _read_states(self) -> list[Step]:
        """Keys and values of all layers, of the target's hidden states [taps, rows, width], which are given in
        `_read`."""
        sizes = self._sizes
        width = sizes.target_hidden_size or sizes.hidden_size
        states, context, normed = (self.room(n) for n in (len(sizes.taps) * width, *[sizes.hidden_size] * 2))
        narrow = 2 * sizes.num_kv_heads * sizes.head_dim
        kv, nothing = self.room(narrow), self.room(0, torch.float32)
        self._read = states.view(len(states), -1, width).transpose(0, 1)
        steps = self.prepare(self._fc, states) + self.multiply(self._fc, states, context)
        steps += self.norm(self._hidden_norm, context, normed, self._layers[0].kv)  # all layers take it in one form
        for number, layer in enumerate(self._layers):
            steps += self.multiply(layer.kv, normed, kv)
            steps += self.norm_heads(layer.kv_norms, kv)
            steps += self.rotary(number, self._kv_heads, kv, nothing)
        return steps

    def _pick(self) -> list[Step]:
        self._values, self._sums = self.room(self._kept, torch.float32), self.room(1, torch.float32)
        self._tokens_kept = self.room(self._kept, torch.int64)
        vocab = self._output.num_outputs
        found = self._values, self._tokens_kept, self._sums
        return self.most_probable(self._logits, vocab, *found, self._divisors)

    def _follow(self, markov: Markov) -> list[Step]:
        """One place after another, of all texts at once."""
        sizes, second, kept = self._sizes, self._second, self._kept
        assert second is not None
        places, rank, vocab = sizes.num_guesses, sizes.markov_rank, self._output.num_outputs
        told, added, self._before = self.room(rank), self.room(second.num_results), self.room(kept, torch.int64)
        cells = self._capacity // sizes.block_size, places * kept * kept  # those that aren't written stay 0
        kinds = torch.int64, torch.float64, torch.int64
        self._found = tokens, probs, ranks = [torch.zeros(cells, dtype=kind) for kind in kinds]
        stride = 2 * self._logits.shape[1]
        steps = self.embed(markov.first, told) + self.prepare(second, told)
        for place in range(places):
            cell, row = 8 * kept * kept * place, sizes.block_size - places + place
            fields = FollowStep(
                logits=self._logits.data_ptr() + stride * row, logits_stride=stride * sizes.block_size,
                added=added.data_ptr(), added_stride=2 * added.shape[1], vocab=vocab, kept=kept,
                befores=kept if place else 1, places=places, tokens=tokens.data_ptr() + cell,
                probs=probs.data_ptr() + cell, ranks=ranks.data_ptr() + cell, before=self._before.data_ptr(),
                map=self._map.ctypes.data, first=self._at(markov.first.weight, torch.bfloat16, sizes.vocab_size, rank),
                second=self._at(markov.second.weight, torch.bfloat16, vocab, rank), rank=rank, told=told.data_ptr(),
                divisors=self._divisors.data_ptr(), form=self._form(second),
            )  # fmt: skip
            steps += [*self.multiply(second, told, added), (FOLLOW, fields)]
        return steps
