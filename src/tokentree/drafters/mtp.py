"""A layer that the target carries in its own checkpoint grows the tree (DeepSeek-V3's multi-token prediction,
arXiv:2412.19437, unrolled for several tokens)."""

from __future__ import annotations

from tokentree.drafters.base import Drafter, Parts
from tokentree.drafters.draft_model import DraftModel
from tokentree.engines.base import Engine
from tokentree.engines.drafting import LayerEngines
from tokentree.errors import PairingError
from tokentree.heads.mtp import MtpHead
from tokentree.heads.mtp_files import read_mtp


class Mtp(DraftModel):
    """Grows a tree as a draft model does, level by level, with the target's layer for multi-token prediction.

    Args:
        head: of this target.
        target: its engine.

    Raises:
        PairingError: if the head doesn't fit the target.
    """

    def __init__(self, head: MtpHead, target: Engine) -> None:
        super().__init__(_with_states(target).layer_engine(head), target.vocab_size, "mtp")

    @classmethod
    def make(cls, parts: Parts) -> Drafter:
        if parts.folder is None:
            raise PairingError(
                "drafter='mtp' needs a model that is loaded from a folder of safetensors, with a layer for multi-token "
                "prediction"
            )
        return cls(read_mtp(parts.folder, _with_states(parts.engine).capture([]).dtype), parts.engine)


def _with_states(engine: Engine) -> LayerEngines:
    """``engine``, if a head can draft on it.

    Raises:
        PairingError: if it has no hidden states.
    """
    if not isinstance(engine, LayerEngines):
        raise PairingError(
            f"{engine.info.name} has no hidden states, on which a layer for multi-token prediction drafts"
        )
    return engine
