"""The model that heads are trained for, as its engine."""

from __future__ import annotations

from tokentree.engines.base import TransformersEngine
from tokentree.errors import PairingError
from tokentree.llm import LLM


def engine_of(llm: LLM) -> TransformersEngine:
    """The engine of a transformers model, whose hidden states can be read.

    Raises:
        PairingError: if it is another.
    """
    if not isinstance(llm.engine, TransformersEngine):
        raise PairingError(f"heads are trained for transformers models, and {llm.engine.info.name} is none")
    return llm.engine
