"""What engines share that draft with a head on the target's hidden states, one token after another."""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch.nn.functional import scaled_dot_product_attention

from tokentree.engines.drafting import Features, HasHiddenStates
from tokentree.engines.kv import KVLayout, SequenceKV, Storages
from tokentree.engines.output import Logits, TargetOutput
from tokentree.engines.radix import shared_length
from tokentree.engines.segment import Segment
from tokentree.errors import PairingError
from tokentree.exclusive import exclusive
from tokentree.sequence import Sequence
from tokentree.tree import Ints, TokenTree

PREFILL_ROWS = 256

Known = torch.Tensor  # [rows, hidden size]; or the target's hidden states, [taps, rows, hidden size]


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


class _Sizes(Protocol):
    """Of a head, where they concern its target."""

    @property
    def taps(self) -> SequenceOf[int]: ...
    @property
    def hidden_size(self) -> int: ...
    @property
    def target_hidden_size(self) -> int | None: ...
    @property
    def vocab_size(self) -> int: ...


def features_read(sizes: _Sizes, target: HasHiddenStates, kind: str) -> Features:
    """What a head of these sizes reads of ``target``; ``kind`` is what the head is called.

    Raises:
        PairingError: if it was made for another model.
    """
    features, width = target.capture(sizes.taps), sizes.target_hidden_size or sizes.hidden_size
    if width != features.hidden_size:
        raise PairingError(
            f"this {kind} head reads hidden states of {width} numbers, and the target has {features.hidden_size}: it "
            "was made for another model"
        )
    if sizes.vocab_size != target.vocab_size:
        raise PairingError(
            f"this {kind} head is for a target with {sizes.vocab_size} tokens, and this one has {target.vocab_size}"
        )
    return features


def beside(states: torch.Tensor) -> torch.Tensor:
    """[rows, taps x hidden size], of hidden states [taps, rows, hidden size]."""
    return states.transpose(0, 1).flatten(1)


class HeadEngine(ABC):
    """What a draft model's drafter asks of an engine, answered by a head; a subclass has its forward.

    Rows of tokens that the target has accepted are computed from its hidden states. The rows of a tree below are
    computed from what the head gave at their parents; when a step is over they are dropped, and those that were
    accepted come again, from the target's.

    The first token of a text has no row, since nothing comes before it: it counts as committed.

    Args:
        target: its engine.
        features: what that says of its hidden states.
        taps: which of these the head reads.
        width: of what is known of a position.
        context: the most positions that the head can take.
        layout: of its KV.
    """

    def __init__(
        self, target: HasHiddenStates, features: Features, taps: SequenceOf[int], width: int, context: int,
        layout: KVLayout,
    ) -> None:  # fmt: skip
        self.vocab_size, self.context = target.vocab_size, min(target.context, context)
        self.lock, self._target, self._features, self._taps, self._width = target.lock, target, features, taps, width
        self._storages = Storages(layout)
        self._spare_rows = 0
        self._states: dict[int, _State] = {}

    @abstractmethod
    def _fused(self, states: torch.Tensor) -> torch.Tensor:
        """[rows, hidden size], what is known of positions where the target's hidden states are ``states`` [taps, rows,
        hidden size]."""

    @abstractmethod
    def _forward(self, known: Known, segments: SequenceOf[Segment]) -> tuple[torch.Tensor, Logits]:
        """What is known of the next positions [rows, hidden size], and logits [rows, tokens that the head knows]."""

    @abstractmethod
    def _store(self, known: Known, segment: Segment) -> None:
        """Writes the KV of rows of which nothing else is wanted."""

    def _above(self, given: torch.Tensor, parents: list[int]) -> torch.Tensor:
        """[nodes, hidden size], what is known of the positions before drafted nodes: what the head has ``given`` at
        their ``parents``."""
        return given[parents]

    def _best(self) -> tuple[tuple[NDArray[np.float32], Ints] | None, NDArray[np.float32] | None]:
        """What the last forward found of `TargetOutput.best_known` and `TargetOutput.log_sums`."""
        return None, None

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

    @exclusive
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
                known.append(self._above(state.known, drafted))
            starts.append(rows)
            rows += len(tree) - first
        given, logits = self._forward(self._joined(known), segments)
        for seq, segment in zip(seqs, segments, strict=True):
            state, new = self._state(seq), given[segment.start : segment.start + segment.count]
            state.known = torch.cat([state.known[: segment.first], new]) if segment.first else new
        return TargetOutput(logits, starts, firsts, time.perf_counter() - started, *self._best())

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
            nothing = torch.empty(0, self._width, dtype=self._features.dtype)
            self._states[seq.id] = _State(seq, self._storages.take(rows), nothing.to(self._features.device))
        return self._states[seq.id]

    def _read(self, seq: Sequence, first: int, end: int) -> torch.Tensor:
        """[taps, n, its hidden size], the target's hidden states at positions ``first`` to ``end``."""
        return self._target.hidden_rows(seq, self._taps, first, end)

    def _joined(self, parts: list[Known]) -> Known:
        """``parts`` behind one another."""
        return torch.cat([x if x.ndim == 2 else self._fused(x) for x in parts])

    def _attend(
        self, segments: SequenceOf[Segment], query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float,
        layer: int = 0,
    ) -> torch.Tensor:  # fmt: skip
        """[rows, heads, value width], of queries [heads, rows, width], keys and values [KV heads, rows, width] of all
        rows in a ``layer``, which are stored."""
        from tokentree.engines.cpu.attention import ForwardKV, Rule, attend_rows, dense_mask  # it imports transformers

        if self._storages.layout.blocked:
            ForwardKV(segments, False).write(layer, key, value)
            return attend_rows(segments, layer, query.float(), len(key), value.shape[2], Rule(scale)).to(key.dtype)
        keys, values = ForwardKV(segments, True).update(key[None], value[None], layer)
        mask = dense_mask(segments, query.shape[1], None, query.dtype, query.device)
        return attend(query, keys[0], values[0], mask, scale)


def attend(
    query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, mask: torch.Tensor, scale: float
) -> torch.Tensor:  # fmt: skip
    """[rows, heads, width], of queries [heads, rows, width] over keys and values [KV heads, columns, width]."""
    out = scaled_dot_product_attention(query[None], keys[None], values[None], mask, scale=scale, enable_gqa=True)
    return out[0].transpose(0, 1)
