"""Two vocabularies: how their tokens are spelled, which ones they share, and a text in either's tokens.

Texts are bytes here: a token may hold a part of a character.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from functools import cached_property
from itertools import accumulate
from typing import TYPE_CHECKING, Any

import numpy as np

from tokentree.errors import PairingError
from tokentree.tree import Ints

if TYPE_CHECKING:
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerBase

ODD = re.compile("[\udc80-\udcff]")  # a byte that is part of no character is decoded to one of these
RUNS = re.compile(f"{ODD.pattern}+|{ODD.pattern.replace('[', '[^')}+")
ODD_ONES = "".join(chr(0xDC00 + byte) for byte in range(0x80, 0x100))
REPLACEMENT = "\ufffd"
BYTE = re.compile("<0x([0-9A-F]{2})>")
LINE = "\n"  # what stands before a text so that no space is put there
LOOKBEHIND = 8  # tokens that are cut anew with what comes behind them


class Spelling:
    """How the tokens of a tokenizer are spelled, and a text in its tokens.

    Args:
        tokenizer: one that the tokenizers package runs.
        size: how many ids the model has. Those beyond are never given.

    Raises:
        PairingError: if its tokens aren't pieces of text that can be told from their names.

    Attributes:
        pieces: the bytes of each ordinary token; None for a special one, and where there is none.
        special: the special tokens by their names.
        begin: the special tokens that the tokenizer puts before a text.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, size: int) -> None:
        backend = getattr(tokenizer, "backend_tokenizer", None)
        self._said = {} if backend is None else json.loads(backend.to_str())
        spelled = _speller(self._said.get("decoder"))
        if spelled is None:
            kind = type(tokenizer).__name__
            raise PairingError(f"the tokens of a {kind} can't be told as pieces of text: use models of one tokenizer")
        added = tokenizer.added_tokens_decoder
        hidden = {*tokenizer.all_special_ids, *(token for token, entry in added.items() if entry.special)}
        self.pieces: list[bytes | None] = [None] * size
        self.special: dict[str, int] = {}
        self._bytes: set[int] = set()  # tokens that are spelled as a byte
        for name, token in tokenizer.get_vocab().items():
            if token in hidden and token < size:
                self.special[name] = token
            elif token < size:
                self.pieces[token] = name.encode() if token in added else spelled(name)
                if BYTE.fullmatch(name):
                    self._bytes.add(token)
        self._names = {token: name for name, token in self.special.items()}
        ids = tokenizer(LINE).input_ids
        self.begin = tuple(ids[: next((i for i, one in enumerate(ids) if one not in self._names), 0)])

    @cached_property
    def _backend(self) -> Tokenizer:
        """A tokenizer of our own: nobody else pads with it, and it reads the names of special tokens as any text."""
        from tokenizers import Tokenizer

        backend = Tokenizer.from_str(json.dumps(self._said))
        backend.no_padding()
        backend.no_truncation()
        backend.encode_special_tokens = True
        return backend

    @cached_property
    def ids(self) -> dict[bytes, int]:
        """An ordinary token for each piece: of several, one that isn't spelled as a byte, then the one of least id."""
        order = sorted(range(len(self.pieces)), key=lambda token: (token not in self._bytes, -token))
        return {piece: token for token in order if (piece := self.pieces[token])}

    @cached_property
    def spaced(self) -> bool:
        """Whether a space is put before a text."""
        pieces = [self.piece(token) for token in self._encode("a")]
        return b"".join(pieces).startswith(b" ")

    def piece(self, token: int) -> bytes:
        """The bytes of a token; none for a special one."""
        return (self.pieces[token] if token < len(self.pieces) else None) or b""

    def name(self, token: int) -> str | None:
        """The name of a special token; None for an ordinary one."""
        return self._names.get(token)

    def encode(self, text: bytes, begins: bool) -> list[int] | None:
        """``text`` in tokens. A byte that is part of no character is the token that stands for it, if there is one, and
        otherwise a replacement character; but None where the text ends with it, as the character may still come.

        Args:
            begins: whether nothing stands before the text.
        """
        ids, runs = list[int](), RUNS.findall(_characters(text))
        for place, run in enumerate(runs):
            if not ODD.match(run):
                ids += self._encode(run) if begins and not place else self._behind(run)
                continue
            known = [self.ids.get(_bytes(byte)) for byte in run]
            found = [token for token in known if token is not None]
            if len(found) == len(known):
                ids += found
            elif place == len(runs) - 1:
                return None
            else:
                ids += self._behind(REPLACEMENT)
        return ids

    def ends(self, ids: Sequence[int], text: bytes) -> list[int] | None:
        """Where each of ``ids`` ends in ``text``; None if they don't spell it. A space that was put before it counts as
        nothing."""
        pieces = [self.piece(token) for token in ids]
        joined = b"".join(pieces)
        more = 1 if self.spaced and joined == b" " + text else 0
        if joined[more:] != text:
            return None
        return [max(0, end - more) for end in accumulate(map(len, pieces))]

    def _encode(self, text: str) -> list[int]:
        ids: list[int] = self._backend.encode(text, add_special_tokens=False).ids
        return ids

    def _behind(self, text: str) -> list[int]:
        """A text that something stands before: no space is put there."""
        if not self.spaced:
            return self._encode(text)
        ids, before = self._encode(LINE + text), b""
        for place, token in enumerate(ids):
            before += self.piece(token)
            if before.strip(b" ") == LINE.encode():
                return ids[place + 1 :]
        return self._encode(text)


