"""What engines share whose forward goes through the modules of a transformers model."""

from __future__ import annotations

import functools
import inspect
from abc import abstractmethod
from collections.abc import Mapping
from collections.abc import Sequence as SequenceOf
from typing import Any, Self

import torch
from transformers import Cache, PreTrainedConfig

from tokentree.engines.foreign import runs_more
from tokentree.engines.kv import KVLayout
from tokentree.engines.kv_engine import KVEngine
from tokentree.engines.plan import EnginePlan
from tokentree.engines.prepared import Prepared
from tokentree.engines.segment import Segment, Upto, inputs_of
from tokentree.engines.support import cache_names, decoder_layers, output_layer, takes_positions
from tokentree.errors import InvariantError, ModelError, told


class ModelEngine(KVEngine):
    """Runs the copy of a model; a subclass says what its attention sees.

    Args:
        prepared: the model.
        layout: of the KV.
        prefix_bytes: see `KVEngine`.
    """

    def __init__(self, prepared: Prepared, layout: KVLayout, prefix_bytes: int) -> None:
        super().__init__(
            prepared.facts, prepared.vocab_size, layout, prepared.dtype, prepared.quantization, prefix_bytes,
            prepared.guard,
        )  # fmt: skip
        self._model, self._config = prepared.copy, prepared.config
        taken = inspect.signature(type(self._model).forward).parameters
        option = taken.get("logits_to_keep")
        self._keeps_logits = option is not None
        self._picks_logits = option is not None and "Tensor" in str(option.annotation)  # rows by their numbers
        self._takes_positions = takes_positions(self._model)
        self._cache_names = cache_names(self._model) if layout.shapes else ()  # states alone are kept elsewhere
        # On a CPU a product of fewer than four rows takes other code paths, whose bits differ, and is no faster.
        self._min_rows = 4 if self.device.type == "cpu" else 1
        self._noted: dict[int, torch.Tensor] = {}  # hidden states of the last forward by place, [rows, hidden size]
        self._hooked = set[int]()  # the places that are noted

    @classmethod
    @abstractmethod
    def of(cls, prepared: Prepared, plan: EnginePlan, prefix_bytes: int) -> Self:
        """The engine of a prepared model.

        Raises:
            ModelError: if the model can't be run so.
        """

    @abstractmethod
    def _run(self, segments: SequenceOf[Segment], padding: int, options: dict[str, Any]) -> Any:
        """What `_call` gives for all rows, and ``padding`` behind them."""

    @property
    def config(self) -> PreTrainedConfig:
        return self._config

    @property
    def execution(self) -> str:
        return f"{self.attention} attention"

    def _forward(self, segments: SequenceOf[Segment], upto: Upto, rows: int | None = None) -> torch.Tensor:
        there = sum(segment.count for segment in segments)
        wanted = there if rows is None else rows
        out = self._run(segments, max(0, self._min_rows - there), self._to_keep(upto, wanted, there))
        self._keep(segments, self._states())
        said: torch.Tensor = out.logits[0]
        return said if upto == "kv" else said[:wanted]

    def _call(
        self, segments: SequenceOf[Segment], padding: int, cache: Cache, mask: Any, options: dict[str, Any]
    ) -> Any:  # fmt: skip
        """What the model gives for the rows of ``segments``."""
        ids, positions = inputs_of(segments, padding)
        if self._takes_positions:
            options = {"position_ids": torch.from_numpy(positions)[None].to(self.device), **options}
        return self._model(
            input_ids=torch.from_numpy(ids)[None].to(self.device),
            attention_mask=mask,
            **dict.fromkeys(self._cache_names, cache),
            use_cache=not self._storages.layout.recurrences,  # some would look for states in it, or in themselves
            return_dict=True,
            **options,
        )

    def _states(self) -> list[torch.Tensor]:
        """The hidden states of the last forward at each of `_places`."""
        return [self._noted[place] for place in self._places]

    def _to_keep(self, upto: Upto, rows: int, there: int) -> dict[str, Any]:
        """What the model is told of the rows that need logits: of ``there``, the first ``rows`` ones."""
        noted = self.facts.num_layers in self._places  # at the output layer, which must see all rows then
        if not self._keeps_logits or noted:
            return {}
        if upto == "kv":
            # a number lets some models leave out rows whose KV nobody reads, and so what these attend to
            return {"logits_to_keep": torch.arange(1, device=self.device) if self._picks_logits else 1}
        if rows == there or not self._picks_logits:
            return {}
        return {"logits_to_keep": torch.arange(max(rows, self._min_rows), device=self.device)}

    def _outer_layers(self) -> tuple[Any, Any]:
        return self._model.get_input_embeddings(), output_layer(self._model)

    def _capture(self, places: list[int]) -> None:
        for place in {*places} - self._hooked:
            last = place == self.facts.num_layers
            module = output_layer(self._model) if last else decoder_layers(self._model)[place]
            assert module is not None
            module.register_forward_pre_hook(functools.partial(self._note, place), with_kwargs=True)
            self._hooked.add(place)

    def _note(self, place: int, module: torch.nn.Module, inputs: tuple[Any, ...], named: dict[str, Any]) -> None:
        """Keeps what a module is given."""
        self._noted[place] = (inputs[0] if inputs else named["hidden_states"])[0]

    def _check_trees(self, own: Mapping[str, torch.Tensor]) -> None:
        try:
            super()._check_trees(own)
        except InvariantError:
            raise
        except (RuntimeError, TypeError, LookupError, AssertionError) as error:  # of one that wants something else
            if runs_more(self._model):
                raise
            raise ModelError(f"{self.facts.name} can't read a tree: {told(error)}") from error
