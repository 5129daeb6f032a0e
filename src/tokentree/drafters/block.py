"""A head on the target's hidden states guesses a block of tokens in one pass (DFlash, arXiv:2602.06036, and
successors); the tree grows best first over what it says of each place (DDTree, arXiv:2604.12989)."""

from __future__ import annotations

import logging

import numpy as np
import torch

from tokentree.draft import Draft
from tokentree.drafters.base import Drafter, Parts
from tokentree.drafters.drawing import draw, whole
from tokentree.drafters.slots import Slots, compile_growth
from tokentree.engines.base import BlockEngine, BlockEngines, Engine
from tokentree.errors import PairingError
from tokentree.growing import DEPTH, TOKEN
from tokentree.heads.block import BlockHead, Markov
from tokentree.heads.block_files import read_block
from tokentree.kernels.topk import top_logprobs
from tokentree.sequence import Sequence
from tokentree.shapes.base import Shape
from tokentree.tree import Ints

TOP = 10  # tokens that are kept of each place
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
        self._engine.read([seq for seq in seqs if len(seq.tokens) <= self._engine.context])

    def propose(self, seqs: list[Sequence], shape: Shape, sampled: bool) -> list[Draft]:
        drafts = {seq.id: Draft(seq.tokens[-1]) for seq in seqs}
        ready = [seq for seq in seqs if self._depth(seq, shape) > 0]
        if ready:
            states, logits = self._engine.guess(ready)
            for seq, own, said in zip(ready, states, logits, strict=True):
                grow = self._drawn if sampled and not seq.params.is_greedy else self._picked
                drafts[seq.id] = grow(seq, shape, own, said)
        return [drafts[seq.id] for seq in seqs]

    def release(self, seqs: list[Sequence]) -> None:
        self._engine.release(seqs)

    def _depth(self, seq: Sequence, shape: Shape) -> int:
        """How deep a draft of ``seq`` may be."""
        if len(seq.tokens) < 2:
            return 0
        room = min(seq.room - 1, self._engine.context - len(seq.tokens))
        return min(shape.max_depth, room, self._engine.head.sizes.num_guesses)

    @torch.inference_mode()
    def _picked(self, seq: Sequence, shape: Shape, states: torch.Tensor, logits: torch.Tensor) -> Draft:
        """The most probable paths, of ``states`` [guesses, hidden size] and ``logits`` [guesses, tokens]."""
        depth, divisor = self._depth(seq, shape), 1.0 if seq.params.is_greedy else seq.params.temperature
        markov = self._engine.head.markov
        if markov is None:
            logprobs, ids = top_logprobs(logits[:depth], min(TOP, logits.shape[1]), divisor)
            slots = Slots.independent(self._targets(ids), np.exp(logprobs).astype(np.float64))
        else:
            slots = self._chained(markov, seq.tokens[-1], states[:depth], logits[:depth].float(), divisor)
        return slots.grown(seq.tokens[-1], shape, depth)

    def _chained(
        self, markov: Markov, anchor: int, states: torch.Tensor, logits: torch.Tensor, divisor: float
    ) -> Slots:
        """Candidates of each place after each of those of the place before.

        They are the most probable ones after the most probable one before. After another one they are the same tokens:
        they keep their sum of probabilities, and share it by what the Markov part says of each pair.
        """
        k = min(TOP, logits.shape[1])
        places = len(logits)
        tokens, probs = np.zeros((places, k, k), np.int64), np.zeros((places, k, k))
        ranks = np.zeros((places, k, k), np.int64)
        before = torch.tensor([anchor], device=logits.device)
        for place, (state, row) in enumerate(zip(states, logits, strict=True)):
            told = markov.told(before, state.expand(len(before), -1))  # [before, rank]
            said = (row + markov.second(told[:1])[0].float()) / divisor
            best = said.topk(k)
            pairs = best.values + markov.added(told - told[:1], best.indices).float() / divisor
            sums = torch.logsumexp(best.values, 0) - torch.logsumexp(said, 0)
            shares = (pairs.log_softmax(-1) + sums).exp()
            ordered = torch.sort(shares, dim=-1, descending=True, stable=True)
            count = len(before)
            ids = self._targets(best.indices.cpu().numpy())
            ranks[place, :count] = ordered.indices.cpu().numpy()
            tokens[place, :count], probs[place, :count] = ids[ranks[place, :count]], ordered.values.cpu().numpy()
            before = torch.from_numpy(ids).to(logits.device)
        return Slots(tokens, probs, ranks)

    def _drawn(self, seq: Sequence, shape: Shape, states: torch.Tensor, logits: torch.Tensor) -> Draft:
        """A tree of children drawn from what the head says after each node."""
        draft, depth, markov = Draft(seq.tokens[-1], {}), self._depth(seq, shape), self._engine.head.markov
        frontier = shape.select(seq, draft, [0])
        while frontier:
            place, level = int(draft.ints[DEPTH, frontier[0]]), list[int]()
            counts = shape.counts(seq, draft, frontier)
            for node, count in zip(frontier, counts, strict=True):
                row = logits[place].float()
                if markov is not None:
                    before = torch.tensor([int(draft.ints[TOKEN, node])], device=row.device)
                    row = row + markov(before, states[place][None])[0].float()
                row = whole(row[None], self._vocab_size, self._token_map)[0]
                level += draw(seq, draft, node, count, row, seq.noise_below(node))
            frontier = shape.select(seq, draft, level) if level and place + 1 < depth else []
        return draft

    def _targets(self, ids: Ints) -> Ints:
        """The target's ids of the head's."""
        return ids if self._token_map is None else self._token_map[ids]
