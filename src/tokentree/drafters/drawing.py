"""Children that are drawn from a drafter's distribution."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch.nn.functional import pad

from tokentree.draft import Draft
from tokentree.errors import RequestError
from tokentree.growing import DEPTH
from tokentree.sampling import Noise, to_probs
from tokentree.sequence import Sequence
from tokentree.shapes.base import Shape
from tokentree.tree import Ints


def whole(logits: torch.Tensor, vocab_size: int, token_map: Ints | None) -> torch.Tensor:
    """float32[n, vocab_size], of ``logits`` [n, tokens that the drafter knows]; -inf where it knows none.

    Args:
        vocab_size: the target's.
        token_map: int64[tokens], the target's ids for the logits, if these are others.
    """
    if token_map is None:
        return pad(logits.float(), (0, vocab_size - logits.shape[1]), value=-math.inf)
    filled = logits.new_full((len(logits), vocab_size), -math.inf, dtype=torch.float32)
    return filled.index_copy(1, torch.from_numpy(token_map).to(logits.device), logits.float())


def draw(
    seq: Sequence, draft: Draft, node: int, count: int, logits: torch.Tensor, noise: Noise
) -> list[int]:  # fmt: skip
    """Adds ``count`` children of ``node``, drawn without replacement, and keeps what they were drawn from in
    `Draft.sampled`. Fewer where the distribution has fewer tokens. Returns the new nodes.

    Args:
        logits: [vocab], what the drafter says after ``node``; the request's rules are applied to it.
        noise: `Sequence.noise_below` of the node.
    """
    try:
        probs = to_probs(seq.processed(logits, draft.path_tokens(node)), seq.params)
    except RequestError:  # whether the rules fail in the text too is found when the target comes there
        return []
    assert draft.sampled is not None
    draft.sampled[node] = probs
    left, level = probs.clone(), list[int]()
    for rank in range(min(count, int((probs > 0).sum()))):
        token = noise.choose(left)
        level.append(draft.add(node, token, float(probs[token].log()), rank))
        left[token] = 0
    return level


def drawn(seq: Sequence, shape: Shape, depth: int, said: Callable[[Draft, int], torch.Tensor]) -> Draft:
    """A draft of at most ``depth`` levels, whose children are drawn.

    Args:
        said: ``said(draft, node)`` is [vocab], what the drafter says after that node.
    """
    draft = Draft(seq.tokens[-1], {})
    frontier = shape.select(seq, draft, [0])
    while frontier:
        level = list[int]()
        for node, count in zip(frontier, shape.counts(seq, draft, frontier), strict=True):
            level += draw(seq, draft, node, count, said(draft, node), seq.noise_below(node))
        deeper = level and int(draft.ints[DEPTH, level[0]]) < depth
        frontier = shape.select(seq, draft, level) if deeper else []
    return draft
