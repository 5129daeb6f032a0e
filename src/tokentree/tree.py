# numba gives every scalar a type of its own, which annotations can't follow:
# mypy: disable-error-code="index,assignment"
"""The token tree: candidate continuations of one text, as numpy arrays.

Node 0 is the *root*, the last token of the text so far. Every other node is a candidate token that follows its
parent. A path from the root is one candidate continuation; a chain is a tree with one child per node.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from tokentree.errors import TreeError
from tokentree.jit import njit

Ints = NDArray[np.int64]
Floats = NDArray[np.float64]
Bools = NDArray[np.bool_]


@dataclass(frozen=True, eq=False)
class TokenTree:
    """Tokens with parents, in an order where parents come first.

    Args:
        tokens: int64[n], the token of each node; ``tokens[0]`` is the root.
        parents: int64[n], the parent's index; ``parents[0] == -1`` and ``0 <= parents[i] < i`` elsewhere.

    Raises:
        TreeError: if the arrays do not describe such a tree, or two siblings carry the same token.
    """

    tokens: Ints
    parents: Ints
    depths: Ints = field(init=False, repr=False)  # int64[n]: the root has depth 0
    is_chain: bool = field(init=False, repr=False)  # whether each node but the last has one child

    def __post_init__(self) -> None:
        tokens, parents = _numbers(self.tokens), _numbers(self.parents)
        if tokens.ndim != 1 or tokens.shape != parents.shape or tokens.size == 0:
            raise TreeError("a token tree needs as many parents as tokens, and at least a root")
        self._set(*_read(tokens, parents))

    def _set(self, tokens: Ints, parents: Ints, depths: Ints, fault: int, is_chain: bool) -> None:
        if fault == DISORDER:
            raise TreeError("parents must come before their children, and only node 0 is without one")
        if fault == TWINS:
            raise TreeError("siblings must carry different tokens")
        tokens.flags.writeable = parents.flags.writeable = depths.flags.writeable = False
        # what a frozen dataclass lets nobody set
        self.__dict__.update(tokens=tokens, parents=parents, depths=depths, is_chain=is_chain)

    # -- ways to make one ---------------------------------------------------------------------------------------

    @classmethod
    def of(cls, tokens: Ints, parents: Ints, depths: Ints, fault: int, is_chain: bool) -> TokenTree:
        """The tree of arrays that nobody changes, of which `check` has said so."""
        tree = cls.__new__(cls)
        tree._set(tokens, parents, depths, fault, is_chain)
        return tree

    @classmethod
    def root(cls, token: int) -> TokenTree:
        """The tree without candidates: verifying it is plain decoding."""
        return cls(np.array([token]), np.array([-1]))

    @classmethod
    def chain(cls, root: int, tokens: Sequence[int]) -> TokenTree:
        """One path: linear speculation."""
        return cls(np.array([root, *tokens]), np.arange(-1, len(tokens)))

    @classmethod
    def from_paths(cls, root: int, paths: Iterable[Sequence[int]]) -> TokenTree:
        """The tree of all ``paths`` (token ids below the root), equal prefixes joined."""
        tokens, parents, known = [root], [-1], dict[tuple[int, int], int]()
        for path in paths:
            node = 0
            for token in map(int, path):
                if (node, token) not in known:
                    known[node, token] = len(tokens)
                    tokens.append(token)
                    parents.append(node)
                node = known[node, token]
        return cls(np.array(tokens), np.array(parents))

    # -- what it looks like -------------------------------------------------------------------------------------

    def __len__(self) -> int:
        return len(self.tokens)

    @cached_property
    def mask(self) -> Bools:
        """bool[n, n]: ``mask[i, j]`` where node i sees node j, that is, j is i or one of its ancestors."""
        mask = np.eye(len(self), dtype=np.bool_)
        for node in range(1, len(self)):
            mask[node] |= mask[self.parents[node]]
        return mask

    @cached_property
    def children(self) -> tuple[tuple[int, ...], ...]:
        """The children of each node, in index order."""
        children: list[list[int]] = [[] for _ in range(len(self))]
        for node, parent in enumerate(self.parents[1:].tolist(), start=1):
            children[parent].append(node)
        return tuple(map(tuple, children))

    def child(self, node: int, token: int) -> int | None:
        """The child of ``node`` that carries ``token``, if there is one."""
        return self._places.get((node, token))

    @cached_property
    def _places(self) -> dict[tuple[int, int], int]:
        return {place: node for node, place in enumerate(zip(self.parents.tolist(), self.tokens.tolist(), strict=True))}

    def is_leaf(self, node: int) -> bool:
        """Whether ``node`` has no children."""
        return node not in self._inner

    @cached_property
    def _inner(self) -> frozenset[int]:
        return frozenset(self.parents.tolist())

    @cached_property
    def leaves(self) -> Ints:
        """int64[k]: the nodes without children."""
        return np.array([node for node, below in enumerate(self.children) if not below], dtype=np.int64)

    def path(self, node: int) -> list[int]:
        """The nodes from the root (included) down to ``node`` (included)."""
        nodes = []
        while node >= 0:
            nodes.append(node)
            node = int(self.parents[node])
        return nodes[::-1]

    def paths(self) -> list[list[int]]:
        """The tokens below the root of every root-to-leaf path, in leaf order."""
        return [self.tokens[self.path(leaf)[1:]].tolist() for leaf in self.leaves]

    # -- parts ---------------------------------------------------------------------------------------------------

    def take(self, nodes: Ints) -> TokenTree:
        """The tree of ``nodes`` alone, in the order given.

        Raises:
            TreeError: if the order does not start at the root, or leaves out or postpones a node's parent.
        """
        nodes = np.asarray(nodes, dtype=np.int64)
        if nodes.size == 0 or nodes[0] != 0 or (nodes[1:] <= 0).any() or (nodes >= len(self)).any():
            raise TreeError("a part of a tree starts at the root and holds nodes of the tree")
        where = np.full(len(self), -1, dtype=np.int64)
        where[nodes] = np.arange(nodes.size)
        parents = np.where(nodes == 0, -1, where[self.parents[nodes]])
        if (parents[1:] < 0).any():
            raise TreeError("a part of a tree holds the parent of each of its nodes")
        return TokenTree(self.tokens[nodes], parents)


def _numbers(values: object) -> Ints:
    """``values``, which must be whole numbers, as int64."""
    if type(values) is np.ndarray and values.dtype == np.int64:
        return values
    try:
        array = np.asarray(values)
        if array.dtype.kind not in "iu" and array.size:
            raise TypeError
        return np.array(array, dtype=np.int64)
    except (TypeError, ValueError, OverflowError, RuntimeError):
        raise TreeError("tokens and parents of a token tree are whole numbers") from None


# -- the loops, compiled by numba --------------------------------------------------------------------------------------

SOUND, DISORDER, TWINS = range(3)


@njit(cache=True)
def _read(tokens: Ints, parents: Ints) -> tuple[Ints, Ints, Ints, int, bool]:
    """Copies of these arrays, the depths of their nodes, and what `check` says of them."""
    tokens, parents, depths = tokens.copy(), parents.copy(), np.zeros(len(tokens), np.int64)
    fault, is_chain = check(tokens, parents, depths)
    return tokens, parents, depths, fault, is_chain


@njit
def check(tokens: Ints, parents: Ints, depths: Ints) -> tuple[int, bool]:
    """What is wrong with a tree's tokens and parents, and whether it is a chain. Fills in the depths."""
    is_chain, depths[0] = True, 0
    if parents[0] != -1:
        return DISORDER, is_chain
    latest, before = np.zeros(len(tokens), np.int64), np.zeros(len(tokens), np.int64)  # children: one, and those before
    for node in range(1, len(tokens)):
        parent = parents[node]
        if not 0 <= parent < node:
            return DISORDER, is_chain
        sibling = latest[parent]
        while sibling:
            if tokens[sibling] == tokens[node]:
                return TWINS, is_chain
            sibling = before[sibling]
        latest[parent], before[node] = node, latest[parent]
        depths[node] = depths[parent] + 1
        is_chain &= parent == node - 1
    return SOUND, is_chain
