"""Engines whose forward over the tree of one text is one graph: recorded on a GPU, or compiled by torch."""

from __future__ import annotations

from collections.abc import Sequence as SequenceOf
from typing import Self

import torch

from tokentree.engines.cpu.prepare import set_attention
from tokentree.engines.gpu.graph import Graph
from tokentree.engines.kv import KVLayout
from tokentree.engines.plan import EnginePlan
from tokentree.engines.prepared import Prepared
from tokentree.engines.segment import Segment, Upto
from tokentree.engines.self_attending import SelfAttendingEngine
from tokentree.errors import PairingError


class RecordedEngine(SelfAttendingEngine):
    """Plays a recording of the forward, or runs a compiled one, where a `Graph` fits. Elsewhere it is a
    `SelfAttendingEngine`.

    Args:
        prepared, layout, prefix_bytes: see `ModelEngine`.

    Raises:
        ModelError: if the forward can't be recorded, or compiled.
    """

    def __init__(self, prepared: Prepared, layout: KVLayout, prefix_bytes: int) -> None:
        super().__init__(prepared, layout, prefix_bytes)
        self.recorded = self.device.type == "cuda"
        self._graph = Graph(self._model, self.facts, self._noted, self.traced)
        self._graph.check(layout)

    @classmethod
    def of(cls, prepared: Prepared, plan: EnginePlan, prefix_bytes: int) -> Self:
        set_attention(prepared.copy, plan.own_attention)
        return cls(prepared, KVLayout(prepared.shapes, prepared.dtype, prepared.device, fixed=True), prefix_bytes)

    @property
    def execution(self) -> str:
        return "one recording"

    def _forward(self, segments: SequenceOf[Segment], upto: Upto, rows: int | None = None) -> torch.Tensor:
        if upto == "kv" or not self._graph.fits(segments):
            return super()._forward(segments, upto, rows)
        logits, states = self._graph.forward(segments)
        self._keep(segments, states)
        return logits[:rows]

    def _capture(self, places: list[int]) -> None:
        self._graph.recordings.forget()
        super()._capture(places)


class CompiledEngine(RecordedEngine):
    """One whose graph torch compiles. It has the last hidden state alone."""

    traced = True

    @property
    def execution(self) -> str:
        return "one graph"

    def _states(self) -> list[torch.Tensor]:
        state = self._graph.head_input()
        return [state for _ in self._places]

    def _capture(self, places: list[int]) -> None:
        if places != [self.facts.num_layers]:
            raise PairingError("with compile=True, only the last hidden state is there: leave it out")
        self._graph.recordings.forget()
