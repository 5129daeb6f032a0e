"""Texts that a model writes itself to be trained on, each kept as soon as it is finished.

A text is known by its number. What is in it follows from the seed and that number alone, so texts that were written
before an interruption and behind it are those of a run without one.
"""

from __future__ import annotations

import json
import time
import zlib
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass, field
from itertools import count, islice
from pathlib import Path
from typing import TypeGuard

from tokentree.errors import PromptError
from tokentree.llm import LLM
from tokentree.sequence import Sequence
from tokentree.train.keeping import keep_text, whole, writing
from tokentree.train.talks import ANSWER_TOKENS, PROMPT_TOKENS, Talk, answer_params, open_turn, said_params
from tokentree.train.texts import FEWEST, LEAST, Texts

GUESS = 200  # tokens of a text, before there are any
EMPTY = 32  # texts with nothing in them, behind which there will be none
PAUSE = 10.0  # seconds between two notes of what isn't finished
HEADER = "texts that a model wrote"


@dataclass
class Begun:
    """A turn of a text that is being written.

    Args:
        number: of the text.
        answering: whether it is the model's turn, or the user's.
        prompt: token ids that it goes on from; written: those that came so far.
    """

    number: int
    answering: bool
    prompt: list[int]
    written: list[int] = field(default_factory=list)

    @property
    def tokens(self) -> int:
        return len(self.written) + (len(self.prompt) if self.answering else 0)


class Kept:
    """A file of texts by their numbers, to which a line is added for each. Beside it lies what is begun and not
    finished. Each line has a check sum, so that what was torn or spoilt is noticed, and written again.

    Args:
        seed: that they follow from.
        vocab_size: token ids are below it.

    Raises:
        PromptError: if ``file`` is something else, or the texts of another seed.
        OptionError: if it can't be written.
    """

    def __init__(self, file: Path, seed: int, vocab_size: int) -> None:
        self._file, self._half, self._vocab_size = file, file.with_name(f"{file.stem}-begun{file.suffix}"), vocab_size
        self.texts, self.begun, self.spoilt = dict[int, list[int]](), list[Begun](), 0
        self.tokens = 0  # of all texts that are long enough
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
                case [int(number), ids] if number >= 0 and number not in self.texts and self._are_ids(ids):
                    self._note(number, ids)
                    good.append(line + "\n")
                case _:
                    self.spoilt += 1
        if self.spoilt or lines[-1]:
            keep_text(self._file, header + "".join(good))
        half = self._half.read_text(encoding="utf-8", errors="replace") if self._half.is_file() else ""
        for line in half.split("\n"):
            match _record(line):
                case [int(number), bool(answering), prompt, written] if (
                    prompt and self._are_ids(prompt) and self._are_ids(written) and number not in self.texts
                ):
                    self.begun.append(Begun(number, answering, prompt, written))

    def _are_ids(self, ids: object) -> TypeGuard[list[int]]:
        return isinstance(ids, list) and all(type(token) is int and 0 <= token < self._vocab_size for token in ids)

    def _note(self, number: int, ids: list[int]) -> None:
        self.texts[number] = ids
        self.tokens += len(ids) if len(ids) >= LEAST else 0
        while self._first in self.texts:
            length = len(self.texts[self._first])
            self._reached, self._count = self._reached + length * (length >= LEAST), self._count + (length >= LEAST)
            self._first += 1

    def add(self, texts: dict[int, list[int]]) -> None:
        """Keeps further texts, by their numbers."""
        lines = "".join(_line(number, ids) for number, ids in texts.items())
        with whole(), writing(self._file), self._file.open("a", encoding="utf-8") as out:
            out.write(lines)
        for number, ids in texts.items():
            self._note(number, ids)

    def note_begun(self, begun: list[Begun]) -> None:
        """Keeps what is being written, in place of what was noted before."""
        keep_text(self._half, "".join(_line(one.number, one.answering, one.prompt, one.written) for one in begun))

    def has(self, tokens: int) -> bool:
        """Whether the first texts have so many tokens."""
        return self._reached >= tokens and self._count >= FEWEST

    def first(self, tokens: int) -> Texts:
        """The first texts that are long enough, until there are so many tokens."""
        found, total = Texts(), 0
        for number in range(self._first):
            if total >= tokens and len(found.ids) >= FEWEST:
                break
            if len(ids := self.texts[number]) >= LEAST:
                found.ids.append(ids)
                total += len(ids)
        return found

    def missing(self) -> Iterator[int]:
        """Numbers of texts that are neither there nor begun, without end."""
        begun = {one.number for one in self.begun}
        return (number for number in count() if number not in self.texts and number not in begun)

    def check(self) -> None:
        """Raises `PromptError` if the model writes nothing."""
        if not self.tokens and len(self.texts) >= EMPTY:
            raise PromptError("the model writes nothing on an open turn of its chat template: give a file of texts")


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
    if llm.engine.device.type != "cpu":
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
                progress(kept.tokens + sum(one.tokens for one in requests.begun()))
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


