"""A Gemma 4 assistant grows the tree, from the keys and values of its target."""

from __future__ import annotations

from tokentree.drafters.base import Drafter, Parts
from tokentree.drafters.draft_model import DraftModel
from tokentree.engines.base import Engine
from tokentree.engines.drafting import AssistantEngines
from tokentree.errors import PairingError
from tokentree.heads.assistant import AssistantHead
from tokentree.heads.assistant_files import read_assistant


class Assistant(DraftModel):
    """Grows a tree as a draft model does, level by level, with an assistant that goes on from what it gave itself.

    Of a text of one token the target has read nothing, so its first step has no draft.

    Args:
        head: made for this target.
        target: its engine.

    Raises:
        PairingError: if the assistant doesn't fit the target.
    """

    def __init__(self, head: AssistantHead, target: Engine) -> None:
        super().__init__(_with_keys(target).assistant_engine(head), target.vocab_size, "assistant")

    @classmethod
    def make(cls, parts: Parts) -> Drafter:
        if parts.heads is None:
            raise PairingError("drafter='assistant' needs heads=..., a folder with a Gemma 4 assistant for this model")
        dtype = _with_keys(parts.engine).capture([]).dtype
        return cls(read_assistant(parts.heads, dtype, parts.fingerprint), parts.engine)


def _with_keys(engine: Engine) -> AssistantEngines:
    """``engine``, if an assistant can draft on it.

    Raises:
        PairingError: if its keys and values can't be read so.
    """
    if not isinstance(engine, AssistantEngines):
        raise PairingError(
            f"{engine.info.name} runs on an engine whose keys and values an assistant can't read: it takes "
            "attention='sdpa', or a CPU"
        )
    return engine
