"""A draft: a token tree as it grows, with what the drafter knows of it."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import torch

from tokentree.errors import PairingError, TreeError
from tokentree.tree import Floats, Ints, TokenTree


@dataclass(eq=False)
class Draft:
    """Candidate tokens with parents, scores and origin; grown node by node, parents first.

    Args:
        root: the last token of the text so far.

    Attributes:
        tokens, parents, depths: per node, as in `TokenTree`.
        ranks: per node, its place among its siblings as the drafter ordered them, from 0.
        log_probs: per node, the log-probability that the drafter gives it after its parent.
        log_scores: per node, the joint log-probability that the drafter gives the path to it.
        sources: per node, a set of bits: the drafters that proposed it.
        level_seconds: what one more level costs the drafter, where a level takes a forward of its own.
        levels: how many it has paid for so far.
        paid: a set of bits: the drafters that pay for levels, if any did.
        sampled: None if children were picked deterministically. Otherwise, for each node whose children were drawn,
            the distribution float64[vocab] that the first was drawn from; the others were drawn from the same without
            replacement, in index order.
    """

    root: int
    sampled: dict[int, torch.Tensor] | None = None
    level_seconds: float = 0.0
    levels: int = 0
    paid: int = 1
    tokens: list[int] = field(init=False)
    parents: list[int] = field(init=False)
    depths: list[int] = field(init=False)
    ranks: list[int] = field(init=False)
    log_probs: list[float] = field(init=False)
    log_scores: list[float] = field(init=False)
    sources: list[int] = field(init=False)
    _tree: TokenTree | None = field(init=False, default=None, repr=False)

    def __post_init__(self) -> None:
        self.tokens, self.parents, self.depths = [self.root], [-1], [0]
        self.ranks, self.log_probs, self.log_scores, self.sources = [0], [0.0], [0.0], [0]

    def __len__(self) -> int:
        return len(self.tokens)

    def add(self, parent: int, token: int, log_prob: float, rank: int, source: int = 1) -> int:
        """Adds a child of ``parent`` to which the drafter gives conditional log-probability ``log_prob``.

        Raises:
            TreeError: if there is no such parent.
        """
        if not 0 <= parent < len(self.tokens):
            raise TreeError(f"the draft has no node {parent}: it has {len(self.tokens)}")
        self.tokens.append(token)
        self.parents.append(parent)
        self.depths.append(self.depths[parent] + 1)
        self.ranks.append(rank)
        self.log_probs.append(log_prob)
        self.log_scores.append(self.log_scores[parent] + log_prob)
        self.sources.append(source)
        return len(self.tokens) - 1

    def rescore(self) -> None:
        """Makes `log_scores` the sums of `log_probs` again, after these were changed."""
        for node in range(1, len(self)):
            self.log_scores[node] = self.log_scores[self.parents[node]] + self.log_probs[node]

    @classmethod
    def grown(cls, root: int, tokens: Ints, parents: Ints, probs: Floats) -> Draft:
        """A draft from arrays: node i + 1 carries ``tokens[i]`` under node ``parents[i]``, with the conditional
        probability ``probs[i]`` above 0; siblings come best first."""
        draft, ranks = cls(root), [0] * (len(tokens) + 1)
        for token, parent, score in zip(tokens.tolist(), parents.tolist(), np.log(probs).tolist(), strict=True):
            draft.add(parent, token, score, ranks[parent])
            ranks[parent] += 1
        return draft

    @property
    def tree(self) -> TokenTree:
        """The nodes so far as a `TokenTree`, made once for each size."""
        if self._tree is None or len(self._tree) != len(self):
            self._tree = TokenTree(np.array(self.tokens), np.array(self.parents))
        return self._tree

    def path_tokens(self, node: int) -> list[int]:
        """The tokens below the root on the way to ``node``, which is included."""
        tokens = []
        while node > 0:
            tokens.append(self.tokens[node])
            node = self.parents[node]
        return tokens[::-1]

    def rank_path(self, node: int) -> tuple[int, ...]:
        """The ranks below the root on the way to ``node``: Medusa's way to name a node."""
        ranks = []
        while node > 0:
            ranks.append(self.ranks[node])
            node = self.parents[node]
        return tuple(ranks[::-1])

    def take(self, nodes: Ints | list[int]) -> Draft:
        """The draft of ``nodes`` alone (ascending, the root and every parent among them).

        Raises:
            PairingError: if children were drawn at random: dropping one by what it is would change the distribution
                of the text.
        """
        nodes = [int(node) for node in nodes]
        if len(nodes) == len(self):
            return self
        if self.sampled is not None:
            raise PairingError("a draft whose children were drawn at random can't be pruned: use accept='match'")
        return self._taken(nodes)

    def cut(self, depth: int) -> Draft:
        """The draft without nodes below ``depth``. Whole levels go, whatever they hold, so drawn children may too."""
        if max(self.depths) <= depth:
            return self
        kept = [node for node, below in enumerate(self.depths) if below <= depth]
        short = self._taken(kept)
        if self.sampled is not None:
            inner = [(new, old) for new, old in enumerate(kept) if self.depths[old] < depth]
            short.sampled = {new: self.sampled[old] for new, old in inner if old in self.sampled}
        return short

    def _taken(self, nodes: list[int]) -> Draft:
        where = {old: new for new, old in enumerate(nodes)}
        part = Draft(self.root, None, self.level_seconds, self.levels, self.paid)
        part.tokens = [self.tokens[node] for node in nodes]
        part.parents = [-1, *(where[self.parents[node]] for node in nodes[1:])]
        part.depths = [self.depths[node] for node in nodes]
        part.ranks = [self.ranks[node] for node in nodes]
        part.log_probs = [self.log_probs[node] for node in nodes]
        part.log_scores = [self.log_scores[node] for node in nodes]
        part.sources = [self.sources[node] for node in nodes]
        return part
