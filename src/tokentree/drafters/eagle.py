"""A layer on the target's hidden states grows the tree (EAGLE, Li et al. 2024, arXiv:2401.15077, and successors)."""

from __future__ import annotations

from tokentree.drafters.base import Drafter, Parts
from tokentree.drafters.draft_model import DraftModel
from tokentree.engines.base import Engine, HeadEngines
from tokentree.errors import PairingError
from tokentree.heads.eagle import EagleHead
from tokentree.heads.eagle_files import read_eagle


class Eagle(DraftModel):
    """Grows a tree as a draft model does, level by level, with a head that reads the target's hidden states.

    Args:
        head: made for this target.
        target: its engine.

    Raises:
        PairingError: if the head doesn't fit the target.
    """

    def __init__(self, head: EagleHead, target: Engine) -> None:
        known = None if head.token_map is None else head.token_map.cpu().numpy()
        if known is not None and int(known.max()) >= target.vocab_size:
            raise PairingError("this EAGLE head knows tokens that the target doesn't have")
        super().__init__(_with_states(target).head_engine(head), target.vocab_size, "eagle", known)

    @classmethod
    def make(cls, parts: Parts) -> Drafter:
        if parts.heads is None:
            raise PairingError("drafter='eagle' needs heads=..., a folder with an EAGLE head for this model")
        num_layers = _with_states(parts.engine).capture([]).num_layers
        return cls(read_eagle(parts.heads, num_layers, parts.fingerprint).head, parts.engine)


def _with_states(engine: Engine) -> HeadEngines:
    """``engine``, if a head can draft on it.

    Raises:
        PairingError: if it has no hidden states.
    """
    if not isinstance(engine, HeadEngines):
        raise PairingError(f"{engine.info.name} has no hidden states, on which an EAGLE head drafts")
    return engine
