"""The default rule: one draw of the target for each visited node."""

from __future__ import annotations

from typing import ClassVar

from tokentree.acceptance.base import Acceptance, NodeLogits
from tokentree.draft import Draft
from tokentree.errors import RequestError
from tokentree.sequence import Accepted, Sequence


class Match(Acceptance):
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
