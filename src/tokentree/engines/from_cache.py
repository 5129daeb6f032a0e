"""An engine that needs no transformers model: what it computes with was kept when one was packed."""

from __future__ import annotations

from typing import Any

import torch
from pydantic import TypeAdapter, ValidationError

from tokentree.cache import damaged
from tokentree.engines.cpu.checked import expect, is_count
from tokentree.engines.cpu.families.names import FAMILIES
from tokentree.engines.cpu.fused import Kind
from tokentree.engines.cpu.linear import PackedLinear
from tokentree.engines.cpu.packed_file import Place, kept
from tokentree.engines.cpu.program import Program
from tokentree.engines.cpu.quantized import QuantizedLinear
from tokentree.engines.guard import Unwatched
from tokentree.engines.model_facts import Facts, config_of
from tokentree.engines.program import ProgramEngine
from tokentree.engines.self_check import OWN
from tokentree.errors import ModelError
from tokentree.exclusive import neutral
from tokentree.uncollected import uncollected

READY = "ready"  # the name by which that is kept


class ReadyEngine(ProgramEngine):
    """A `ProgramEngine` that begins at once: transformers' model classes alone take two seconds to import.

    Args:
        found: what `kept.kept` has of the model.
        quantization, prefix_bytes: see `TorchEngine`.

    Raises:
        KeyError: if that is not enough.
        ModelError: if it gives other logits than the model gave by itself.
    """

    @neutral()
    def __init__(self, found: dict[str, dict[str, Any]], quantization: str | None, prefix_bytes: int) -> None:
        ready, own = found[READY], found[OWN]
        kind: Kind = QuantizedLinear if quantization else PackedLinear
        stack = FAMILIES[ready["family"]].of_state(ready["stack"], kind)
        settings, facts = ready["settings"], _facts(ready["facts"])
        shapes = tuple((heads, keys, values) for heads, keys, values in own["shapes"].tolist())
        sizes = tuple((one.kv_heads, one.width, one.width) for one in stack.attentions)
        expect("a model", shapes == sizes, own["logits"].shape[1] == stack.head.num_outputs)
        expect("a model", (facts.num_layers, facts.hidden_size) == (len(stack.layers), stack.hidden_size))
        super().__init__(
            Program(stack), facts, own, lambda: config_of(settings), quantization, prefix_bytes, Unwatched(facts.ends)
        )  # fmt: skip
        self._check_trees(own)


def _facts(found: Any) -> Facts:
    try:
        facts = TypeAdapter(Facts).validate_python(found)
    except ValidationError as error:
        raise ModelError(f"what is kept of a model makes no sense: {error.errors()[0]['msg']}") from None
    expect("a model", *map(is_count, (facts.context, facts.hidden_size, facts.num_layers, facts.vocab_size)))
    return facts


@uncollected
def ready_engine(place: Place, quantization: str | None, prefix_bytes: int) -> ReadyEngine | None:
    """The engine that is kept there, if one is that can be trusted."""
    found = kept(place, torch.bfloat16)
    try:
        return ReadyEngine(found, quantization, prefix_bytes) if READY in found else None
    except (LookupError, TypeError, AttributeError, ValueError, RuntimeError):  # it is made again from the model
        damaged(place.file)
        return None