class Vocabularies:
    """The vocabularies of a target and of a draft model that have different tokenizers.

    Args:
        target, draft: their tokens.
    """

    def __init__(self, target: Spelling, draft: Spelling) -> None:
        self.target, self.draft = target, draft

    @cached_property
    def shared(self) -> tuple[Ints, Ints]:
        """The target's ids int64[n], ascending, and the draft model's ids int64[n] of the tokens that both have:
        ordinary ones of the same bytes, special ones of the same name."""
        ours, theirs = self.target, self.draft
        pairs = [(token, theirs.ids[piece]) for piece, token in ours.ids.items() if piece in theirs.ids]
        pairs += [(token, theirs.special[name]) for name, token in ours.special.items() if name in theirs.special]
        both = np.array(sorted(pairs), np.int64).reshape(-1, 2)
        return both[:, 0].copy(), both[:, 1].copy()

    @cached_property
    def overlap(self) -> float:
        """The share of the larger vocabulary that the other one has too, 0 to 1."""
        return len(self.shared[0]) / max(1, *(len(one.ids) + len(one.special) for one in (self.target, self.draft)))


class DraftText:
    """A text in a draft model's tokens, kept as it grows in the target's.

    Only the last tokens are cut anew when the text grows, and as many before as change by that. Special tokens keep
    their names; those that the draft model lacks are left out. Where the text ends within a character, its bytes are
    tokens of their own until the character is whole.

    Args:
        vocabularies: of both models.

    Attributes:
        ids: the text in the draft model's tokens.
        whole: whether these are all of it. Otherwise it ends with bytes that are no tokens there.
    """

    def __init__(self, vocabularies: Vocabularies) -> None:
        self._target, self._draft = vocabularies.target, vocabularies.draft
        self._start_anew()

    def _start_anew(self) -> None:
        self.ids = list(self._draft.begin)
        self._tokens: list[int] = []  # of the target, that were followed
        self._space = b" " if self._target.spaced else b""  # that the target puts before the first ordinary token
        self._close()

    def _close(self) -> None:
        """Begins behind the last token, which is a special one."""
        self._first = len(self.ids)  # of `ids`, the first one that isn't closed
        self._text = b""  # what these spell
        self._ends: list[int] | None = []  # where in it they end; None where they spell something else
        self._cut = 0  # bytes of it that were cut into tokens
        self.whole = True

    def follow(self, tokens: Sequence[int]) -> None:
        """Makes this the text of the target's ``tokens``."""
        known = len(self._tokens)
        if list(tokens[:known]) != self._tokens:
            self._start_anew()
            known = 0
        self._push(tokens[known:])
        self._cut_anew()

    def accept(self, tokens: Sequence[int], ids: Sequence[int]) -> None:
        """Goes on with the target's ``tokens``. Their text begins with that of the draft model's ordinary tokens
        ``ids``."""
        self.ids += ids
        if self._ends is not None:
            for token in ids:
                self._ends.append((self._ends[-1] if self._ends else 0) + len(self._draft.piece(token)))
        self._push(tokens)

    def _push(self, tokens: Sequence[int]) -> None:
        for token in tokens:
            name = self._target.name(token)
            if name is None:
                self._text += self._target.piece(token).removeprefix(self._space)
                self._space = b""
            else:
                self._cut_anew()
                again = not self._tokens and name in self._begin_names
                if name in self._draft.special and not again:
                    self.ids.append(self._draft.special[name])
                self._close()
            self._tokens.append(token)

    @cached_property
    def _begin_names(self) -> set[str | None]:
        return {self._draft.name(token) for token in self._draft.begin}

    def _cut_anew(self) -> None:
        """Cuts what is new into tokens, and the last tokens before it with it: as many as it takes until one is found
        again."""
        if self._cut == len(self._text):
            return
        behind, kept = LOOKBEHIND, len(self._ends or [])
        while True:
            kept = self._place(kept - behind)
            rest = self._text[self._end(kept) :]
            new = self._draft.encode(rest, begins=not kept and self._first == len(self._draft.begin))
            self.whole = new is not None
            if new is None or self._found(kept, new, self._draft.ends(new, rest)):
                return
            behind *= 2

    def _end(self, count: int) -> int:
        """Where the first ``count`` tokens end."""
        return self._ends[count - 1] if self._ends and count else 0

    def _place(self, count: int) -> int:
        """The most tokens, up to ``count``, behind which a character begins."""
        while count > 0 and self._text[self._end(count) : self._end(count) + 1] in CONTINUED:
            count -= 1
        return max(0, count)

    def _found(self, kept: int, new: list[int], ends: list[int] | None) -> bool:
        """Puts ``new`` behind the first ``kept`` tokens: the text behind them, cut anew. Returns False, and does
        nothing, if none of the tokens that were there is found again.

        Args:
            ends: where ``new`` end in that text.
        """
        start, place, first, own = self._end(kept), kept, 0, self.ids[self._first + kept :]
        if kept and (ends is None or self._ends is None):
            return False
        if kept and new[0] != own[0]:
            assert ends is not None
            assert self._ends is not None
            olds = {end - start: number for number, end in enumerate(self._ends[kept:])}
            found = (n for n, end in enumerate(ends) if end in olds and own[olds[end]] == new[n])
            first = next(found, -1) + 1
            if not first:
                return False
            place = kept + olds[ends[first - 1]] + 1
        self.ids[self._first + place :] = new[first:]
        before = (self._ends or [])[:place]
        self._ends = None if ends is None else [*before, *(start + end for end in ends[first:])]
        self._cut = len(self._text)
        return True


