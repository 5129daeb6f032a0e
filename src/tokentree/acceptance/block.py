"""Block verification: a chain is judged as a whole, from its end."""

from __future__ import annotations

from typing import ClassVar

import torch

from tokentree.acceptance.base import Acceptance, NodeLogits, drawn_from, left_over
from tokentree.acceptance.match import Match
from tokentree.draft import Draft
from tokentree.errors import PairingError, RequestError
from tokentree.sampling import to_probs
from tokentree.sequence import ACCEPT, Accepted, Sequence


class Block(Acceptance):
    """Block verification (Sun et al. 2024, arXiv:2403.10444), for chains.

    Down the chain each node gets a mass: 1 at the root, below it min(1, mass of the parent x target_probs[x] /
    draft_probs[x]) for its token x. It may exceed what the token alone allows, so that a likely token makes up for an
    unlikely one before it. Then nodes are tried from the end: the last one is accepted with probability of its mass,
    one before it with what `left_over` says of it. The first that is accepted ends the path, and the bonus comes from
    what is left of target_probs there. The accepted length is never less than under `Rejection` in the mean, and no
    rule's is more on a chain.

    Children that were picked count as drawn from a distribution that has nothing else. Greedy requests are decided as
    by `Match`. All random numbers are those of the first new position: what was used to judge later tokens must not be
    used again for them.

    Raises:
        PairingError: if a node has two children.
    """

    lossy: ClassVar[bool] = False
    draws_children: ClassVar[bool] = True
    chains_only: ClassVar[bool] = True

    def __init__(self) -> None:
        self._match = Match()

    def __call__(self, seq: Sequence, draft: Draft, logits: NodeLogits) -> Accepted:
        if seq.params.is_greedy:
            return self._match(seq, draft, logits)
        tree, path, tokens, mass = draft.tree, [0], list[int](), 1.0
        if any(len(children) > 1 for children in tree.children):
            raise PairingError("accept='block' verifies chains, and this draft branches: use accept='traversal'")

        def target_probs() -> torch.Tensor:
            return to_probs(seq.processed(logits(path[-1]), tokens), seq.params)

        stops = list[tuple[float, torch.Tensor]]()  # the chance to stop at each node of the path but the last
        while not tree.is_leaf(path[-1]) and mass > 0:
            try:
                probs = target_probs()
            except RequestError:  # the request ends here, if the walk does
                break
            child, draft_probs = next(drawn_from(draft, path[-1], probs))
            token = int(tree.tokens[child])
            stops.append(left_over(mass, probs, draft_probs))
            mass = min(1.0, mass * float(probs[token] / draft_probs[token]))
            path.append(child)
            tokens.append(token)
        noise = seq.noise_after([], ACCEPT)
        if noise.accepts(mass):
            try:
                return Accepted(path, [*tokens, noise.choose(target_probs())])
            except RequestError as error:
                return Accepted(path[:-1], tokens, error=error)
        stop = next(node for node in reversed(range(len(stops))) if noise.accepts(stops[node][0]))
        return Accepted(path[: stop + 1], [*tokens[:stop], noise.choose(stops[stop][1])], refused=True)
