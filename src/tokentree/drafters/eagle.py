"""A layer on the target's hidden states grows the tree (EAGLE, Li et al. 2024, arXiv:2401.15077, and successors)."""

from __future__ import annotations

import time

from tokentree.draft import Draft
from tokentree.drafters.base import Drafter, Parts
from tokentree.drafters.draft_model import DraftModel
from tokentree.drafters.pard import Pard
from tokentree.engines.base import Engine
from tokentree.engines.drafting import DraftLevels, GrowsDrafts, HeadEngines
from tokentree.errors import PairingError
from tokentree.heads.eagle import EagleHead
from tokentree.heads.eagle_files import read_eagle
from tokentree.heads.peagle import PEagleHead
from tokentree.sequence import Sequence
from tokentree.shapes.base import Shape
from tokentree.tree import Ints


class Eagle(DraftModel):
    """Grows a tree as a draft model does, level by level, with a head that reads the target's hidden states.

    Args:
        head: made for this target.
        target: its engine.

    Raises:
        PairingError: if the head doesn't fit the target.
    """

    _part = 1024

    def __init__(self, head: EagleHead, target: Engine) -> None:
        engine = _with_states(target).head_engine(head)
        super().__init__(engine, target.vocab_size, "eagle", _known(head, target))
        self._growing = engine if isinstance(engine, GrowsDrafts) else None  # asking takes tens of microseconds

    def propose(self, seqs: list[Sequence], shape: Shape, sampled: bool) -> list[Draft]:
        engine = self._growing
        if sampled or engine is None:
            return super().propose(seqs, shape, sampled)
        growing = [seq for seq in seqs if self._may_grow(seq, 0, shape)]
        room = max((min(seq.room - 1, engine.context - len(seq.tokens)) for seq in growing), default=0)
        started = time.perf_counter()
        grown = engine.grow(growing, min(shape.max_depth, room)) if room > 0 else None
        if grown is None:
            return [Draft(seq.tokens[-1]) for seq in seqs]
        self._learn_pace((time.perf_counter() - started) / len(grown[0].tokens))
        drafts = {seq.id: self._draft(seq, one, shape, len(seqs)) for seq, one in zip(growing, grown, strict=True)}
        return [drafts.get(seq.id) or Draft(seq.tokens[-1]) for seq in seqs]

    def _draft(self, seq: Sequence, grown: DraftLevels, shape: Shape, texts: int) -> Draft:
        """All candidates of ``grown`` as a draft, as many below each node as the shape wants."""
        draft = Draft(seq.tokens[-1], None, self._level_seconds / texts)
        nodes, places, width = [0], [0], grown.tokens.shape[2]  # parents, and their places in the level
        for tokens, log_probs, chosen in zip(grown.tokens, grown.log_probs, grown.chosen, strict=True):
            counts = [min(count, width) for count in shape.counts(seq, draft, nodes)]
            added = draft.add_level(nodes, counts, tokens[places], log_probs[places])
            draft.levels += 1
            ranks = [place * width + rank for place, count in zip(places, counts, strict=True) for rank in range(count)]
            known = dict(zip(ranks, added, strict=True))
            going = [(known[number], place) for place, number in enumerate(chosen.tolist()) if number in known]
            if not going:
                break
            nodes, places = [node for node, _ in going], [place for _, place in going]
        return draft

    @classmethod
    def make(cls, parts: Parts) -> Drafter:
        if parts.heads is None:
            raise PairingError("drafter='eagle' needs heads=..., a folder with an EAGLE head for this model")
        num_layers = _with_states(parts.engine).capture([]).num_layers
        head = read_eagle(parts.heads, num_layers, parts.fingerprint).head
        return peagle(head, parts.engine) if isinstance(head, PEagleHead) else cls(head, parts.engine)


def peagle(head: PEagleHead, target: Engine) -> Drafter:
    """The drafter of a P-EAGLE ``head``: to a drafter that is a PARD model whose engine is another one.

    Raises:
        PairingError: if the head doesn't fit the target.
    """
    engine, sizes = _with_states(target).head_engine(head), head.sizes
    return Pard(engine, target.vocab_size, sizes.mask_token, sizes.slots, "eagle", _known(head, target))


def _known(head: EagleHead, target: Engine) -> Ints | None:
    """The target's ids for the tokens that ``head`` knows, if these are others.

    Raises:
        PairingError: if the target doesn't have them.
    """
    known: Ints | None = None if head.token_map is None else head.token_map.cpu().numpy()
    if known is not None and int(known.max()) >= target.vocab_size:
        raise PairingError("this EAGLE head knows tokens that the target doesn't have")
    return known


def _with_states(engine: Engine) -> HeadEngines:
    """``engine``, if a head can draft on it.

    Raises:
        PairingError: if it has no hidden states.
    """
    if not isinstance(engine, HeadEngines):
        raise PairingError(f"{engine.info.name} has no hidden states, on which an EAGLE head drafts")
    return engine
