"""A target's own layer for multi-token prediction, as an engine that drafts."""

from __future__ import annotations

from collections.abc import Sequence as SequenceOf
from typing import Any

import torch

from tokentree.engines.cpu.attention import TREE, Rule, Sees, attending
from tokentree.engines.cpu.packing import Packing
from tokentree.engines.cpu.prepare import pack, set_attention
from tokentree.engines.cpu.quantized import QuantizedLinear
from tokentree.engines.drafting import Features, HasHiddenStates
from tokentree.engines.head_engine import HeadEngine, Known
from tokentree.engines.kv import KVLayout
from tokentree.engines.output import Logits
from tokentree.engines.segment import Segment, inputs_of
from tokentree.errors import ModelError, PairingError
from tokentree.heads.mtp import MtpHead


class MtpEngine(HeadEngine):
    """Runs the layer for one token after another.

    Args:
        head: of this target. It is packed, and not to be used elsewhere.
        target: its engine.

    Raises:
        PairingError: if the head doesn't fit the target.
        ModelError: if this library can't attend for it.
    """

    def __init__(self, head: MtpHead, target: HasHiddenStates) -> None:
        features = target.capture()
        if head.hidden_size != features.hidden_size:
            raise PairingError(
                f"this layer for multi-token prediction reads hidden states of {head.hidden_size} numbers, and the "
                f"target has {features.hidden_size}"
            )
        self._head = _fast(head, features)
        layout = KVLayout(
            (_kv_shape(self._head, features),), features.dtype, features.device, blocked=features.device.type == "cpu"
        )
        super().__init__(target, features, (features.num_layers,), features.hidden_size, target.context, layout)

    def _fused(self, states: torch.Tensor) -> torch.Tensor:
        return states[0]

    def _forward(self, known: Known, segments: SequenceOf[Segment]) -> tuple[torch.Tensor, Logits]:
        given = self._given(known, segments)
        return given, self._features.output_layer(given)

    @torch.inference_mode()
    def _store(self, known: Known, segment: Segment) -> None:
        self._given(known, [segment])

    def _given(self, known: Known, segments: SequenceOf[Segment]) -> torch.Tensor:
        """What is known of the next positions, [rows, hidden size]."""
        ids, positions = (torch.from_numpy(numbers).to(known.device) for numbers in inputs_of(segments))

        def attend(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, rule: Rule) -> torch.Tensor:
            return self._attend(segments, query, key, value, rule.scale)

        with attending(_Attending(attend)):
            return self._head(self._features.embedding(ids), known, positions)  # type: ignore[no-any-return]


class _Attending:
    """`attention.Attending` of a layer that sees all that is before a row.

    Args:
        attend: given queries, keys, values and a rule.
    """

    def __init__(self, attend: Any) -> None:
        self._attend = attend

    def attend(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, rule: Rule) -> torch.Tensor:
        if rule != Rule(rule.scale, masked=rule.masked):
            raise ModelError(
                "its layer for multi-token prediction doesn't see all tokens alike: this can't be drafted with"
            )
        found: torch.Tensor = self._attend(query, key, value, rule)
        return found

    def knows(self, window: int | None, chunk: int | None, sees: Sees) -> bool:
        return window is None and chunk is None

    def chose(self, indices: torch.Tensor) -> bool:
        """Whatever an index chooses, all is seen: what is drafted need not be what the layer says."""
        return True


@torch.inference_mode()
def _kv_shape(head: MtpHead, features: Features) -> tuple[int, int, int]:
    """KV heads, key width and value width, as its attention is given them."""
    shapes = list[tuple[int, int, int]]()

    def note(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, rule: Rule) -> torch.Tensor:
        shapes.append((len(key), key.shape[2], value.shape[2]))
        return value.new_zeros(query.shape[1], len(query), value.shape[2])

    rows = torch.zeros(4, head.hidden_size, dtype=features.dtype, device=features.device)
    try:
        with attending(_Attending(note)):
            head(rows, rows, torch.arange(4, device=features.device))
    except (RuntimeError, TypeError, ValueError, LookupError, AttributeError) as error:
        if isinstance(error, ModelError):
            raise
        raise ModelError(f"the layer for multi-token prediction can't be run: {' '.join(str(error).split())}") from None
    if len(shapes) != 1:
        raise ModelError("the layer for multi-token prediction doesn't attend as transformers' layers do")
    return shapes[0]


def _fast(head: MtpHead, features: Features) -> MtpHead:
    """``head`` where the target is, on the linear layers that the target's engine runs fastest for drafts."""
    head.to(features.device)
    set_attention(head.model, TREE)
    if features.device.type == "cpu":
        pack(head.model, Packing(QuantizedLinear), release=True)
    weight: Any = head.projection.weight
    head.projection = features.linear(weight.detach(), None)  # type: ignore[assignment]
    return head
