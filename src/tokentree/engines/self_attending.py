"""An engine on a model that attends by itself, under a dense mask: everywhere but on CPUs the default."""

from __future__ import annotations

from collections.abc import Sequence as SequenceOf
from typing import Any, Self

import torch
from transformers import PreTrainedModel

from tokentree.engines.cpu.attention import ForwardKV, dense_masks
from tokentree.engines.cpu.prepare import set_attention
from tokentree.engines.kv import KVLayout
from tokentree.engines.model_engine import ModelEngine
from tokentree.engines.plan import EnginePlan
from tokentree.engines.prepared import Prepared
from tokentree.engines.segment import Segment
from tokentree.exclusive import exclusive


class SelfAttendingEngine(ModelEngine):
    """Verifies trees through the model's own forward. A text is plain's up to ties."""

    attention = "sdpa"

    @classmethod
    def of(cls, prepared: Prepared, plan: EnginePlan, prefix_bytes: int) -> Self:
        set_attention(prepared.copy, plan.own_attention)
        if plan.packs:
            prepared.pack()
        return cls(prepared, KVLayout(prepared.shapes, prepared.dtype, prepared.device), prefix_bytes)

    @property
    def model(self) -> PreTrainedModel:
        return self._model

    def _run(self, segments: SequenceOf[Segment], padding: int, options: dict[str, Any]) -> Any:
        rows = sum(segment.count for segment in segments) + padding
        by_kind = dense_masks(segments, rows, self.facts, self.dtype, self.device)
        mask = by_kind if len(by_kind) > 1 else next(iter(by_kind.values()))
        return self._call(segments, padding, ForwardKV(segments, True, padding), mask, options)

    @exclusive
    def hidden_states_of(
        self, texts: SequenceOf[SequenceOf[int]], places: SequenceOf[int] | None = None
    ) -> list[torch.Tensor]:
        """`hidden_states` of several texts; elsewhere than on a CPU they are read together, by the model's own
        forward."""
        if self.device.type == "cpu":
            return super().hidden_states_of(texts, places)
        picked = [self.facts.num_layers] if places is None else places
        padded = torch.zeros(len(texts), max(map(len, texts)), dtype=torch.int64)
        for row, ids in zip(padded, texts, strict=True):
            row[: len(ids)] = torch.tensor(ids)
        options = {"logits_to_keep": 1} if self._keeps_logits else {}
        # no row sees what stands behind it, and so no text what fills it up
        out = self._model(
            input_ids=padded.to(self.device), use_cache=False, output_hidden_states=True, return_dict=True, **options
        )
        states = torch.cat([out.hidden_states[place] for place in picked], -1)
        return [states[row, : len(ids)] for row, ids in enumerate(texts)]
