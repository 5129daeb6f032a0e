"""What is known of a model beside its weights."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from tokentree.engines.support import context_length, first_position, layer_chunks, layer_windows
from tokentree.errors import ModelError
from tokentree.heads.fingerprint import hash_of_sizes

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

DRAFTING = "spd_type", "pard_token"  # fields that say how a draft model guesses several tokens at once
CLASS = "tokentree_class"  # in settings, the name of a configuration's class


@dataclass(frozen=True)
class Facts:
    """What an engine knows of a model beside its weights.

    Args:
        name: of its class.
        context: the most positions that it can take.
        hidden_size, num_layers, vocab_size: by its configuration.
        windows: the kinds of its layers, each with its sliding window, None where everything is seen.
        chunks: those of them that attend in chunks, each with the positions of one.
        drafting: what of `DRAFTING` its configuration has.
        ends: the tokens at which transformers' ``generate`` ended its texts when these facts were written down.
        sizes: what `hash_of_sizes` makes of its configuration.
    """

    name: str
    context: int
    hidden_size: int
    num_layers: int
    vocab_size: int
    windows: dict[str, int | None]
    ends: list[int]
    sizes: str
    chunks: dict[str, int] = field(default_factory=dict)
    drafting: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def of(cls, model: PreTrainedModel) -> Facts:
        config = model.config.get_text_config()
        return cls(
            type(model).__name__, context_length(config) - first_position(model), int(config.hidden_size),
            int(config.num_hidden_layers), int(config.vocab_size), layer_windows(config), ends_of(model),
            hash_of_sizes(config), layer_chunks(config),
            {name: said for name in DRAFTING if (said := getattr(config, name, None)) is not None},
        )  # fmt: skip

    @property
    def size(self) -> str:
        """What tells its costs from those of others."""
        return f"{self.name} {self.num_layers}x{self.hidden_size}x{self.vocab_size}"


def ends_of(model: PreTrainedModel) -> list[int]:
    """The tokens at which transformers' ``generate`` ends a text of ``model``: those of its generation configuration
    alone, which is made of the model's own one where a checkpoint has none.

    Raises:
        ModelError: if these are no tokens.
    """
    said = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    named = said.tolist() if isinstance(said, np.ndarray | torch.Tensor) else said
    ids = [] if named is None else list(named) if isinstance(named, list | tuple | set | frozenset) else [named]
    if any(isinstance(token, bool) or not isinstance(token, int | np.integer) for token in ids):
        raise ModelError(f"generation_config.eos_token_id={said!r} of {type(model).__name__} is no token, nor several")
    return sorted({int(token) for token in ids})


def settings_of(config: PreTrainedConfig) -> str:
    """A configuration as JSON, with the name of its class."""
    return json.dumps(config.to_dict() | {CLASS: type(config).__name__})


def config_of(settings: str) -> PreTrainedConfig:
    """The configuration that these are the settings of."""
    import transformers

    found = json.loads(settings)
    family = found.pop("model_type")
    kind: Any = getattr(transformers, found.pop(CLASS, ""), None)
    if getattr(kind, "model_type", None) != family:  # of all that there are, which takes longer to import
        kind = transformers.CONFIG_MAPPING[family]
    made: PreTrainedConfig = kind(**found)
    return made
