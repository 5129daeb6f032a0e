"""tokentree: several tokens per forward pass, by verifying a whole tree of candidates at once."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from tokentree.uncollected import uncollected

if TYPE_CHECKING:
    from tokentree.aio import AsyncLLM, AsyncStream
    from tokentree.decoder import Decoder
    from tokentree.draft import Draft
    from tokentree.errors import (
        ForkError,
        ModelError,
        OptionError,
        PairingError,
        PromptError,
        RequestError,
        StepError,
        TokenTreeError,
        TreeError,
    )
    from tokentree.grammars.options import StructuredOutputs
    from tokentree.hf import TreeGenerator, generator
    from tokentree.llm import LLM, Result, Stream
    from tokentree.medusa import MedusaModel, build_tree_from_heads, medusa_decode, train_medusa_heads
    from tokentree.metrics import Metrics
    from tokentree.pieces import Piece
    from tokentree.sampling import SamplingParams
    from tokentree.scheduler import Event, Scheduler
    from tokentree.tree import TokenTree
    from tokentree.tutorial import (
        build_tree,
        create_tree_mask,
        extract_all_paths,
        find_best_path,
        path_probability,
        tree_speculative_decode,
    )

__all__ = [
    "LLM",
    "AsyncLLM",
    "AsyncStream",
    "Decoder",
    "Draft",
    "Event",
    "ForkError",
    "MedusaModel",
    "Metrics",
    "ModelError",
    "OptionError",
    "PairingError",
    "Piece",
    "PromptError",
    "RequestError",
    "Result",
    "SamplingParams",
    "Scheduler",
    "StepError",
    "Stream",
    "StructuredOutputs",
    "TokenTree",
    "TokenTreeError",
    "TreeError",
    "TreeGenerator",
    "build_tree",
    "build_tree_from_heads",
    "create_tree_mask",
    "extract_all_paths",
    "find_best_path",
    "generator",
    "medusa_decode",
    "path_probability",
    "train_medusa_heads",
    "tree_speculative_decode",
]

# Where each name lives: imported when it is first asked for, as torch and transformers take seconds.
_HOMES = {
    "aio": ["AsyncLLM", "AsyncStream"],
    "decoder": ["Decoder"],
    "draft": ["Draft"],
    "errors": [
        "ForkError",
        "ModelError",
        "OptionError",
        "PairingError",
        "PromptError",
        "RequestError",
        "StepError",
        "TokenTreeError",
        "TreeError",
    ],
    "grammars.options": ["StructuredOutputs"],
    "hf": ["TreeGenerator", "generator"],
    "llm": ["LLM", "Result", "Stream"],
    "medusa": ["MedusaModel", "build_tree_from_heads", "medusa_decode", "train_medusa_heads"],
    "metrics": ["Metrics"],
    "pieces": ["Piece"],
    "sampling": ["SamplingParams"],
    "scheduler": ["Event", "Scheduler"],
    "tree": ["TokenTree"],
    "tutorial": [
        "build_tree",
        "create_tree_mask",
        "extract_all_paths",
        "find_best_path",
        "path_probability",
        "tree_speculative_decode",
    ],
}


def __getattr__(name: str) -> Any:
    for module, names in _HOMES.items():
        if name in names:
            try:
                with uncollected:
                    home = import_module(f"tokentree.{module}")
            except AttributeError as error:  # else Python would say that there is no such name here
                raise ImportError(f"can't import tokentree.{module}: {error}") from error
            return getattr(home, name)
    raise AttributeError(f"module 'tokentree' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
