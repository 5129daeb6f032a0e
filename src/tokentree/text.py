"""Token ids to text, a few tokens at a time; and where a stop string ends it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

Decode = Callable[[list[int]], str]


class Detokenizer:
    """Turns a growing list of token ids into a growing text.

    A token may hold half a character, and some tokenizers drop a leading space; so each piece is decoded behind a few
    earlier tokens, and text that ends in an unfinished character is held back until it is whole.

    Args:
        decode: the text of token ids, without special tokens.
        special: the tokens that ``decode`` leaves out, and how they are written.
        raw: tokens that stand for a byte each. Where a row of them makes no text, all of it becomes replacement
            characters; so with these, text is given out once the row is over. Without, as soon as it makes sense.

    Attributes:
        text: what is certain so far, without special tokens.
        marked: the same with them.
    """

    def __init__(
        self, decode: Decode, special: Mapping[int, str] | None = None, raw: frozenset[int] = frozenset()
    ) -> None:
        self._decode, self._special, self._raw = decode, special or {}, raw
        self._ids: list[int] = []  # the window that is decoded: a few tokens that were given out, and those held back
        self._shown = 0  # of them, those whose text was given out
        self._marks: tuple[tuple[int, int], ...] = ()  # of each special token: where in `marked`, and how long
        self._names: dict[str, bool] = {}  # stop strings, and whether they hold a special token
        self.text = self.marked = ""

    def copy(self) -> Detokenizer:
        twin = Detokenizer(self._decode, self._special, self._raw)
        twin._ids, twin._shown, twin._marks, twin._names = self._ids.copy(), self._shown, self._marks, self._names
        twin.text, twin.marked = self.text, self.marked
        return twin

    def push(self, ids: Sequence[int]) -> str:
        """Adds ``ids``; returns the text that became certain."""
        if not any(token in self._special for token in ids):
            return self._push(ids)
        return "".join(self._mark(token) if token in self._special else self._push([token]) for token in ids)

    def finish(self) -> str:
        """Gives out what was held back, unfinished characters as replacement characters."""
        known = self._decode(self._ids[: self._shown])
        return self._give(self._decode(self._ids)[len(known) :])

    def first_stop(self, stops: Sequence[str], since: tuple[int, int]) -> int | None:
        """Where in `text` the first of those ``stops`` begins that end behind ``since``, an earlier `place`; None if
        there is none. A stop string that holds a special token is looked for in `marked`, any other in `text`."""
        places = []
        for stop in stops:
            marked = self.names_special(stop)
            whole, before = (self.marked, since[1]) if marked else (self.text, since[0])
            place = whole.find(stop, max(0, before - len(stop) + 1))
            if place >= 0:
                places.append(self._without_marks(place) if marked else place)
        return min(places, default=None)

    def held_back(self, stops: Sequence[str]) -> int:
        """How many characters at the end of `text` may be the beginning of one of ``stops``."""
        lengths = [0]
        for stop in stops:
            plain = stop
            for name in {*self._special.values()} if self.names_special(stop) else ():
                plain = plain.replace(name, "")
            lengths.append(len(stop) - 1 if plain == stop else len(plain))
        return max(lengths)

    def names_special(self, stop: str) -> bool:
        """Whether a special token is written in ``stop``."""
        if stop not in self._names:
            self._names[stop] = any(name in stop for name in self._special.values())
        return self._names[stop]

    @property
    def place(self) -> tuple[int, int]:
        """How long `text` and `marked` are."""
        return len(self.text), len(self.marked)

    def _push(self, ids: Sequence[int]) -> str:
        self._ids.extend(ids)
        if self._ids and self._ids[-1] in self._raw:
            return ""
        known, whole = self._decode(self._ids[: self._shown]), self._decode(self._ids)
        return "" if len(whole) <= len(known) or whole.endswith("\ufffd") else self._give(whole[len(known) :])

    def _give(self, piece: str) -> str:
        self._ids = self._ids[self._shown :]
        self._shown = len(self._ids)
        self.text += piece
        self.marked += piece
        return piece

    def _mark(self, token: int) -> str:
        """Takes in a special token, which has no text."""
        self._marks = (*self._marks, (len(self.marked), len(self._special[token])))
        self.marked += self._special[token]
        return ""

    def _without_marks(self, place: int) -> int:
        """What is ``place`` of `marked` in `text`."""
        return place - sum(min(length, place - start) for start, length in self._marks if start < place)