class _Requests:
    """What the decoder is asked for, one turn after another: first what a user might say, as the chat template leaves
    the user's turn open; then an answer to it. A model without a template just writes. So many texts are begun as will
    have the tokens that are asked for.
    """

    def __init__(self, llm: LLM, kept: Kept, tokens: int, seed: int) -> None:
        assert llm.tokenizer is not None
        self._llm, self._kept, self._tokens, self._seed, self._tokenizer = llm, kept, tokens, seed, llm.tokenizer
        self._bos_ids = sorted(llm.eos_ids)[:1] or [0]
        self._open = open_turn(self._tokenizer, self._bos_ids)
        self._ready = deque(kept.begun)
        self._active: dict[int, tuple[Begun, Sequence]] = {}
        self._numbers = kept.missing()

    def __iter__(self) -> _Requests:
        return self

    def __next__(self) -> Sequence:
        """Raises `StopIteration` for now, while what is being written is enough."""
        while self._ready or self._more():
            one = self._ready.popleft() if self._ready else Begun(next(self._numbers), False, self._open)
            room = (ANSWER_TOKENS if one.answering else PROMPT_TOKENS) - len(one.written)
            ids = [*one.prompt, *one.written]
            ended = bool(one.written) and one.written[-1] in self._llm.eos_ids
            if ended or room < 1 or len(ids) >= self._llm.engine.context:
                self._finish(one)
                continue
            params = (answer_params if one.answering else said_params)(one.number, self._seed, room)
            seq = self._llm.sequence(ids, params)  # numbers are drawn by position: it goes on as it began
            self._active[seq.id] = one, seq
            return seq
        raise StopIteration

    def _more(self) -> bool:
        """Whether another text is to be begun."""
        self._kept.check()
        if self._kept.has(self._tokens):
            return False
        mean = (4 * GUESS + self._kept.tokens) / (4 + len(self._kept.texts))
        return not self._active or self._kept.tokens + mean * len(self._active) < self._tokens

    def take(self, seq: Sequence) -> None:
        """Notes what came of a request."""
        one, _ = self._active.pop(seq.id)
        self._finish(Begun(one.number, one.answering, one.prompt, [*one.written, *seq.output_ids]))

    def _finish(self, one: Begun) -> None:
        if one.answering:
            self._kept.add({one.number: [*one.prompt, *one.written]})
            return
        talk = Talk(one.number, prompt=one.prompt)
        talk.hear(self._tokenizer, one.written, self._llm.engine.context - 1)
        if talk.prompt:
            self._ready.append(Begun(one.number, True, talk.prompt))
        else:
            self._kept.add({one.number: []})

    def begun(self) -> list[Begun]:
        """What is not finished."""
        active = [
            Begun(one.number, one.answering, one.prompt, [*one.written, *seq.output_ids])
            for one, seq in self._active.values()
        ]
        return [*active, *self._ready]


def _line(*record: object) -> str:
    return json.dumps([*record, zlib.crc32(json.dumps(record).encode())]) + "\n"


def _record(line: str) -> list[object] | None:
    """What `_line` made a line of; None if it is anything else."""
    try:
        *record, check = json.loads(line)
    except (ValueError, TypeError, RecursionError):
        return None
    return record if zlib.crc32(json.dumps(record).encode()) == check else None
