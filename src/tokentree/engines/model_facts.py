"""What is known of a model beside its weights."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from tokentree.engines.support import context_length, layer_windows

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel


@dataclass(frozen=True)
class Facts:
    """What an engine knows of a model beside its weights.

    Args:
        name: of its class.
        context: the most positions that it can take.
        hidden_size, num_layers, vocab_size: by its configuration.
        windows: the kinds of its layers, each with its sliding window, None where everything is seen.
        ends: the tokens that end a text, by its configurations.
    """

    name: str
    context: int
    hidden_size: int
    num_layers: int
    vocab_size: int
    windows: dict[str, int | None]
    ends: list[int]

    @classmethod
    def of(cls, model: PreTrainedModel) -> Facts:
        config = model.config.get_text_config()
        return cls(
            type(model).__name__, context_length(config), int(config.hidden_size), int(config.num_hidden_layers),
            int(config.vocab_size), layer_windows(config),
            sorted(ends_of(getattr(model, "generation_config", None)) | ends_of(model.config)),
        )  # fmt: skip

    @property
    def size(self) -> str:
        """What tells its costs from those of others."""
        return f"{self.name} {self.num_layers}x{self.hidden_size}x{self.vocab_size}"


def ends_of(source: Any) -> set[int]:
    """The tokens that end a text by a configuration or a tokenizer, or None."""
    ids = getattr(source, "eos_token_id", None)
    return {ids} if isinstance(ids, int) else set(ids or ())


def settings_of(config: PreTrainedConfig) -> str:
    """A configuration as JSON."""
    return json.dumps(config.to_dict())


def config_of(settings: str) -> PreTrainedConfig:
    """The configuration that these are the settings of."""
    from transformers import AutoConfig

    found = json.loads(settings)
    made: PreTrainedConfig = AutoConfig.for_model(found.pop("model_type"), **found)
    return made
