"""An engine whose forward is one compiled call."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from collections.abc import Sequence as SequenceOf
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray

from tokentree.engines.cpu.program import Program
from tokentree.engines.guard import Unwatched
from tokentree.engines.kv import KVLayout
from tokentree.engines.kv_engine import KVEngine
from tokentree.engines.model_facts import Facts
from tokentree.engines.output import Logits
from tokentree.engines.segment import Segment, Upto, inputs_of
from tokentree.errors import ModelError
from tokentree.tree import Ints

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

    from tokentree.engines.plan import EnginePlan
    from tokentree.engines.prepared import Prepared


class ProgramEngine(KVEngine):
    """Verifies trees by a `Program`: on a CPU, for models of the families that have one.

    Args:
        program: the forward.
        facts: of the model.
        own: what it says by itself, see `own_forward`.
        config: gives its configuration.
        quantization, prefix_bytes: see `TorchEngine`.
        guard: see `KVEngine`.
    """

    attention = "tree"

    def __init__(
        self, program: Program, facts: Facts, own: Mapping[str, torch.Tensor], config: Callable[[], PreTrainedConfig],
        quantization: str | None, prefix_bytes: int, guard: Unwatched,
    ) -> None:  # fmt: skip
        shapes = tuple((heads, keys, values) for heads, keys, values in own["shapes"].tolist())
        recurrences = program.stack.recurrences
        layout = KVLayout(shapes, torch.float32, torch.device("cpu"), blocked=True, recurrences=recurrences)
        super().__init__(facts, own["logits"].shape[1], layout, torch.bfloat16, quantization, prefix_bytes, guard)
        self._program, self._config = program, config

    @classmethod
    def of(cls, prepared: Prepared, plan: EnginePlan, prefix_bytes: int) -> KVEngine:
        """The engine of a loaded model, whose modules can't run any more."""
        config, facts = prepared.config, prepared.facts
        return ProgramEngine(
            prepared.program(), facts, prepared.own, lambda: config, prepared.quantization, prefix_bytes, prepared.guard
        )  # fmt: skip

    @cached_property
    def config(self) -> PreTrainedConfig:
        return self._config()

    @property
    def execution(self) -> str:
        return "one call"

    def _forward(self, segments: SequenceOf[Segment], upto: Upto, rows: int | None = None) -> Logits:
        ids, positions = inputs_of(segments)
        logits = self._program.forward(ids, positions, segments, upto, rows)
        for segment in segments if self._places else ():  # all hidden states of its rows in one move
            first, start = segment.prefix + segment.first, segment.start
            segment.kv.states[:, first : first + segment.count] = self._program.states[:, start : start + segment.count]
        return logits

    def _most_probable(self) -> tuple[NDArray[np.float32], Ints] | None:
        return self._program.best

    def _capture(self, places: list[int]) -> None:
        self._program.capture(places)

    def _outer_layers(self) -> tuple[Any, Any]:
        return self._program.stack.embedding, self._program.stack.head

    def _check_windows(self, windows: set[int | None]) -> None:
        if windows != set(self.facts.windows.values()):
            raise ModelError(
                f"{self.facts.name} does not tell its attention of the sliding window that its configuration has"
            )
