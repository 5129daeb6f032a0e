"""An EAGLE head on the target's hidden states, as an engine that drafts (Li et al. 2024, arXiv:2401.15077)."""

from __future__ import annotations

import copy
from collections.abc import Sequence as SequenceOf
from typing import TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn
from torch.nn.functional import pad

from tokentree.engines.cpu.eagle_program import EagleProgram
from tokentree.engines.drafting import Features, HasHiddenStates
from tokentree.engines.gpu.recording import ROWS, Recordings, padded
from tokentree.engines.head_engine import HeadEngine, Known, beside, features_read
from tokentree.engines.head_engine import attend as attend_rows
from tokentree.engines.kv import KVLayout
from tokentree.engines.output import Logits
from tokentree.engines.segment import Segment, inputs_of
from tokentree.errors import PairingError
from tokentree.heads.eagle import EagleHead
from tokentree.tree import Ints

Head = TypeVar("Head", bound=EagleHead)


class EagleEngine(HeadEngine):
    """Drafts with an EAGLE head.

    Args:
        head: made for this target; it stays as it is.
        target: its engine.

    Raises:
        PairingError: if the head doesn't fit the target.
    """

    def __init__(self, head: EagleHead, target: HasHiddenStates) -> None:
        sizes, features = head.sizes, features_for(head, target)
        blocked = features.device.type == "cpu" and not features.recorded
        layout = KVLayout(
            ((sizes.num_kv_heads, sizes.head_dim, sizes.head_dim),), features.dtype, features.device, blocked=blocked,
            fixed=features.recorded,
        )  # fmt: skip
        super().__init__(target, features, sizes.taps, sizes.hidden_size, sizes.context, layout)
        self._head = fast(head, features)
        own = self._head.embed_tokens
        self._embedding = features.embedding if own is None else own
        whole = converted(head, features)
        fits = blocked and EagleProgram.fits(whole)
        self._program = EagleProgram(whole, self._embedding) if fits else None
        self._recordings: Recordings[tuple[torch.Tensor, torch.Tensor]] = Recordings()
        self._spare_rows = ROWS[-1] if features.recorded else 0  # a recording may write so many more than there are

    def _fused(self, states: torch.Tensor) -> torch.Tensor:
        return self._head.fuse(beside(states))

    def _best(self) -> tuple[tuple[NDArray[np.float32], Ints] | None, NDArray[np.float32] | None]:
        return (None, None) if self._program is None else (self._program.best, self._program.log_sums)

    def _joined(self, parts: list[Known]) -> Known:
        if len(parts) == 1 and self._program is not None and self._program.fuses:
            return parts[0]
        return super()._joined(parts)

    def _forward(self, known: Known, segments: SequenceOf[Segment]) -> tuple[torch.Tensor, Logits]:
        recorded = self._features.recorded and len(segments) == 1
        if recorded and len(known) <= ROWS[-1]:
            return self._replay(known, segments[0])
        tokens, positions = inputs_of(segments)
        if self._program is not None:
            given, said = self._program.forward(tokens, known, positions, segments)
            return given, self._head.logits(given, self._features.output_layer) if said is None else said
        where = torch.from_numpy(positions).to(known.device)
        embedded = self._embedding(torch.from_numpy(tokens).to(known.device))
        given = self._head(embedded, known, lambda *heads: self._turned(segments, where, *heads))
        return given, self._head.logits(given, self._features.output_layer)

    @torch.inference_mode()
    def _store(self, known: Known, segment: Segment) -> None:
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
                return attend_rows(query.transpose(0, 1), keys, values, mask, query.shape[2] ** -0.5).flatten(1)

            given = self._head(self._embedding(ids), known, attend)
            return given, self._head.logits(given, self._features.output_layer)

        inputs = [torch.from_numpy(numbers), mask, pad(known, (0, 0, 0, rows - count))]
        given, logits = self._recordings.play(segment.kv, rows, inputs, known.device, run)
        return given[:count], logits[:count]

    def _turned(
        self, segments: SequenceOf[Segment], positions: torch.Tensor, query: torch.Tensor, key: torch.Tensor,
        value: torch.Tensor,
    ) -> torch.Tensor:  # fmt: skip
        """[rows, heads x width], of queries, keys and values [rows, heads, width]."""
        parts = turned(self._head, positions, query, key, value)
        return self._attend(segments, *parts, query.shape[2] ** -0.5).flatten(1)


def features_for(head: EagleHead, target: HasHiddenStates) -> Features:
    """What ``head`` reads of ``target``.

    Raises:
        PairingError: if it doesn't fit.
    """
    sizes, features = head.sizes, features_read(head.sizes, target, "EAGLE")
    if not sizes.own_output and sizes.hidden_size != features.hidden_size:
        raise PairingError("this EAGLE head has no output layer, and the target's takes another width")
    if head.embed_tokens is None and sizes.hidden_size != features.hidden_size:
        raise PairingError("this EAGLE head has no embedding, and the target's has another width")
    return features


def turned(
    head: EagleHead, positions: torch.Tensor, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Queries, keys and values [heads, rows, width], of such [rows, heads, width] that aren't turned yet."""
    query, key = head.rotate(query, positions), head.rotate(key, positions)
    return query.transpose(0, 1), key.transpose(0, 1), value.transpose(0, 1)


def fast(head: Head, features: Features) -> Head:
    """A copy of ``head`` on the linear layers that the target's engine runs fastest, in its type."""
    made = converted(head, features)
    for module in list(made.modules()):
        for name, layer in list(module.named_children()):
            if isinstance(layer, nn.Linear):
                setattr(module, name, features.linear(layer.weight.detach(), layer.bias))
    return made


def converted(head: Head, features: Features) -> Head:
    """A copy of ``head`` in the target's type, where the target is."""
    made = copy.deepcopy(head).to(features.device, features.dtype).requires_grad_(False).eval()
    made.rotary = copy.deepcopy(head.rotary).to(features.device)  # its frequencies need float32
    return made
