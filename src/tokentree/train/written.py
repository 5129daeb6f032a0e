"""Texts that a model writes itself to be trained on, each kept as soon as it is finished.

Texts are known by a number, and those of one number belong together (`train.talks`). What is in them follows from the
seed and that number alone, so texts that were written before an interruption and behind it are those of a run without
one.
"""

from __future__ import annotations

import json
import time
import zlib
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass, field, replace
from itertools import count, islice
from pathlib import Path
from typing import TypeGuard

from tokentree.errors import PromptError
from tokentree.llm import LLM
from tokentree.sequence import Sequence
from tokentree.train.keeping import keep_text, whole, writing
from tokentree.train.talks import Ask, Talk, new_talk
from tokentree.train.texts import FEWEST, LEAST, Text, Texts

GUESS = 400  # tokens of the texts of a number, before there are any
EMPTY = 32  # numbers with nothing in them, behind which there will be none
PAUSE = 10.0  # seconds between two notes of what isn't finished
HEADER = "texts of several kinds that a model wrote"


@dataclass
class Begun:
    """Texts that are being written.

    Args:
        number: of the texts.
        parts: what `Talk.ask` asked for, as far as it is there.
        written: token ids that came so far of what it asks for next.
    """

    number: int
    parts: list[list[int]]
    written: list[int] = field(default_factory=list)

    @property
    def tokens(self) -> int:
        """How many the model has written."""
        return sum(map(len, self.parts)) + len(self.written)


class Kept:
    """A file of texts by their numbers, to which a line is added for each. Beside it lies what is begun and not
    finished. Each line has a check sum, so that what was torn or spoilt is noticed, and written again.

    Args:
        seed: that they follow from.
        vocab_size: token ids are below it.

    Attributes:
        tokens: of all texts that are long enough.

    Raises:
        PromptError: if ``file`` is something else, or the texts of another seed.
        OptionError: if it can't be written.
    """

    def __init__(self, file: Path, seed: int, vocab_size: int) -> None:
        self._file, self._half, self._vocab_size = file, file.with_name(f"{file.stem}-begun{file.suffix}"), vocab_size
        self.texts, self.begun, self.spoilt = dict[int, list[Text]](), list[Begun](), 0
        self.tokens = 0
        self._first, self._reached, self._count = 0, 0, 0
        header = _line(HEADER, seed)
        if not file.is_file():
            keep_text(file, header)
        self._read(header)

    def _read(self, header: str) -> None:
        lines = self._file.read_text(encoding="utf-8", errors="replace").split("\n")
        if lines[0] != header.rstrip("\n"):
            raise PromptError(
                f"{str(self._file)!r} doesn't hold what a model wrote with this seed: remove it, or work elsewhere"
            )
        good = list[str]()
        for line in lines[1:] if lines[-1] else lines[1:-1]:
            match _record(line):
                case [int(number), list(parts)] if (
                    number >= 0
                    and number not in self.texts
                    and None not in (texts := [self._text(part) for part in parts])
                ):
                    self._note(number, [text for text in texts if text is not None])
                    good.append(line + "\n")
                case _:
                    self.spoilt += 1
        if self.spoilt or lines[-1]:
            keep_text(self._file, header + "".join(good))
        half = self._half.read_text(encoding="utf-8", errors="replace") if self._half.is_file() else ""
        for line in half.split("\n"):
            match _record(line):
                case [int(number), list(parts), written] if (
                    all(map(self._are_ids, parts)) and self._are_ids(written) and number not in self.texts
                ):
                    self.begun.append(Begun(number, parts, written))

    def _text(self, part: object) -> Text | None:
        """The text of which `_part` made this; None if it is anything else."""
        match part:
            case [str(kind), ids, list(answers)] if self._are_ids(ids) and all(
                isinstance(one, list) and len(one) == 2 and self._are_ends(one, len(ids)) for one in answers
            ):
                return Text(ids, kind, tuple((start, end) for start, end in answers))
        return None

    def _are_ends(self, ends: list[object], length: int) -> bool:
        return all(type(end) is int and 0 <= end <= length for end in ends)

    def _are_ids(self, ids: object) -> TypeGuard[list[int]]:
        return isinstance(ids, list) and all(type(token) is int and 0 <= token < self._vocab_size for token in ids)

    def _note(self, number: int, texts: list[Text]) -> None:
        self.texts[number] = texts
        self.tokens += _tokens(texts)
        while self._first in self.texts:
            first = self.texts[self._first]
            self._reached, self._count = self._reached + _tokens(first), self._count + len(_long(first))
            self._first += 1

    def add(self, texts: dict[int, list[Text]]) -> None:
        """Keeps further texts, by their numbers."""
        lines = "".join(_line(number, [_part(text) for text in some]) for number, some in texts.items())
        with whole(), writing(self._file), self._file.open("a", encoding="utf-8") as out:
            out.write(lines)
        for number, some in texts.items():
            self._note(number, some)

    def note_begun(self, begun: list[Begun]) -> None:
        """Keeps what is being written, in place of what was noted before."""
        keep_text(self._half, "".join(_line(one.number, one.parts, one.written) for one in begun))

    def has(self, tokens: int) -> bool:
        """Whether the first texts have so many tokens."""
        return self._reached >= tokens and self._count >= FEWEST

    def first(self, tokens: int) -> Texts:
        """The first texts that are long enough, until there are so many tokens."""
        found, total = Texts(), 0
        for number in range(self._first):
            for text in _long(self.texts[number]):
                if total >= tokens and len(found.texts) >= FEWEST:
                    return found
                found.texts.append(replace(text, group=number))
                total += len(text.ids)
        return found

    def missing(self) -> Iterator[int]:
        """Numbers of texts that are neither there nor begun, without end."""
        begun = {one.number for one in self.begun}
        return (number for number in count() if number not in self.texts and number not in begun)

    def check(self) -> None:
        """Raises `PromptError` if the model writes nothing."""
        if not self.tokens and len(self.texts) >= EMPTY:
            raise PromptError("the model writes nothing in its chat template: give a file of texts")


