"""An EAGLE head on the target's hidden states, as an engine that drafts (Li et al. 2024, arXiv:2401.15077)."""

from __future__ import annotations

import copy
import time
from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import nn
from torch.nn.functional import pad, scaled_dot_product_attention

from tokentree.engines.base import Features, HasHiddenStates, Logits, TargetOutput
from tokentree.engines.cpu.eagle_program import EagleProgram
from tokentree.engines.gpu.recording import ROWS, Recordings, padded
from tokentree.engines.kv import KVLayout, SequenceKV, Storages
from tokentree.engines.radix import shared_length
from tokentree.engines.segment import Segment, inputs_of
from tokentree.errors import PairingError
from tokentree.heads.eagle import EagleHead
from tokentree.sequence import Sequence
from tokentree.tree import TokenTree

PREFILL_ROWS = 256

Known = torch.Tensor | list[torch.Tensor]  # [rows, hidden size]; or the target's hidden states, of each tap


@dataclass(eq=False)
class _State:
    """What is kept of one sequence.

    Args:
        seq: the sequence.
        kv: row i is that of token i + 1; those are committed whose position the target has read.
        known: [nodes, hidden size], what the layer gave at the nodes of the current tree.
        chain: how many of these the target has read: they will be committed.
    """

    seq: Sequence
    kv: SequenceKV
    known: torch.Tensor
    chain: int = field(default=0)


