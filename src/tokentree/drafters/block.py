"""A head on the target's hidden states guesses a block of tokens in one pass (DFlash, arXiv:2602.06036, and
successors); the tree grows best first over what it says of each place (DDTree, arXiv:2604.12989)."""

from __future__ import annotations

import logging

import torch

from tokentree.draft import Draft
from tokentree.drafters.base import Drafter, Parts
from tokentree.drafters.draft_model import caught_up
from tokentree.drafters.drawing import drawn, whole
from tokentree.drafters.slots import compile_growth, grown
from tokentree.engines.base import Engine
from tokentree.engines.drafting import BlockEngine, BlockEngines
from tokentree.errors import PairingError
from tokentree.growing import DEPTH, PARENT, TOKEN
from tokentree.heads.block import BlockHead
from tokentree.heads.block_files import read_block
from tokentree.heads.markov import Markov
from tokentree.sequence import Sequence
from tokentree.shapes.base import Shape

PART = 512  # tokens of prompts that are read in a step of several texts
MORE_ALONE = 4  # times as many are read in a step of one
logger = logging.getLogger(__name__)


class Block(Drafter):
    """One pass of the head a step, however deep the tree. A node is as probable as the product of what the places on
    its path are given; where the head has a Markov part, given the token before.

    Of a text of one token the target has read nothing, so its first step has no draft.

    Args:
        head: made for this target.
        engine: the target's.

    Raises:
        PairingError: if the head doesn't fit the target.
    """

    name = "block"
    draws_children = True

    def __init__(self, head: BlockHead, engine: Engine) -> None:
        if not isinstance(engine, BlockEngines):
            raise PairingError(f"{engine.info.name} has no hidden states, on which a block head drafts")
        self._engine: BlockEngine = engine.block_engine(head)
        self._vocab_size = engine.vocab_size
        self._token_map = None if head.token_map is None else head.token_map.cpu().numpy()
        compile_growth()

    @classmethod
    def make(cls, parts: Parts) -> Drafter:
        if parts.heads is None:
            raise PairingError("drafter='block' needs heads=..., a folder with a block head for this model")
        if not isinstance(parts.engine, BlockEngines):
            raise PairingError(f"{parts.engine.info.name} has no hidden states, on which a block head drafts")
        saved = read_block(parts.heads, parts.engine.capture([]).num_layers, parts.fingerprint)
        logger.info("%s: %s", parts.heads, saved.told)
        return cls(saved.head, parts.engine)

    def prefill(self, seqs: list[Sequence], upto: int | None = None) -> None:
        for seq in seqs:
            if len(seq.tokens) <= self._engine.context:
                self._engine.prefill(seq, upto)

    def observe_prompt(self, seqs: list[Sequence], upto: int) -> None:
        """Nothing yet: `propose` reads the prompts of those for whom it drafts."""

    def propose(self, seqs: list[Sequence], shape: Shape, sampled: bool) -> list[Draft]:
        drafts = {seq.id: Draft(seq.tokens[-1]) for seq in seqs}
        ready = self._read([seq for seq in seqs if self._depth(seq, shape) > 0], len(seqs))
        drawn = [seq for seq in ready if sampled and not seq.params.is_greedy]
        picked = [seq for seq in ready if not sampled or seq.params.is_greedy]
        if picked:
            for seq, slots in zip(picked, self._engine.slots(picked), strict=True):
                drafts[seq.id] = grown(slots, seq.tokens[-1], shape, self._depth(seq, shape))
        if drawn:
            for seq, states, logits in zip(drawn, *self._engine.guess(drawn), strict=True):
                drafts[seq.id] = self._drawn(seq, shape, states, logits)
        return [drafts[seq.id] for seq in seqs]

    def release(self, seqs: list[Sequence]) -> None:
        self._engine.release(seqs)

    def _read(self, seqs: list[Sequence], texts: int) -> list[Sequence]:
        """Reads what is new of ``seqs``, but for a few tokens at the end of each, few enough in a step for nobody to
        wait long. Returns those of which that was all."""
        left, ready = PART if texts > 1 else MORE_ALONE * PART, list[Sequence]()
        for seq in seqs:
            done = self._engine.committed(seq)
            if caught_up(self._engine, seq, left, seq):
                ready.append(seq)
            left = max(0, left + done - self._engine.committed(seq))
        return ready

    def _depth(self, seq: Sequence, shape: Shape) -> int:
        """How deep a draft of ``seq`` may be."""
        if len(seq.tokens) < 2:
            return 0
        room = min(seq.room - 1, self._engine.context - len(seq.tokens))
        return min(shape.max_depth, room, self._engine.sizes.num_guesses)

    def _drawn(self, seq: Sequence, shape: Shape, states: torch.Tensor, logits: torch.Tensor) -> Draft:
        """A tree of children drawn from what the head says after each node, of ``states`` [guesses, hidden size] and
        ``logits`` [guesses, tokens]."""
        markov = self._engine.markov
        memory = {-1: logits.new_zeros(1, 0) if markov is None else markov.at_anchor(1)}  # of the path to each node

        def said(draft: Draft, node: int) -> torch.Tensor:
            place, token, parent = (int(draft.ints[row, node]) for row in (DEPTH, TOKEN, PARENT))
            guess = slice(place, place + 1)
            row, memory[node] = _after(markov, token, states[guess], logits[guess].float(), memory[parent])
            return whole(row, self._vocab_size, self._token_map)[0]

        return drawn(seq, shape, self._depth(seq, shape), said)


def _after(
    markov: Markov | None, token: int, states: torch.Tensor, logits: torch.Tensor, memory: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """What a head says after ``token``, float32[1, tokens that it knows], and what is remembered of the path; see
    `Markov`."""
    if markov is None:
        return logits, memory
    told, memory = markov.told(torch.tensor([token], device=logits.device), states, memory)
    return markov.after(logits, told).float(), memory