def write_texts(
    llm: LLM, kept: Kept, tokens: int, seed: int = 0, progress: Callable[[int], None] = lambda tokens: None
) -> Texts:
    """Texts of about so many ``tokens`` that the model writes itself: those that are in ``kept``, and as many more as
    are missing. On an accelerator they are written in batches, see `train.batches`.

    Args:
        progress: called with the number of tokens that there are.

    Raises:
        PromptError: if there is no tokenizer, or the model writes nothing.
        OptionError: if the texts can't be written into a file.
    """
    if llm.tokenizer is None:
        raise PromptError("a model without a tokenizer can't write its own training data: give a file")
    kept.check()
    if kept.has(tokens):
        return kept.first(tokens)
    if llm.engine.info.device.type != "cpu":
        from tokentree.train.batches import Batches

        batches, numbers = Batches(llm, tokens, seed), kept.missing()
        while not kept.has(tokens):
            kept.add(batches.write([*islice(numbers, batches.size)]))
            kept.check()
            progress(kept.tokens)
        return kept.first(tokens)
    requests = _Requests(llm, kept, tokens, seed)
    noted = time.monotonic()
    try:
        with closing(llm.plain().decoder.run(requests, llm.max_batch)) as steps:  # type: ignore[type-var]
            for seqs in steps:
                for seq in seqs:
                    if seq.error is not None:
                        raise seq.error
                    if seq.finished:
                        requests.take(seq)
                progress(kept.tokens + requests.begun_tokens)
                if kept.has(tokens):
                    break
                if time.monotonic() - noted > PAUSE:
                    kept.note_begun(requests.begun())
                    noted = time.monotonic()
    except KeyboardInterrupt:
        kept.note_begun(requests.begun())
        raise
    kept.check()
    return kept.first(tokens)


