"""The model that heads are trained for, as its engine."""

from __future__ import annotations

import torch

from tokentree.engines.base import TransformersEngine
from tokentree.errors import PairingError
from tokentree.llm import LLM
from tokentree.loading import pick_device


def engine_of(llm: LLM) -> TransformersEngine:
    """The engine of a transformers model, whose hidden states can be read.

    Raises:
        PairingError: if it is another.
    """
    if not isinstance(llm.engine, TransformersEngine):
        raise PairingError(f"heads are trained for transformers models, and {llm.engine.info.name} is none")
    return llm.engine


def attention_for(device: str | torch.device | None) -> str | None:
    """How a model attends that is to write texts by the thousand: by itself, but for CPUs."""
    return None if pick_device(device).type == "cpu" else "sdpa"
