"""Which model heads were made for."""

from __future__ import annotations

import hashlib
import json
from typing import TYPE_CHECKING, Any

from pydantic import BaseModel, ConfigDict

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedTokenizerBase

SIZES = (
    "model_type",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "vocab_size",
)


class Fingerprint(BaseModel):
    """What tells one target from another: hashes of the sizes in its configuration, and of its tokenizer's vocabulary
    (None without one)."""

    model_config = ConfigDict(frozen=True)

    config: str
    tokenizer: str | None = None

    @classmethod
    def of(cls, config: PreTrainedConfig, tokenizer: PreTrainedTokenizerBase | None) -> Fingerprint:
        return cls.of_sizes(hash_of_sizes(config), tokenizer)

    @classmethod
    def of_sizes(cls, sizes: str, tokenizer: PreTrainedTokenizerBase | None) -> Fingerprint:
        """``sizes``: what `hash_of_sizes` makes of the configuration."""
        vocab = None if tokenizer is None else _hash(sorted(tokenizer.get_vocab().items()))
        return cls(config=sizes, tokenizer=vocab)


def hash_of_sizes(config: PreTrainedConfig) -> str:
    """Of the sizes that heads depend on."""
    own = config.get_text_config()
    return _hash({name: _size(own, name) for name in SIZES})


def _size(config: PreTrainedConfig, name: str) -> Any:
    try:
        return getattr(config, name, None)
    except RuntimeError:  # transformers': it has one for each layer
        return "of each layer"


def _hash(content: Any) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True, ensure_ascii=True).encode()).hexdigest()[:16]
