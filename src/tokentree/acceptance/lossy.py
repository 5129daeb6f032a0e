"""Rules that change what is written, and say so."""

from __future__ import annotations

import math
from typing import ClassVar

import torch

from tokentree.acceptance.base import Acceptance, NodeLogits
from tokentree.acceptance.match import Match
from tokentree.draft import Draft
from tokentree.errors import OptionError
from tokentree.sampling import to_probs
from tokentree.sequence import Accepted, Sequence


class BestPath(Acceptance):
    """Lossy. Take the root-to-leaf path that the target finds most probable per token, and a token after it.

    This is how tree speculation is often taught. It never refuses a path, so the text is one that the drafter wrote
    and the target only ranked: not what the target alone would have written.
    """

    lossy: ClassVar[bool] = True
    draws_children: ClassVar[bool] = False

    def __call__(self, seq: Sequence, draft: Draft, logits: NodeLogits) -> Accepted:
        tree = draft.tree
        log_probs = [0.0] * len(tree)
        for node, children in enumerate(tree.children):
            if children and log_probs[node] == -math.inf:  # a path that the rules forbid: nothing is asked behind it
                for child in children:
                    log_probs[child] = -math.inf
            elif children:
                scores = seq.processed(logits(node), draft.path_tokens(node)).log_softmax(-1)
                for child in children:
                    log_probs[child] = log_probs[node] + float(scores[int(tree.tokens[child])])
        # the mean per token, as paths of different lengths compete
        leaf = max(tree.leaves.tolist(), key=lambda leaf: log_probs[leaf] / max(1, int(tree.depths[leaf])))
        path = tree.path(leaf)
        tokens = tree.tokens[path[1:]].tolist()
        return Accepted(path, [*tokens, seq.draw(logits(leaf), tokens)])


class Typical(Acceptance):
    """Lossy. Medusa's typical acceptance (Cai et al. 2024, arXiv:2401.10774, section 2.3.1): a child with token x is
    good enough if target_probs[x] > min(epsilon, delta * exp(-H)), with the entropy H of target_probs in nats. The
    longest path of such children is taken, of equally long ones the most probable; the bonus is drawn from the target.

    Where the target is unsure it takes what the drafter says, more often than the target would have said it. With
    greedy requests all probability lies on one token, and the rule is that of `Match`.

    Raises:
        OptionError: unless ``epsilon`` and ``delta`` lie above 0, and ``epsilon`` not above 1.
    """

    lossy: ClassVar[bool] = True
    draws_children: ClassVar[bool] = False

    def __init__(self, epsilon: float = 0.09, delta: float = 0.3) -> None:
        if not (0 < epsilon <= 1 and delta > 0):
            raise OptionError("typical needs epsilon above 0, not above 1, and delta above 0")
        self._epsilon, self._delta = epsilon, delta
        self._match = Match()

    def __call__(self, seq: Sequence, draft: Draft, logits: NodeLogits) -> Accepted:
        if seq.params.is_greedy:
            return self._match(seq, draft, logits)
        tree, log_probs = draft.tree, {0: 0.0}  # of the nodes that are reached
        for node, children in enumerate(tree.children):
            if node in log_probs and children:
                target_probs = to_probs(seq.processed(logits(node), draft.path_tokens(node)), seq.params)
                entropy = float(torch.special.entr(target_probs).sum())
                least = min(self._epsilon, self._delta * math.exp(-entropy))
                for child in children:
                    prob = float(target_probs[int(tree.tokens[child])])
                    if prob > least:
                        log_probs[child] = log_probs[node] + math.log(prob)
        last = max(log_probs, key=lambda node: (int(tree.depths[node]), log_probs[node]))
        path = tree.path(last)
        tokens = tree.tokens[path[1:]].tolist()
        return Accepted(path, [*tokens, seq.draw(logits(last), tokens)], refused=not tree.is_leaf(last))
