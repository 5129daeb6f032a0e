"""Rules that turn the target's distributions at the nodes into an accepted path and a bonus token.

`Match` and `Rejection` are lossless: the text has exactly the target's distribution (and under `Match`, for a given
seed, it is exactly the text of plain decoding). `BestPath` and `Typical` are lossy.
"""

from __future__ import annotations

import math
from typing import ClassVar, Protocol

import torch

from tokentree.draft import Draft
from tokentree.errors import OptionError, PairingError, RequestError
from tokentree.sampling import to_probs
from tokentree.sequence import ACCEPT, Accepted, Sequence
from tokentree.specs import options_of
from tokentree.tree import TokenTree


class NodeLogits(Protocol):
    """What the target says after the nodes of a tree."""

    def __call__(self, node: int) -> torch.Tensor:
        """[vocab], the raw logits after ``node``."""
        ...

    def follow(self, tree: TokenTree) -> Accepted:
        """The path of ``tree`` along the tokens with the largest of them, and one more such token; on a CPU, of equal
        ones the lowest. With an error where they are no numbers."""
        ...


class Acceptance(Protocol):
    """A rule: ``rule(seq, draft, logits)`` walks the tree and reads the target's ``logits`` at the nodes it visits.

    Where a request fails at a node, a lossless rule gives the tokens before it, as plain decoding would have, and the
    error; a lossy one may raise it.
    """

    lossy: ClassVar[bool]
    draws_children: ClassVar[bool]

    def __call__(self, seq: Sequence, draft: Draft, logits: NodeLogits) -> Accepted: ...


class Match:
    """Draw one token from the target at each visited node, with that position's own random number, and follow the
    child that carries it; the first token that no child carries is the bonus.

    Children may come from anywhere, because they are never consulted before the token is drawn. Greedy decoding is
    the case without random numbers.
    """

    lossy: ClassVar[bool] = False
    draws_children: ClassVar[bool] = False

    def __call__(self, seq: Sequence, draft: Draft, logits: NodeLogits) -> Accepted:
        if seq.takes_best:
            return logits.follow(draft.tree)
        tree, node, path, tokens = draft.tree, 0, [0], list[int]()
        while True:
            try:
                tokens.append(seq.draw(logits(node), tokens))
            except RequestError as error:
                return Accepted(path[: len(tokens)], tokens, error=error)
            child = tree.child(node, tokens[-1])
            if child is None:
                return Accepted(path, tokens, refused=not tree.is_leaf(node))
            path.append(child)
            node = child


class Rejection:
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
            children = tree.children[node]
            draft_probs = _fit(draft.sampled[node], target_probs) if draft.sampled and children else target_probs
            for child in children:
                token = int(tree.tokens[child])
                if noise.accepts(float(target_probs[token] / draft_probs[token])):
                    break
                target_probs = _normalised((target_probs - draft_probs).clamp(min=0), otherwise=target_probs)
                draft_probs = draft_probs.index_fill(0, torch.tensor([token], device=draft_probs.device), 0.0)
                draft_probs = _normalised(draft_probs, otherwise=draft_probs)
            else:
                tokens.append(noise.choose(target_probs))
                return Accepted(path, tokens, refused=bool(children))
            tokens.append(token)
            path.append(child)
            node = child


class BestPath:
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


class Typical:
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


RULES: dict[str, type[Match | Rejection | BestPath | Typical]] = {
    "match": Match,
    "rejection": Rejection,
    "best_path": BestPath,
    "typical": Typical,
}


def acceptance(name: str) -> Acceptance:
    """The rule of that name; ``typical`` takes numbers, as in ``typical:epsilon=0.09,delta=0.3``.

    Raises:
        OptionError: if there is none, or its numbers make no sense.
    """
    if not isinstance(name, str):
        raise OptionError(f"accept={name!r} is not the name of a rule: choose one of {', '.join(RULES)}")
    rule, _, rest = name.partition(":")
    if rule not in RULES:
        raise OptionError(f"unknown acceptance rule {rule!r}: choose one of {', '.join(RULES)}")
    return RULES[rule](**options_of(rest, RULES[rule], "rule"))


def _fit(draft_probs: torch.Tensor, target_probs: torch.Tensor) -> torch.Tensor:
    """``draft_probs`` over the target's vocabulary, which may be padded further."""
    missing = target_probs.numel() - draft_probs.numel()
    return torch.nn.functional.pad(draft_probs, (0, missing)).to(target_probs.device)


def _normalised(probs: torch.Tensor, otherwise: torch.Tensor) -> torch.Tensor:
    total = float(probs.sum())
    return probs / total if total > 0 and math.isfinite(total) else otherwise
