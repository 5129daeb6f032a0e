"""Triton's kernels where the tests run: on a GPU, or in Triton's interpreter (see tests/__init__.py)."""

from __future__ import annotations

import torch
from transformers import PreTrainedModel

from tests.tiny_models import tiny

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")

FAMILIES = ("llama", "mistral", "qwen2", "qwen3", "phi3", "gemma2", "gemma3")


def small(family: str = "llama", **options: object) -> PreTrainedModel:
    """A tiny model whose sizes there are kernels for."""
    sizes = {"hidden_size": 64, "intermediate_size": 32, **options}
    made: PreTrainedModel = tiny(family, torch.bfloat16, **sizes).to(DEVICE)  # type: ignore[arg-type]
    return made