@dataclass
class _Writing:
    """A talk, what it asks for, and what came of that so far; ``seq`` is being decoded."""

    talk: Talk
    ask: Ask
    written: list[int]
    seq: Sequence | None = None

    @property
    def begun(self) -> Begun:
        return Begun(self.talk.number, self.talk.parts, [*self.written, *(self.seq.output_ids if self.seq else ())])

    @property
    def tokens(self) -> int:
        so_far = len(self.written) + (len(self.seq.output_ids) if self.seq else 0)
        return self.talk.tokens + so_far


class _Requests:
    """What the decoder is asked for, as talks go on. So many are begun as will have the tokens that are wanted."""

    def __init__(self, llm: LLM, kept: Kept, tokens: int, seed: int) -> None:
        self._llm, self._kept, self._tokens, self._seed = llm, kept, tokens, seed
        self._ready, self._active = deque[_Writing](), dict[int, _Writing]()
        self._numbers = kept.missing()
        for one in kept.begun:
            self._begin(one)

    def __iter__(self) -> _Requests:
        return self

    def __next__(self) -> Sequence:
        """Raises `StopIteration` for now, while what is being written is enough."""
        while self._ready or self._more():
            if not self._ready:
                self._begin(Begun(next(self._numbers), []))
                continue
            one = self._ready.popleft()
            params, ids = one.ask.params, [*one.ask.prompt, *one.written]
            room = params.max_tokens - len(one.written)
            if room < 1 or len(ids) >= self._llm.engine.context or {*one.written[-1:]} & {*self._llm.eos_ids}:
                self._go_on(one.talk, one.written)
                continue
            # numbers are drawn by position: it goes on as it began
            one.seq = self._llm.sequence(ids, params.model_copy(update={"max_tokens": room}))
            self._active[one.seq.id] = one
            return one.seq
        raise StopIteration

    def _more(self) -> bool:
        """Whether another text is to be begun."""
        self._kept.check()
        if self._kept.has(self._tokens):
            return False
        mean = (4 * GUESS + self._kept.tokens) / (4 + len(self._kept.texts))
        return not self._active or self._kept.tokens + mean * len(self._active) < self._tokens

    def _begin(self, begun: Begun) -> None:
        talk = new_talk(self._llm, begun.number, self._seed)
        for part in begun.parts:
            if talk.ask is not None:
                talk.take(part)
        self._ask(talk, begun.written)

    def _ask(self, talk: Talk, written: list[int]) -> None:
        if talk.ask is None:
            self._kept.add({talk.number: talk.texts})
        else:
            self._ready.append(_Writing(talk, talk.ask, written))

    def _go_on(self, talk: Talk, written: list[int]) -> None:
        talk.take(written)
        self._ask(talk, [])

    def take(self, seq: Sequence) -> None:
        """Notes what came of a request."""
        one = self._active.pop(seq.id)
        self._go_on(one.talk, [*one.written, *seq.output_ids])

    def begun(self) -> list[Begun]:
        """What is not finished."""
        return [one.begun for one in (*self._active.values(), *self._ready)]

    @property
    def begun_tokens(self) -> int:
        """How many there are in that."""
        return sum(one.tokens for one in (*self._active.values(), *self._ready))


def _long(texts: list[Text]) -> list[Text]:
    return [text for text in texts if len(text.ids) >= LEAST]


def _tokens(texts: list[Text]) -> int:
    return sum(len(text.ids) for text in _long(texts))


def _part(text: Text) -> list[object]:
    return [text.kind, text.ids, [list(ends) for ends in text.answers or ()]]


def _line(*record: object) -> str:
    return json.dumps([*record, zlib.crc32(json.dumps(record).encode())]) + "\n"


def _record(line: str) -> list[object] | None:
    """What `_line` made a line of; None if it is anything else."""
    try:
        *record, check = json.loads(line)
    except (ValueError, TypeError, RecursionError):
        return None
    return record if zlib.crc32(json.dumps(record).encode()) == check else None
