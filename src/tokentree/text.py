"""Token ids to text, a few tokens at a time."""

from __future__ import annotations

from collections.abc import Callable, Sequence

Decode = Callable[[list[int]], str]


class Detokenizer:
    """Turns a growing list of token ids into a growing text.

    A token may hold half a character, and some tokenizers drop a leading space; so each piece is decoded behind a few
    earlier tokens, and text that ends in an unfinished character is held back until it is whole.
    """

    def __init__(self, decode: Decode) -> None:
        self._decode = decode
        self._ids: list[int] = []
        self._start = 0  # where the window that is decoded begins
        self._shown = 0  # tokens whose text was given out
        self.text = ""

    def copy(self) -> Detokenizer:
        twin = Detokenizer(self._decode)
        twin._ids, twin._start, twin._shown, twin.text = self._ids.copy(), self._start, self._shown, self.text
        return twin

    def push(self, ids: Sequence[int]) -> str:
        """Adds ``ids``; returns the text that became certain."""
        self._ids.extend(ids)
        known = self._decode(self._ids[self._start : self._shown])
        whole = self._decode(self._ids[self._start :])
        if len(whole) <= len(known) or whole.endswith("\ufffd"):
            return ""
        piece = whole[len(known) :]
        self._start, self._shown = self._shown, len(self._ids)
        self.text += piece
        return piece

    def finish(self) -> str:
        """Gives out what was held back, unfinished characters as replacement characters."""
        known = self._decode(self._ids[self._start : self._shown])
        piece = self._decode(self._ids[self._start :])[len(known) :]
        self._start, self._shown = self._shown, len(self._ids)
        self.text += piece
        return piece
