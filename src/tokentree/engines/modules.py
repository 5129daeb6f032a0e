"""An engine on transformers' modules with our attention, on CPUs."""

from __future__ import annotations

from collections.abc import Mapping
from collections.abc import Sequence as SequenceOf
from typing import Any

import torch

from tokentree.engines.cpu.attention import TREE, ForwardKV, attending
from tokentree.engines.cpu.prepare import set_attention, steady_activations
from tokentree.engines.cpu.states.exchange import exchange
from tokentree.engines.cpu.steady import foreign_layers, steady_weights
from tokentree.engines.model_engine import ModelEngine
from tokentree.engines.plan import EnginePlan
from tokentree.engines.prepared import Prepared
from tokentree.engines.segment import Segment
from tokentree.errors import ModelError


class ModulesEngine(ModelEngine):
    """Verifies trees through the model's own modules, packed and fused, under `tree_attention`."""

    attention = "tree"
    _foreign: tuple[str, ...] = ()  # linear layers of other libraries

    @classmethod
    def of(cls, prepared: Prepared, plan: EnginePlan, prefix_bytes: int) -> ModulesEngine:
        try:
            layout = prepared.attended()
        except ModelError as error:
            if plan.otherwise is None:
                raise ModelError(f"attention='tree' can't be used: {error}") from None
            raise
        prepared.pack()
        engine = cls(prepared, layout, prefix_bytes)
        exchange(prepared.copy)
        set_attention(prepared.copy, TREE)
        steady_activations(prepared.copy)
        steady_weights(prepared.copy, prepared.owned)
        engine._foreign = tuple(foreign_layers(prepared.copy))
        return engine

    @property
    def execution(self) -> str:
        return f"tree attention, {' and '.join(self._foreign)}" if self._foreign else "tree attention"

    def _run(self, segments: SequenceOf[Segment], padding: int, options: dict[str, Any]) -> Any:
        cache = ForwardKV(segments, False, padding)
        with attending(cache):
            return self._call(segments, padding, cache, None, options)

    def _check_trees(self, own: Mapping[str, torch.Tensor]) -> None:
        super()._check_trees(own)
        if self._foreign:
            self.caveat = (
                f"{self.facts.name} has linear layers of another kind here ({', '.join(self._foreign)}), whose bits "
                "may depend on the rows beside one: its text is plain's up to ties"
            )
