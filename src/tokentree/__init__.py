"""tokentree: several tokens per forward pass, by verifying a whole tree of candidates at once."""

from tokentree.decoder import Decoder
from tokentree.draft import Draft
from tokentree.errors import ModelError, OptionError, PairingError, PromptError, TokenTreeError, TreeError
from tokentree.hf import TreeGenerator, generator
from tokentree.llm import LLM, Piece, Result, Stream
from tokentree.metrics import Metrics
from tokentree.sampling import SamplingParams
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
    "Decoder",
    "Draft",
    "Metrics",
    "ModelError",
    "OptionError",
    "PairingError",
    "Piece",
    "PromptError",
    "Result",
    "SamplingParams",
    "Stream",
    "TokenTree",
    "TokenTreeError",
    "TreeError",
    "TreeGenerator",
    "build_tree",
    "create_tree_mask",
    "extract_all_paths",
    "find_best_path",
    "generator",
    "path_probability",
    "tree_speculative_decode",
]
