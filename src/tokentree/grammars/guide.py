"""What a grammar allows after a text, and after each node of a tree below it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tokentree.errors import RequestError

Bits = NDArray[np.uint8]


@dataclass
class Beginning:
    """A compiled grammar.

    Args:
        matcher: an `LLMatcher` at the beginning of a text. It is copied for each text.
        worn: whether a copy failed. Copies share what they find out, which has a limit.
    """

    matcher: Any
    worn: bool = False


class Guide:
    """Where one text stands in its grammar.

    What is allowed depends on the text alone: neither on the tree nor on what was asked before. One matcher goes from
    node to node, a token forward or back.

    A token that ends the text is allowed where the grammar may end, and nothing else where it can't go on.

    Args:
        start: the compiled grammar.
        ends: tokens that end the text.
        end: the token by which the matcher says that the text may end. No model has it.
        hidden: uint8, a bit for each token that is never allowed.

    Attributes:
        ends: tokens that end the text.
    """

    def __init__(self, start: Beginning, ends: frozenset[int], end: int, hidden: Bits) -> None:
        self.ends, self._start, self._end, self._hidden = ends, start, end, hidden
        self._text = list[int]()  # the tokens of the output
        self._path = list[int]()  # where the matcher is, below them
        self._unread = list[int]()  # of the output, what the matcher hasn't read yet; then it is below nothing
        self._matcher: Any = None
        self._known: dict[tuple[int, ...], Bits | None] = {}

    def follow(self, tokens: Sequence[int], begin: int) -> None:
        """The output is ``tokens`` from place ``begin`` on; only new tokens are looked at."""
        new = tokens[begin + len(self._text) :]
        if new:
            self._text += new
            self._known.clear()
            shared = self._back_to(new)
            del self._path[:shared]
            self._unread += new[shared:]

    def allowed(self, path: Sequence[int]) -> Bits | None:
        """uint8[n]: a bit for each token, the lowest of a byte first: whether it may come after the output and
        ``path``. None behind the end of the text, where nothing is asked.

        Raises:
            RequestError: if the matcher fails there, for instance because its limits are reached.
        """
        key = tuple(path)
        if key not in self._known:
            self._known[key] = self._computed(path)
        return self._known[key]

    def allows(self, path: Sequence[int], token: int) -> bool:
        """Whether ``token`` may come after ``path``; nothing comes behind the end of the text.

        Raises:
            RequestError: as `allowed`.
        """
        bits = self.allowed(path)
        return bits is not None and 0 <= token < 8 * len(bits) and bool(bits[token >> 3] >> (token & 7) & 1)

    def has_one(self, path: Sequence[int]) -> bool:
        """Whether only one token may come after ``path``.

        Raises:
            RequestError: as `allowed`.
        """
        bits = self.allowed(path)
        return bits is not None and int(np.bitwise_count(bits).sum()) == 1

    def forced(self, path: Sequence[int], count: int) -> list[int]:
        """The tokens that must come after ``path`` one after another, at most ``count``; none where there is a choice.

        Raises:
            RequestError: as `allowed`.
        """
        if count < 1 or self._has_end(path):
            return []
        self._go(path)
        tokens: list[int] = self._matcher.compute_ff_tokens()
        self._check()
        if len(tokens) < count and len(self.ends) == 1:
            self._go([*path, *tokens])
            if self._matcher.is_stopped():
                tokens = [*tokens, *self.ends]
        return tokens[:count]

    def completes(self, path: Sequence[int]) -> bool:
        """Whether the text ends with ``path`` though no token ends texts: its grammar can't go on.

        Raises:
            RequestError: as `allowed`.
        """
        if self.ends:
            return False
        self._go(path)
        return bool(self._matcher.is_stopped())

    # -- the matcher -------------------------------------------------------------------------------------------------

    def _computed(self, path: Sequence[int]) -> Bits | None:
        if self._has_end(path):
            return None
        self._go(path)
        bits = np.frombuffer(self._matcher.compute_bitmask(), np.uint8) & ~self._hidden
        self._check()
        may_end = bits[self._end >> 3] >> (self._end & 7) & 1
        bits[self._end >> 3] &= ~np.uint8(1 << (self._end & 7))
        if may_end and not self.ends and path and not bits.any():
            return None
        if may_end and self.ends:
            bits = np.pad(bits, (0, max(0, (max(self.ends) >> 3) + 1 - len(bits))))
            for token in self.ends:
                bits[token >> 3] |= np.uint8(1 << (token & 7))
        return bits

    def _has_end(self, path: Sequence[int]) -> bool:
        return not self.ends.isdisjoint(path) or (bool(self._text) and self._text[-1] in self.ends)

    def _go(self, path: Sequence[int]) -> None:
        """Moves the matcher below the output, to the end of ``path``."""
        if self._matcher is None:
            self._matcher, self._path, self._unread = self._start.matcher.deep_copy(), [], [*self._text]
        if self._unread:
            unread, self._unread = self._unread, []
            self._read(unread)
        ahead = path[self._back_to(path) :]
        self._read(ahead)
        self._path += ahead

    def _back_to(self, path: Sequence[int]) -> int:
        """Moves the matcher up to a node on ``path``, and returns how deep that is."""
        shared, most = 0, min(len(self._path), len(path))
        while shared < most and self._path[shared] == path[shared]:
            shared += 1
        if shared < min(len(self._path), len(path)) or len(self._path) > len(path):
            if self._matcher is not None:
                self._matcher.rollback(len(self._path) - shared)
            del self._path[shared:]
        return shared

    def _read(self, tokens: Sequence[int]) -> None:
        if tokens and self._matcher.try_consume_tokens(list(tokens)) < len(tokens):
            self._check()
            self._matcher = None
            raise RequestError(
                f"after {len(self._text)} new tokens the request's grammar doesn't go on as the text does"
            )

    def _check(self) -> None:
        """A matcher that failed stays so: the next one begins anew."""
        if self._matcher.is_error():
            said, self._matcher, self._start.worn = self._matcher.get_error().strip().splitlines(), None, True
            raise RequestError(f"the request's grammar failed after {len(self._text)} new tokens: {said[0][:200]}")
