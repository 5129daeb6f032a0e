"""Rejection without replacement: children are tried one after another, from the root down."""

from __future__ import annotations

from typing import ClassVar

from tokentree.acceptance.base import Acceptance, NodeLogits, drawn_from, left_over
from tokentree.acceptance.match import Match
from tokentree.draft import Draft
from tokentree.errors import PairingError, RequestError
from tokentree.sampling import to_probs
from tokentree.sequence import ACCEPT, Accepted, Sequence


class Rejection(Acceptance):
    """SpecInfer's multi-step speculative sampling (Miao et al. 2023, arXiv:2305.09781, algorithm 2), for children
    drawn without replacement.

    The children of a node are tried in the order they were drawn. A child with token x is accepted with probability
    min(1, target_probs[x] / draft_probs[x]); if it is refused, target_probs becomes norm(max(target_probs -
    draft_probs, 0)) and draft_probs loses x and is normalised. When all are refused, the bonus comes from what is left
    of target_probs. Greedy requests are decided as by `Match`.

    Raises:
        PairingError: if the draft's children were not drawn at random.
    """

    lossy: ClassVar[bool] = False
    draws_children: ClassVar[bool] = True
    takes_picked: ClassVar[bool] = False

    def __init__(self) -> None:
        self._match = Match()

    def __call__(self, seq: Sequence, draft: Draft, logits: NodeLogits) -> Accepted:
        if seq.params.is_greedy:
            return self._match(seq, draft, logits)
        if draft.sampled is None and len(draft) > 1:
            raise PairingError("accept='rejection' needs children drawn from draft_probs, and this drafter picks them")
        tree, node = draft.tree, 0
        path, tokens = [0], list[int]()
        while True:
            noise = seq.noise_after(tokens, ACCEPT)
            try:
                target_probs = to_probs(seq.processed(logits(node), tokens), seq.params)
            except RequestError as error:
                return Accepted(path[: len(tokens)], tokens, error=error)
            for child, draft_probs in drawn_from(draft, node, target_probs):
                token = int(tree.tokens[child])
                if noise.accepts(float(target_probs[token] / draft_probs[token])):
                    break
                _, target_probs = left_over(1.0, target_probs, draft_probs)
            else:
                tokens.append(noise.choose(target_probs))
                return Accepted(path, tokens, refused=not tree.is_leaf(node))
            tokens.append(token)
            path.append(child)
            node = child
