"""A Gemma 4 assistant on a target's keys and values, as an engine that drafts."""

from __future__ import annotations

import time
from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch.nn.functional import scaled_dot_product_attention

from tokentree.engines.cpu.attention import TREE, Rule, Sees, attend_rows, attending
from tokentree.engines.cpu.packing import Packing
from tokentree.engines.cpu.prepare import pack, set_attention
from tokentree.engines.cpu.quantized import QuantizedLinear
from tokentree.engines.drafting import Features
from tokentree.engines.output import TargetOutput
from tokentree.engines.segment import Segment, inputs_of
from tokentree.errors import PairingError
from tokentree.heads.assistant import AssistantHead
from tokentree.kernels.attention import SegmentRows
from tokentree.sequence import Sequence
from tokentree.tree import TokenTree

if TYPE_CHECKING:
    from tokentree.engines.kv_engine import KVEngine

FAMILIES = {"gemma4_text", "gemma4_unified_text"}  # of targets


class AssistantEngine:
    """What a draft model's drafter asks of an engine, answered by an assistant.

    It keeps nothing of a text but what it gave at the nodes of the current tree. So it has read what the target has
    read, and there is nothing to commit. The first token of a text counts as read, since nothing comes before it.

    Args:
        head: the assistant. It is packed, and not to be used elsewhere.
        target: the engine of its target.

    Attributes:
        vocab_size, context: as of any engine.

    Raises:
        PairingError: if the assistant doesn't fit the target.
    """

    def __init__(self, head: AssistantHead, target: KVEngine) -> None:
        self._layers = _layers_read(head, target)
        self.vocab_size, self.context = head.vocab_size, min(target.context, head.context)
        self._target, self._features = target, target.capture()
        self._head = _fast(head, self._features)
        self._given = dict[int, torch.Tensor]()  # by the ids of texts: [nodes, target's width]

    def prefill(self, seq: Sequence, upto: int | None = None) -> int:
        """Nothing: the target has read it."""
        return 0

    def committed(self, seq: Sequence) -> int:
        return max(1, self._target.committed(seq))

    @torch.inference_mode()
    def verify(
        self, seqs: SequenceOf[Sequence], trees: SequenceOf[TokenTree], firsts: SequenceOf[int] | None = None
    ) -> TargetOutput:
        """As `Engine.verify`, one level after another: what was given above a node comes from an earlier call."""
        started = time.perf_counter()
        firsts = [0] * len(seqs) if firsts is None else list(firsts)
        segments, known, rows = list[_Readers](), list[torch.Tensor](), 0
        for seq, tree, first in zip(seqs, trees, firsts, strict=True):
            kv, above = self._target.rows_of(seq)
            segments.append(_Readers(kv, tree, first, rows, above=above))
            parents = tree.parents[first:].tolist()
            known.append(self._given[seq.id][parents] if first else self._target.hidden(seq)[-1:])
            rows += len(parents)
        ids, positions = (torch.from_numpy(numbers).to(self._features.device) for numbers in inputs_of(segments))
        with attending(_Attending(segments, self._layers)):
            logits, given = self._head(self._features.embedding(ids), torch.cat(known), positions)
        for seq, segment in zip(seqs, segments, strict=True):
            new = given[segment.start : segment.start + segment.count]
            self._given[seq.id] = torch.cat([self._given[seq.id], new]) if segment.first else new
        starts = [segment.start for segment in segments]
        return TargetOutput(logits, starts, firsts, time.perf_counter() - started)

    def commit(self, seqs: SequenceOf[Sequence], paths: SequenceOf[list[int]]) -> None:
        """Nothing is kept from tree to tree."""

    def release(self, seqs: SequenceOf[Sequence]) -> None:
        for seq in seqs:
            self._given.pop(seq.id, None)


