# lists of arrays are of any type to mypy:
# mypy: disable-error-code="no-any-return"
"""A draft: a token tree as it grows, with what the drafter knows of it."""

from __future__ import annotations

from collections.abc import Callable
from operator import index

import numpy as np
import torch
from numpy.typing import NDArray

from tokentree import growing
from tokentree.errors import PairingError, TreeError
from tokentree.growing import DEPTH, LOG_PROB, LOG_SCORE, PARENT, RANK, SOURCES, TOKEN, Best
from tokentree.tree import Floats, Ints, TokenTree


class Draft:
    """A token tree that grows: candidate tokens with parents, scores and proposers. Parents come before children.

    The nodes are columns of the arrays `ints` and `floats`. The rows are named in `growing`. The properties that are
    lists are copies.

    Args:
        root: the last token of the text so far.
        sampled, level_seconds, levels, paid: see below.
        grown: `ints`, `floats`, and how many of their columns are nodes; by default the root is the only one.
        tree: of these nodes, if it is known.

    Attributes:
        level_seconds: the seconds that one more level would cost, for a drafter whose levels take a forward each.
        levels: the number of such levels so far.
        paid: the drafters that computed such levels, as a set of bits.
        sampled: None if children were chosen deterministically. Otherwise it holds, for each node whose children were
            drawn, the distribution float64[vocab] that its first child was drawn from. Further children were drawn from
            the same distribution without replacement, in index order.
        ints, floats: int64[5, room] and float64[2, room]. The first ``len(draft)`` columns are the nodes.
    """

    def __init__(
        self, root: int, sampled: dict[int, torch.Tensor] | None = None, level_seconds: float = 0.0, levels: int = 0,
        paid: int = 1, grown: tuple[Ints, Floats, int] | None = None, tree: TokenTree | None = None,
    ) -> None:  # fmt: skip
        self.root, self.sampled, self.level_seconds, self.levels, self.paid = root, sampled, level_seconds, levels, paid
        self.ints, self.floats, self._size = growing.planted(root, growing.ROOM) if grown is None else grown
        self._tree = tree

    def __len__(self) -> int:
        return self._size

    def __repr__(self) -> str:
        return f"Draft(tokens={self.tokens}, parents={self.parents}, log_probs={self.log_probs})"

    # -- its nodes, as lists ----------------------------------------------------------------------------------------

    @property
    def tokens(self) -> list[int]:
        """Per node, its token, as in `TokenTree`."""
        return self.ints[TOKEN, : self._size].tolist()

    @property
    def parents(self) -> list[int]:
        """Per node, its parent; -1 for the root."""
        return self.ints[PARENT, : self._size].tolist()

    @property
    def depths(self) -> list[int]:
        """Per node, its depth; 0 for the root."""
        return self.ints[DEPTH, : self._size].tolist()

    @property
    def ranks(self) -> list[int]:
        """Per node, its rank among its siblings in the drafter's order, from 0."""
        return self.ints[RANK, : self._size].tolist()

    @property
    def sources(self) -> list[int]:
        """Per node, the drafters that proposed it, as a set of bits."""
        return self.ints[SOURCES, : self._size].tolist()

    @property
    def log_probs(self) -> list[float]:
        """Per node, its conditional log-probability after its parent, by the drafter."""
        return self.floats[LOG_PROB, : self._size].tolist()

    @property
    def log_scores(self) -> list[float]:
        """Per node, the joint log-probability of the path to it, by the drafter."""
        return self.floats[LOG_SCORE, : self._size].tolist()

    @property
    def tree(self) -> TokenTree:
        """The nodes so far as a `TokenTree`. It is made again when the draft has grown."""
        if self._tree is None or len(self._tree) != self._size:
            self._tree = TokenTree(self.ints[TOKEN, : self._size], self.ints[PARENT, : self._size])
        return self._tree

    @property
    def depth(self) -> int:
        """The number of candidates on the longest path."""
        depths: list[int] = self.ints[DEPTH, : self._size].tolist()
        return max(depths)

    def path_tokens(self, node: int) -> list[int]:
        """The tokens on the path from the root (excluded) to ``node`` (included)."""
        return self._on_the_way(TOKEN, node)

    def rank_path(self, node: int) -> tuple[int, ...]:
        """The ranks on the path from the root (excluded) to ``node`` (included). Medusa names nodes so."""
        return tuple(self._on_the_way(RANK, node))

    def _on_the_way(self, row: int, node: int) -> list[int]:
        values = []
        while node > 0:
            values.append(int(self.ints[row, node]))
            node = int(self.ints[PARENT, node])
        return values[::-1]

    # -- how it grows ------------------------------------------------------------------------------------------------

    def add(self, parent: int, token: int, log_prob: float, rank: int, source: int = 1) -> int:
        """Adds a child of ``parent`` with the conditional log-probability ``log_prob``, and returns its index.

        Raises:
            TreeError: if there is no such parent, or a number doesn't fit into int64.
        """
        node = self._size
        if not 0 <= parent < node:
            raise TreeError(f"the draft has no node {parent}: it has {node}")
        self._reserve(1)
        try:
            self.ints[:, node] = index(token), index(parent), self.ints[DEPTH, parent] + 1, index(rank), index(source)
        except (TypeError, OverflowError):
            raise TreeError(f"tokens and ranks of a draft are whole numbers, not {token!r} and {rank!r}") from None
        self.floats[:, node] = log_prob, self.floats[LOG_SCORE, parent] + log_prob
        self._size += 1
        return node

    def add_level(
        self, frontier: list[int], counts: list[int], tokens: Ints, log_probs: NDArray[np.float32]
    ) -> list[int]:
        """Adds children below each node of ``frontier``, and returns the new nodes.

        Args:
            counts: the number of children of each node. Those with log-probability -inf are left out.
            tokens, log_probs: [nodes, k], the candidates below each node, best first.
        """
        first = self._size
        self._reserve(tokens.size)
        self._size = growing.grow_level(
            self.ints, self.floats, first, np.array(frontier, np.int64), np.array(counts, np.int64),
            np.ascontiguousarray(tokens, np.int64), np.ascontiguousarray(log_probs, np.float32),
        )  # fmt: skip
        return list(range(first, self._size))

    def add_best(self, frontier: list[int], counts: list[int], found: Best, token_map: Ints) -> list[int]:
        """`add_level`, with what a forward has ``found`` after rows of its own; ``token_map`` has this draft's tokens
        for those, unless it is empty."""
        first, (rows, logits, tokens, log_sums) = self._size, found
        self._reserve(len(frontier) * tokens.shape[1])
        self._size = growing.grow_best(
            self.ints, self.floats, first, np.array(frontier, np.int64), np.array(counts, np.int64), rows, logits,
            tokens, log_sums, token_map,
        )  # fmt: skip
        return list(range(first, self._size))

    def add_paths(self, paths: list[list[int]], firsts: list[float], others: float) -> None:
        """Adds paths from the root. Equal beginnings are added once.

        Args:
            paths: the tokens of each path.
            firsts: the log-probability of the first token of each path.
            others: the log-probability of every other token.
        """
        lengths = [len(path) for path in paths]
        tokens = np.array([token for path in paths for token in path], np.int64)
        self._reserve(len(tokens))
        self._size = growing.grow_paths(
            self.ints, self.floats, self._size, tokens, np.cumsum(lengths, dtype=np.int64), np.array(firsts), others
        )

    @classmethod
    def grown(cls, root: int, tokens: Ints, parents: Ints, probs: Floats) -> Draft:
        """A draft from arrays: node i + 1 carries ``tokens[i]`` under node ``parents[i]``, with the conditional
        probability ``probs[i]`` above 0; siblings come best first."""
        return cls(root, grown=growing.grown(root, tokens, parents, probs))

    def join(self, other: Draft, source: int) -> None:
        """Adds all nodes of ``other``, which has the same root, as proposed by ``source``. Equal paths are joined: a
        node of both drafts keeps the higher probability and the lower rank. What the levels of both took adds up."""
        if other.levels:
            spent = self.level_seconds * self.levels + other.level_seconds * other.levels
            self.paid, self.levels = self.paid | source, max(self.levels, other.levels)
            self.level_seconds = spent / self.levels
        self._reserve(len(other))
        self._size = growing.join(self.ints, self.floats, self._size, other.ints, other.floats, len(other), source)

    def grow(self, loop: Callable[..., int], most: int, source: int, *told: object) -> None:
        """Has the compiled ``loop(ints, floats, size, source, *told)`` join what it finds, at most so many nodes; it
        returns the new size."""
        self._reserve(most)
        self._size = loop(self.ints, self.floats, self._size, source, *told)

    def _reserve(self, nodes: int) -> None:
        """Makes room for so many more."""
        room = self.ints.shape[1]
        if self._size + nodes > room:
            more = ((0, 0), (0, max(room, nodes)))
            self.ints, self.floats = np.pad(self.ints, more), np.pad(self.floats, more)

    # -- parts of it -------------------------------------------------------------------------------------------------

    def take(self, nodes: Ints | list[int]) -> Draft:
        """The draft of ``nodes`` alone (ascending, the root and every parent among them).

        Raises:
            PairingError: if children were drawn at random: dropping one by what it is would change the distribution
                of the text.
        """
        if len(nodes) == len(self):
            return self
        if self.sampled is not None:
            raise PairingError("a draft whose children were drawn at random can't be pruned: use accept='match'")
        return self._taken(nodes)

    def take_marked(self, marks: NDArray[np.bool_], first: int) -> Draft:
        """`take` for the root and the marked nodes. ``marks[first]`` is the mark of node 1."""
        if self.sampled is not None:
            raise PairingError("a draft whose children were drawn at random can't be pruned: use accept='match'")
        return self.taken(*growing.take_marked(self.ints, self.floats, self._size, marks, first))

    def taken(self, ints: Ints, floats: Floats, size: int, fault: int, is_chain: bool) -> Draft:
        """The draft of what `growing.take_marked` took of this one."""
        tree = TokenTree.of(ints[TOKEN], ints[PARENT], ints[DEPTH], fault, is_chain)
        return Draft(self.root, None, self.level_seconds, self.levels, self.paid, (ints, floats, size), tree)

    def cut(self, depth: int) -> Draft:
        """The draft without the nodes deeper than ``depth``. Drawn children may be dropped too, since whole levels
        are."""
        if self._size <= depth + 1 or self.depth <= depth:
            return self
        kept = np.flatnonzero(self.ints[DEPTH, : self._size] <= depth)
        short = self._taken(kept)
        if self.sampled is not None:
            inner = [(new, old) for new, old in enumerate(kept.tolist()) if self.ints[DEPTH, old] < depth]
            short.sampled = {new: self.sampled[old] for new, old in inner if old in self.sampled}
        return short

    def _taken(self, nodes: Ints | list[int]) -> Draft:
        ints, floats = growing.take(self.ints, self.floats, self._size, np.asarray(nodes, np.int64))
        return Draft(self.root, None, self.level_seconds, self.levels, self.paid, (ints, floats, len(nodes)))
