"""tokentree: several tokens per forward pass, by verifying a whole tree of candidates at once."""

from tokentree.decoder import Decoder
from tokentree.draft import Draft
from tokentree.errors import ModelError, OptionError, PairingError, PromptError, TokenTreeError, TreeError
from tokentree.llm import LLM, Piece, Result, Stream
from tokentree.metrics import Metrics
from tokentree.sampling import SamplingParams
from tokentree.tree import TokenTree

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
]
