"""A smaller model guesses several tokens at once, in the places of masks (PARD, An et al. 2025, arXiv:2504.18583)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch

from tokentree.draft import Draft
from tokentree.drafters.draft_model import DraftModel, Rows
from tokentree.drafters.drawing import drawn
from tokentree.drafters.slots import compile_growth, grown
from tokentree.engines.drafting import CANDIDATES, DraftEngine, Slots
from tokentree.errors import ModelError
from tokentree.growing import DEPTH
from tokentree.kernels.topk import top_logprobs
from tokentree.sequence import Sequence
from tokentree.shapes.base import Shape
from tokentree.tree import Ints, TokenTree

SLOTS = 8  # tokens that PARD's models are trained to guess at once
KIND = "pard"


class Pard(DraftModel):
    """One forward of the draft model a step, however deep the tree.

    Its rows are the tokens that have no KV yet, and mask tokens behind them. The row of the last token says what comes
    next. The row of the n-th mask says what comes n places further on, whatever stands between. The tree grows over
    these places as a block head's does. Rows of masks are never committed.

    Args:
        engine: holds the draft model.
        vocab_size: the target's; candidates beyond it are never proposed.
        mask_token: one of the draft model's.
        slots: the most tokens that are guessed at once.
        name, token_map: see `DraftModel`.
    """

    by_levels = False

    def __init__(
        self, engine: DraftEngine, vocab_size: int, mask_token: int, slots: int = SLOTS, name: str = "draft_model",
        token_map: Ints | None = None,
    ) -> None:  # fmt: skip
        super().__init__(engine, vocab_size, name, token_map)
        self._mask_token, self._slots = mask_token, slots
        compile_growth()

    def propose(self, seqs: list[Sequence], shape: Shape, sampled: bool) -> list[Draft]:
        drafts = {seq.id: Draft(seq.tokens[-1]) for seq in seqs}
        ready = [seq for seq in seqs if self._may_begin(seq, shape) and self._has_read(seq, len(seqs))]
        if ready:
            rows = [Rows(seq.tokens[self._engine.committed(seq) :]) for seq in ready]
            depths = [self._depth(seq, shape) for seq in ready]
            trees = [self._masked(row.unseen, depth) for row, depth in zip(rows, depths, strict=True)]
            out = self._engine.verify(ready, trees)
            for number, (seq, row, tree) in enumerate(zip(ready, rows, trees, strict=True)):
                self._rows[seq.id] = row
                places = range(len(row.unseen) - 1, len(tree))
                drafts[seq.id] = self._grown(seq, shape, out.rows(number, places), sampled)
        return [drafts[seq.id] for seq in seqs]

    def _depth(self, seq: Sequence, shape: Shape) -> int:
        """How deep a draft of ``seq``, for which one may begin, may be."""
        return min(self._slots, shape.max_depth, seq.room - 1, self._engine.context + 1 - len(seq.tokens))

    def _masked(self, unseen: list[int], depth: int) -> TokenTree:
        """The rows of a forward that guesses ``depth`` tokens."""
        return TokenTree.chain(unseen[0], [*unseen[1:], *[self._mask_token] * (depth - 1)])

    def _grown(self, seq: Sequence, shape: Shape, said: torch.Tensor, sampled: bool) -> Draft:
        """A draft over what is ``said`` of the next places, logits [places, tokens that the draft model knows]."""
        said = said[:, : self._vocab_size]
        if sampled and not seq.params.is_greedy:
            rows = self._whole(said)
            return drawn(seq, shape, len(said), lambda draft, node: rows[int(draft.ints[DEPTH, node])])
        divisor = 1.0 if seq.params.is_greedy else seq.params.temperature
        log_probs, ids = top_logprobs(said, min(CANDIDATES, said.shape[1]), divisor)
        tokens = ids if self._token_map is None else self._token_map[ids]
        slots = Slots.independent(tokens, np.exp(log_probs).astype(np.float64))
        return grown(slots, seq.tokens[-1], shape, len(said))


def mask_token(said: Mapping[str, Any], name: str, vocab_size: int) -> int | None:
    """The mask token of a draft model that guesses several tokens at once; None of others.

    Args:
        said: ``spd_type`` and ``pard_token`` of its configuration, as far as they are there.
        name: of the draft model.
        vocab_size: its own.

    Raises:
        ModelError: if that makes no sense, or another method than PARD is named.
    """
    if not said:
        return None
    kind, token = said.get("spd_type", KIND), said.get("pard_token")
    if kind != KIND:
        raise ModelError(f"the draft model {name!r} has spd_type {kind!r} in its configuration: only {KIND!r} is read")
    if type(token) is not int or not 0 <= token < vocab_size:
        raise ModelError(
            f"the draft model {name!r} guesses in the places of mask tokens (PARD), and pard_token={token!r} of its "
            f"configuration is none of its {vocab_size} tokens"
        )
    return token
