"""What is known of an engine of a transformers model."""

from __future__ import annotations

from collections.abc import Sequence as SequenceOf
from typing import TYPE_CHECKING, Protocol, runtime_checkable

import torch

from tokentree.engines.base import Branches
from tokentree.engines.drafting import HeadEngines, Rewinds

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

    from tokentree.engines.model_facts import Facts


@runtime_checkable
class TransformersEngine(HeadEngines, Branches, Rewinds, Protocol):
    """An engine of a transformers model.

    Attributes:
        facts: properties of the model, beside its weights.
        dtype, device: of its weights.
        caveat: see `EngineInfo`.
    """

    facts: Facts
    dtype: torch.dtype
    device: torch.device
    caveat: str

    @property
    def config(self) -> PreTrainedConfig:
        """The model's configuration."""
        ...

    @property
    def ends(self) -> list[int]:
        """The tokens at which transformers' ``generate`` ends a text of the model. They are read from a loaded model at
        each call.

        Raises:
            ModelError: if the generation configuration names something that isn't a token.
        """
        ...

    @property
    def signature(self) -> str:
        """See `EngineInfo`."""
        ...

    @property
    def bytes_per_token(self) -> int:
        """The KV of one token, in all layers."""
        ...

    def changed(self) -> str | None:
        """What has changed in the loaded model since this engine was made of it, in words. None if nothing has."""
        ...

    def hidden_states(self, ids: SequenceOf[int], places: SequenceOf[int] | None = None) -> torch.Tensor:
        """[len(ids), places x hidden size]: the hidden states ``places`` of a text. The places are concatenated along
        the last axis. `capture` must have been called for them."""
        ...

    def hidden_states_of(
        self, texts: SequenceOf[SequenceOf[int]], places: SequenceOf[int] | None = None
    ) -> list[torch.Tensor]:
        """`hidden_states` of each of ``texts``."""
        ...