class Continuation:
    """Texts behind a text, in a target's tokens. The last tokens of that text are cut anew with what follows.

    Args:
        target: its tokens.
        tokens: the text so far.
    """

    def __init__(self, target: Spelling, tokens: Sequence[int]) -> None:
        self._target = target
        first = len(tokens)
        while first and first > len(tokens) - LOOKBEHIND and target.piece(tokens[first - 1]):
            first -= 1
        while first < len(tokens) and target.piece(tokens[first])[:1] in CONTINUED:
            first += 1
        self._tail = b"".join(target.piece(token) for token in tokens[first:])
        self._begins = all(target.name(token) is not None for token in tokens[:first])
        if self._begins and target.spaced:
            self._tail = self._tail.removeprefix(b" ")

    def tokens(self, text: bytes) -> list[tuple[int, int]]:
        """``text`` in tokens, each with where it ends in ``text``. Bytes at the end that are no whole character are
        left out. Nothing, if no token ends where ``text`` begins: tokens that are there already would be others."""
        whole = _bytes(_characters(self._tail + text).rstrip(ODD_ONES))
        ids, start = self._target.encode(whole, self._begins), len(self._tail)
        ends = None if ids is None else self._target.ends(ids, whole)
        if ids is None or ends is None or (start and start not in ends):
            return []
        return [(token, end - start) for token, end in zip(ids, ends) if end > start]


CONTINUED = {bytes([byte]) for byte in range(0x80, 0xC0)}  # bytes within characters


def _characters(text: bytes) -> str:
    """``text``, with one of `ODD_ONES` for each byte that is part of no character."""
    return text.decode("utf-8", "surrogateescape")


def _bytes(text: str) -> bytes:
    """What `_characters` made ``text`` of."""
    return text.encode("utf-8", "surrogateescape")


def _speller(decoder: Any) -> Any:
    """The function from a token's name to its bytes, None for what is none; None if it isn't known."""
    if decoder is None:
        return None
    parts = decoder["decoders"] if decoder["type"] == "Sequence" else [decoder]
    kinds = {part["type"] for part in parts}
    if "ByteLevel" in kinds:
        letters = _letters()
        return lambda name: bytes(letters[c] for c in name) if set(name) <= letters.keys() else None
    if not kinds <= {"Replace", "Metaspace", "ByteFallback", "Fuse", "Strip"}:
        return None
    spaces = [part["replacement"] for part in parts if part["type"] == "Metaspace"]
    spaces += [part["pattern"].get("String") for part in parts if part["type"] == "Replace" and part["content"] == " "]
    if len(spaces) + ("Replace" not in kinds and "Metaspace" not in kinds) != 1 or None in spaces:
        return None

    def spelled(name: str) -> bytes:
        if "ByteFallback" in kinds and (byte := BYTE.fullmatch(name)):
            return bytes([int(byte[1], 16)])
        for sign in spaces:
            name = name.replace(sign, " ")
        return name.encode()

    return spelled


def _letters() -> dict[str, int]:
    """GPT-2's letters for bytes: printable ones of Latin-1 stand for themselves, the others for 256 and on."""
    plain = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in plain]
    return {chr(byte): byte for byte in plain} | {chr(256 + place): byte for place, byte in enumerate(others)}