class EagleEngine:
    """What a draft model's drafter asks of an engine, answered by a head.

    Rows of tokens that the target has accepted are computed from its hidden states. The rows of a tree below are
    computed from what the head gave at their parents; when a step is over they are dropped, and those that were
    accepted come again, from the target's.

    The first token of a text has no row, since nothing comes before it: it counts as committed.

    Args:
        head: made for this target; it stays as it is.
        target: its engine.

    Raises:
        PairingError: if the head doesn't fit the target.
    """

    def __init__(self, head: EagleHead, target: HasHiddenStates) -> None:
        sizes, features = head.sizes, target.capture(head.sizes.taps)
        if (sizes.target_hidden_size or sizes.hidden_size) != features.hidden_size:
            raise PairingError(
                f"this EAGLE head reads hidden states of {sizes.target_hidden_size or sizes.hidden_size} numbers, and "
                f"the target has {features.hidden_size}: it was made for another model"
            )
        if sizes.vocab_size != target.vocab_size:
            raise PairingError(
                f"this EAGLE head is for a target with {sizes.vocab_size} tokens, and this one has {target.vocab_size}"
            )
        if not sizes.own_output and sizes.hidden_size != features.hidden_size:
            raise PairingError("this EAGLE head has no output layer, and the target's takes another width")
        if head.embed_tokens is None and sizes.hidden_size != features.hidden_size:
            raise PairingError("this EAGLE head has no embedding, and the target's has another width")
        self.vocab_size, self.context = target.vocab_size, min(target.context, sizes.context)
        self._head, self._target, self._features = _fast(head, features), target, features
        own = self._head.embed_tokens
        self._embedding = features.embedding if own is None else own
        self._blocked, whole = features.device.type == "cpu" and not features.recorded, converted(head, features)
        fits = self._blocked and EagleProgram.fits(whole)
        self._program = EagleProgram(whole, self._embedding) if fits else None
        shape, dtype = (sizes.num_kv_heads, sizes.head_dim, sizes.head_dim), features.dtype
        self._recordings: Recordings[tuple[torch.Tensor, torch.Tensor]] = Recordings()
        layout = KVLayout((shape,), dtype, features.device, blocked=self._blocked, fixed=features.recorded)
        self._storages = Storages(layout)
        self._spare_rows = ROWS[-1] if features.recorded else 0  # a recording may write so many more than there are
        self._states: dict[int, _State] = {}

    def prefill(self, seq: Sequence, upto: int | None = None) -> int:
        """Commits rows as far as the target has read, but for the last one, with which the first tree begins; and of no
        more than the first ``upto`` tokens."""
        state, ready = self._state(seq), self._target.committed(seq) - 1
        ready = ready if upto is None else min(ready, upto - 1)
        if not state.kv.length:
            self._take_over(state, ready)
        while state.kv.length < ready:
            first = state.kv.length
            ids = seq.tokens[first + 1 : min(first + PREFILL_ROWS, ready) + 1]
            state.kv.reserve(first + len(ids) + self._spare_rows)
            segment = Segment(state.kv, TokenTree.chain(ids[0], ids[1:]), 0, 0)
            self._store(self._joined([self._read(seq, first, first + len(ids))]), segment)
            state.kv.commit(range(len(ids)))
        return 0

    def _take_over(self, state: _State, most: int) -> None:
        """Copies rows of a live text that begins alike: the prompt of other samples, the beginning of other beams."""
        best, rows = state, 0
        for other in self._states.values():
            alike = shared_length(np.array(state.seq.tokens), np.array(other.seq.tokens)) - 1
            if other is not state and min(alike, other.kv.length, most) > rows:
                best, rows = other, min(alike, other.kv.length, most)
        if rows:
            state.kv.copy_rows(best.kv, rows)

    def committed(self, seq: Sequence) -> int:
        return self._state(seq).kv.length + 1

    @torch.inference_mode()
    def verify(
        self, seqs: SequenceOf[Sequence], trees: SequenceOf[TokenTree], firsts: SequenceOf[int] | None = None
    ) -> TargetOutput:
        """As `Engine.verify`, one level after another: what was drafted above a node comes from an earlier call. Logits
        are those of the tokens that the head knows."""
        started = time.perf_counter()
        firsts = [0] * len(seqs) if firsts is None else list(firsts)
        segments, starts, known, rows = list[Segment](), list[int](), list[Known](), 0
        for seq, tree, first in zip(seqs, trees, firsts, strict=True):
            state = self._state(seq)
            state.kv.reserve(state.kv.length + len(tree) + self._spare_rows)
            state.chain = min(len(tree), self._target.committed(seq) - state.kv.length)
            segments.append(Segment(state.kv, tree, first, rows))
            if first < state.chain:
                known.append(self._read(seq, state.kv.length + first, state.kv.length + state.chain))
            if drafted := tree.parents[max(first, state.chain) :].tolist():
                known.append(state.known[drafted])
            starts.append(rows)
            rows += len(tree) - first
        given, logits = self._forward(self._joined(known), segments)
        for seq, segment in zip(seqs, segments, strict=True):
            state, new = self._state(seq), given[segment.start : segment.start + segment.count]
            state.known = torch.cat([state.known[: segment.first], new]) if segment.first else new
        program = self._program
        best, sums = (None, None) if program is None else (program.best, program.log_sums)
        return TargetOutput(logits, starts, firsts, time.perf_counter() - started, best, sums)

    def commit(self, seqs: SequenceOf[Sequence], paths: SequenceOf[list[int]]) -> None:
        """Keeps, of ``paths``, what was computed from the target's hidden states."""
        for seq, path in zip(seqs, paths, strict=True):
            state = self._state(seq)
            state.kv.commit(path[: state.chain])

    def release(self, seqs: SequenceOf[Sequence]) -> None:
        self._storages.give([self._states.pop(seq.id).kv for seq in seqs if seq.id in self._states])

    def _state(self, seq: Sequence) -> _State:
        if seq.id not in self._states:
            most = min(len(seq.prompt_ids) + seq.params.max_tokens, self.context)
            rows = self._storages.layout.first_rows(min(len(seq.tokens), self.context), most)
            nothing = torch.empty(0, self._head.sizes.hidden_size, dtype=self._features.dtype)
            self._states[seq.id] = _State(seq, self._storages.take(rows), nothing.to(self._features.device))
        return self._states[seq.id]

    def _read(self, seq: Sequence, first: int, end: int) -> list[torch.Tensor]:
        """The target's hidden states at positions ``first`` to ``end``, [n, its hidden size] for each tap."""
        return [self._target.hidden(seq, tap)[first:end] for tap in self._head.sizes.taps]

    def _joined(self, parts: list[Known]) -> Known:
        """``parts`` behind one another."""
        if len(parts) == 1 and self._program is not None and self._program.fuses:
            return parts[0]
        return torch.cat([x if isinstance(x, torch.Tensor) else self._head.fuse(torch.cat(x, -1)) for x in parts])

    def _forward(self, known: Known, segments: SequenceOf[Segment]) -> tuple[torch.Tensor, Logits]:
        """What is known of the next positions [rows, hidden size], and logits [rows, tokens that the head knows]."""
        recorded = self._features.recorded and len(segments) == 1
        if recorded and isinstance(known, torch.Tensor) and len(known) <= ROWS[-1]:
            return self._replay(known, segments[0])
        tokens, positions = inputs_of(segments)
        if self._program is not None:
            given, said = self._program.forward(tokens, known, positions, segments)
            return given, self._head.logits(given, self._features.output_layer) if said is None else said
        assert isinstance(known, torch.Tensor)
        where = torch.from_numpy(positions).to(known.device)
        embedded = self._embedding(torch.from_numpy(tokens).to(known.device))
        given = self._head(embedded, known, lambda *heads: self._attend(segments, where, *heads))
        return given, self._head.logits(given, self._features.output_layer)

    @torch.inference_mode()
    def _store(self, known: Known, segment: Segment) -> None:
        """Writes the KV of rows of which nothing else is wanted."""
        if self._program is None:
            self._forward(known, [segment])
        else:
            tokens, positions = inputs_of([segment])
            self._program.store(tokens, known, positions, [segment])

    def _replay(self, known: torch.Tensor, segment: Segment) -> tuple[torch.Tensor, torch.Tensor]:
        """`_forward` over one sequence, recorded."""
        from tokentree.engines.cpu.attention import dense_mask  # it imports transformers' model classes

        (keys, values), count, start = segment.kv.layer(0), len(known), segment.prefix + segment.first
        rows, capacity = padded(count), segment.kv.capacity
        numbers = np.zeros((3, rows), np.int64)
        numbers[0, :count], numbers[1, :count] = segment.tree.tokens[segment.first :], segment.positions
        numbers[2] = np.arange(start, start + rows)
        mask = dense_mask([segment], rows, None, known.dtype, torch.device("cpu"), capacity)

        def run(kept: list[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
            (ids, positions, places), mask, known = kept

            def attend(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
                query, key = self._head.rotate(query, positions), self._head.rotate(key, positions)
                keys.index_copy_(1, places, key.transpose(0, 1))
                values.index_copy_(1, places, value.transpose(0, 1))
                return _attend(query.transpose(0, 1), keys, values, mask)

            given = self._head(self._embedding(ids), known, attend)
            return given, self._head.logits(given, self._features.output_layer)

        inputs = [torch.from_numpy(numbers), mask, pad(known, (0, 0, 0, rows - count))]
        given, logits = self._recordings.play(segment.kv, rows, inputs, known.device, run)
        return given[:count], logits[:count]

    def _attend(
        self, segments: SequenceOf[Segment], positions: torch.Tensor, query: torch.Tensor, key: torch.Tensor,
        value: torch.Tensor,
    ) -> torch.Tensor:  # fmt: skip
        """[rows, heads x width], of queries, keys and values [rows, heads, width]."""
        from tokentree.engines.cpu.attention import ForwardKV, Rule, dense_mask  # likewise

        query, key = self._head.rotate(query, positions), self._head.rotate(key, positions)
        cache, scale = ForwardKV(segments, not self._blocked), query.shape[2] ** -0.5
        query, key, value = (x.transpose(0, 1) for x in (query, key, value))
        if self._blocked:
            return cache.attend(query, key, value, Rule(scale)).flatten(1).to(key.dtype)
        keys, values = cache.update(key[None], value[None], 0)
        mask = dense_mask(segments, query.shape[1], None, query.dtype, query.device)
        return _attend(query, keys[0], values[0], mask)


def _attend(query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """[rows, heads x width], of queries [heads, rows, width] over keys and values [KV heads, columns, width]."""
    out = scaled_dot_product_attention(query[None], keys[None], values[None], mask, enable_gqa=True)
    return out[0].transpose(0, 1).flatten(1)


def _fast(head: EagleHead, features: Features) -> EagleHead:
    """A copy of ``head`` on the linear layers that the target's engine runs fastest, in its type."""
    fast = converted(head, features)
    for name, layer in list(fast.named_children()):
        if isinstance(layer, nn.Linear):
            setattr(fast, name, features.linear(layer.weight.detach(), layer.bias))
    return fast


def converted(head: EagleHead, features: Features) -> EagleHead:
    """A copy of ``head`` in the target's type, where the target is."""
    made = copy.deepcopy(head).to(features.device, features.dtype).requires_grad_(False).eval()
    made.rotary = copy.deepcopy(head.rotary).to(features.device)  # its frequencies need float32
    return made
