"""A radix tree over token ids: what texts begin with in common is there once."""

from __future__ import annotations

import heapq
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Generic, Protocol, Self, TypeVar

import numpy as np

from tokentree.errors import InvariantError, OptionError
from tokentree.tree import Ints


class Run(Protocol):
    """What stands for the KV rows of a run of tokens: the rows themselves, or numbers of pages that hold them."""

    @property
    def nbytes(self) -> int:
        """Memory, in bytes."""

    def __len__(self) -> int:
        """Rows."""

    def split(self, at: int) -> tuple[Self, Self]:
        """The first ``at`` rows, and the rest. This one isn't used any more."""


Rows = TypeVar("Rows", bound=Run)


@dataclass(eq=False)
class Node(Generic[Rows]):
    """A run of tokens behind those of its parents.

    Args:
        tokens: [n], at least one.
        rows: of these tokens.
        parent: None where the tokens begin a text.
        children: what goes on from here, by their first ``granule`` tokens.
        references: locks of this node and of all below it.
        used: when it was last used, counted in uses of the tree.
    """

    tokens: Ints
    rows: Rows
    parent: Node[Rows] | None
    children: dict[bytes, Node[Rows]] = field(default_factory=dict)
    references: int = 0
    used: int = 0


class RadixTree(Generic[Rows]):
    """The rows of many texts, those of a common beginning once. It is for one thread at a time.

    Runs are split where texts part. A split keeps the node as the later part, so that who locked it holds both.

    Source: SGLang's RadixAttention, arXiv 2312.07104.

    Args:
        granule: runs begin and end at multiples of so many tokens: the size of a page where rows are pages.

    Attributes:
        nbytes: of all rows.
        num_rows: all of them.

    Raises:
        OptionError: if ``granule`` is below 1.
    """

    def __init__(self, granule: int = 1) -> None:
        if granule < 1:
            raise OptionError(f"granule={granule!r} must be at least 1")
        self._granule = granule
        self._top: dict[bytes, Node[Rows]] = {}
        self._clock = 0
        self.nbytes = self.num_rows = 0

    def nodes(self) -> Iterator[Node[Rows]]:
        """All of them, parents first."""
        waiting = list(self._top.values())
        while waiting:
            yield (node := waiting.pop())
            waiting.extend(node.children.values())

    def match(self, tokens: Ints) -> list[tuple[Node[Rows], int]]:
        """The nodes of the longest beginning of ``tokens`` that is known, from the first on, and how many tokens of
        each. All but the last are whole. This is no use of them: `lock` and `insert` are."""
        path, children, start = list[tuple[Node[Rows], int]](), self._top, 0
        while node := children.get(self._key(tokens[start:])):
            length = self._whole(shared_length(node.tokens, tokens[start:]))
            path.append((node, length))
            if length < len(node.tokens):
                break
            children, start = node.children, start + length
        return path

    def insert(self, tokens: Ints, rows_from: Callable[[int, int], Rows]) -> int:
        """Makes ``tokens`` known, up to a multiple of ``granule``. Returns how many were known before.

        Args:
            tokens: [n], of a text from its beginning.
            rows_from: called for rows start to end - 1 of the text, if these are new.
        """
        end, path = self._whole(len(tokens)), self.match(tokens)
        start = sum(length for _, length in path)
        node, length = path[-1] if path else (None, 0)
        if start < end:
            if node is not None and length < len(node.tokens):
                node = self._split(node, length)
            new = Node(np.array(tokens[start:end], np.int64), rows_from(start, end), node)
            self._beside(new)[self._key(new.tokens)] = new
            self.nbytes += new.rows.nbytes
            self.num_rows += len(new.rows)
            node = new
        self._use(node)
        return start

    def put(self, node: Node[Rows], rows: Rows) -> None:
        """Exchanges the rows of ``node`` for as many others."""
        self.nbytes += rows.nbytes - node.rows.nbytes
        node.rows = rows

    def lock(self, node: Node[Rows]) -> None:
        """Uses ``node`` and its parents, and keeps them until `unlock`."""
        self._use(node)
        for each in _upward(node):
            each.references += 1

    def unlock(self, node: Node[Rows]) -> None:
        """Takes one `lock` of ``node`` back.

        Raises:
            InvariantError: if there is none.
        """
        if node.references <= _references(node):
            raise InvariantError("a node of the radix tree is unlocked more often than it was locked")
        for each in _upward(node):
            each.references -= 1

    def evict(self, nbytes: int) -> list[Rows]:
        """Drops leaves that nobody has locked, those that weren't used for longest first, until ``nbytes`` bytes are
        free or none is left; returns their rows. A node whose children are all gone is a leaf too."""
        leaves = [(node.used, node) for node in self.nodes() if _evictable(node)]
        heapq.heapify(leaves)  # no two leaves were last used at the same time
        gone, enough = list[Rows](), self.nbytes - nbytes
        while leaves and self.nbytes > enough:
            node = heapq.heappop(leaves)[1]
            del self._beside(node)[self._key(node.tokens)]
            self.nbytes -= node.rows.nbytes
            self.num_rows -= len(node.rows)
            gone.append(node.rows)
            if node.parent is not None and _evictable(node.parent):
                heapq.heappush(leaves, (node.parent.used, node.parent))
        return gone

    def check(self) -> None:
        """Looks at all of it, for tests.

        Raises:
            InvariantError: if anything is not as it has to be.
        """
        levels: list[tuple[Node[Rows] | None, dict[bytes, Node[Rows]]]] = [(None, self._top)]
        nbytes = num_rows = 0
        leaves = set[int]()
        while levels:
            parent, children = levels.pop()
            for key, node in children.items():
                _expect(node.parent is parent, "a node's parent is another one")
                _expect(len(node.tokens) > 0, "a run is empty")
                _expect(len(node.tokens) % self._granule == 0, f"a run is no multiple of {self._granule} tokens")
                _expect(key == self._key(node.tokens), "a node isn't found by its first tokens")
                _expect(len(node.rows) == len(node.tokens), "a run has not one row for each token")
                _expect(node.references >= 0, "a node has fewer references than none")
                _expect(node.used <= self._clock, "a node was used later than now")
                nbytes, num_rows = nbytes + node.rows.nbytes, num_rows + len(node.rows)
                levels.append((node, node.children))
                if not node.children:
                    _expect(node.used not in leaves, "two leaves were last used at the same time")
                    leaves.add(node.used)
            if parent is not None:
                below, used = _references(parent), max((child.used for child in children.values()), default=0)
                _expect(parent.references >= below, "a node has fewer references than its children")
                _expect(parent.used >= used, "a node was last used before its children")
        _expect(nbytes == self.nbytes, f"{self.nbytes} bytes are counted, and there are {nbytes}")
        _expect(num_rows == self.num_rows, f"{self.num_rows} rows are counted, and there are {num_rows}")

    def _whole(self, count: int) -> int:
        return count // self._granule * self._granule

    def _key(self, tokens: Ints) -> bytes:
        """What a node is found by; shorter than any node's where too few tokens are left."""
        return np.ascontiguousarray(tokens[: self._granule], np.int64).tobytes()

    def _beside(self, node: Node[Rows]) -> dict[bytes, Node[Rows]]:
        """Where ``node`` is found."""
        return self._top if node.parent is None else node.parent.children

    def _split(self, node: Node[Rows], at: int) -> Node[Rows]:
        """Makes ``node`` the part from token ``at`` on; returns the part before, now its parent."""
        first, rest = node.rows.split(at)
        self.nbytes += first.nbytes + rest.nbytes - node.rows.nbytes
        tokens = node.tokens[at:]
        head = Node(node.tokens[:at], first, node.parent, {self._key(tokens): node}, node.references, node.used)
        self._beside(node)[self._key(head.tokens)] = head
        node.tokens, node.rows, node.parent = tokens, rest, head
        return head

    def _use(self, node: Node[Rows] | None) -> None:
        self._clock += 1
        for each in _upward(node):
            each.used = self._clock


def shared_length(one: Ints, other: Ints) -> int:
    """How many tokens both begin with."""
    length = min(len(one), len(other))
    differ = np.flatnonzero(one[:length] != other[:length])
    return int(differ[0]) if differ.size else length


def _upward(node: Node[Rows] | None) -> Iterator[Node[Rows]]:
    while node is not None:
        yield node
        node = node.parent


def _references(node: Node[Rows]) -> int:
    """Of its children."""
    return sum(child.references for child in node.children.values())


def _evictable(node: Node[Rows]) -> bool:
    return not node.children and not node.references


def _expect(holds: bool, broken: str) -> None:
    if not holds:
        raise InvariantError(f"a radix tree is damaged: {broken}")