@dataclass(eq=False)
class _Readers(Segment):
    """Nodes of a draft as rows that store nothing. All of them have the position of the draft's root, and see what
    stands before it: the committed rows of a text, and behind these the rows ``above``, of a branch."""

    above: list[int] = field(default_factory=list)

    def __post_init__(self) -> None:
        paths = np.tile(np.array([len(self.above), *self.above], np.int64), (self.count, 1))
        positions = np.full(self.count, self.prefix + len(self.above), np.int64)
        self._described = paths, paths.ctypes.data, self.tree.tokens[self.first :].copy(), positions

    def described(self, layer: int) -> SegmentRows:
        (keys, values, keys_step, values_step), (paths, paths_at, _, _) = self.kv.addresses(layer), self._rows
        return SegmentRows(
            keys=keys, values=values, capacity=self.kv.capacity, prefix=self.prefix, rows=self.count,
            start=self.start, paths=paths_at, longest=paths.shape[1] - 1, chain=0, first=0, keys_layer=keys_step,
            values_layer=values_step,
        )  # fmt: skip

    def seen(self, layer: int, window: int | None) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values [1, heads, rows, width] of the rows that are seen."""
        rows = torch.tensor([*range(self.prefix), *self.above][-(window or 0) :], device=self.kv.layout.device)
        keys, values = (stored[None].index_select(2, rows) for stored in self.kv.layer(layer))
        return keys, values


class _Attending:
    """`attention.Attending` of one forward.

    Args:
        segments: its rows.
        layers: of the target, that its layers read one after another.
    """

    def __init__(self, segments: SequenceOf[_Readers], layers: SequenceOf[int]) -> None:
        self._segments, self._layers = segments, iter(layers)

    def attend(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, rule: Rule) -> torch.Tensor:
        """[rows, heads, value width] of queries [heads, rows, width]; keys and values are the target's."""
        layer, layout = next(self._layers), self._segments[0].kv.layout
        heads, _, value_width = layout.shapes[layer]
        if layout.blocked:
            return attend_rows(self._segments, layer, query.float(), heads, value_width, rule)
        found = list[torch.Tensor]()
        for segment in self._segments:
            own = query[None, :, segment.start : segment.start + segment.count]
            keys, values = segment.seen(layer, rule.window)
            found.append(scaled_dot_product_attention(own, keys, values, scale=rule.scale, enable_gqa=True)[0])
        return torch.cat(found, 1).transpose(0, 1)

    def knows(self, window: int | None, chunk: int | None, sees: Sees) -> bool:
        """No masks are made."""
        return False

    def chose(self, indices: torch.Tensor) -> bool:
        """No index chooses."""
        return False


def _layers_read(head: AssistantHead, target: KVEngine) -> list[int]:
    """For each layer of ``head``, the last one of its kind in the target that has keys and values of its own.

    Raises:
        PairingError: if the head was made for another target.
    """
    config: Any = target.config.get_text_config()
    name, facts = target.facts.name, target.facts
    if config.model_type not in FAMILIES:
        raise PairingError(f"this assistant drafts for Gemma 4, and {name} is no such model")
    if head.target_hidden_size != facts.hidden_size:
        raise PairingError(
            f"this assistant reads hidden states of {head.target_hidden_size} numbers, and {name} has "
            f"{facts.hidden_size}: it was made for another model"
        )
    if head.vocab_size != target.vocab_size:
        raise PairingError(f"this assistant knows {head.vocab_size} tokens, and {name} has {target.vocab_size}")
    own = config.layer_types[: config.num_hidden_layers - config.num_kv_shared_layers]
    last = {kind: layer for layer, kind in enumerate(own)}
    for kind, (heads, width) in head.kv_sizes.items():
        if kind not in last:
            raise PairingError(f"this assistant reads a layer of the kind {kind}, and {name} has none")
        if target.layout.shapes[last[kind]] != (heads, width, width):
            stored = target.layout.shapes[last[kind]]
            raise PairingError(
                f"this assistant reads keys of {heads} heads x {width} in a layer of the kind {kind}, and those of "
                f"{name} have {stored[0]} x {stored[1]}: it was made for another model"
            )
    return [last[kind] for kind in head.kinds]


def _fast(head: AssistantHead, features: Features) -> AssistantHead:
    """``head`` where the target is, on the linear layers that the target's engine runs fastest for drafts. Where there
    are clusters, single rows of the output layer are read: it stays as it is."""
    head.to(features.device)
    set_attention(head.model, TREE)
    if features.device.type == "cpu":
        pack(head.model, Packing(QuantizedLinear), release=True)
    for name in ("pre_projection", "post_projection", *(["output"] if head.centroids is None else [])):
        setattr(head, name, features.linear(getattr(head, name).weight.detach(), None))
    return head
