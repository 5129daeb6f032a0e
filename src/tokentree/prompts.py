"""Prompts from files."""

from __future__ import annotations

import json
import os
import stat
from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, BinaryIO

from tokentree.errors import PromptError

MOST_PIPED = 1 << 26  # bytes of what may have no end


@dataclass(frozen=True)
class Conversation:
    """One entry of a prompt file.

    Args:
        name: its id in the file, or its line number.
        category: what kind of task it is.
        turns: what the user says, turn by turn.
        chat: whether the turns go through the chat template; a bare ``prompt`` is continued as it stands.
    """

    name: str
    category: str
    turns: tuple[str, ...]
    chat: bool


def read_text(path: str | Path, what: str) -> str:
    """The text of a file in UTF-8, its line ends as they are, a byte-order mark left out.

    Raises:
        PromptError: if it can't be read, or is no text; it calls the file ``what``.
    """
    called = f"{what} {str(path)!r}"
    try:
        with Path(path).open("rb") as file:
            return text_of(file, called, None if stat.S_ISREG(os.fstat(file.fileno()).st_mode) else MOST_PIPED)
    except OSError as error:
        raise PromptError(f"can't read {called}: {error.strerror}") from None


def text_of(file: BinaryIO, what: str, most: int | None = MOST_PIPED) -> str:
    """The text that ``file`` holds or pipes.

    Args:
        most: bytes; a device or a pipe may have no end.

    Raises:
        PromptError: if it can't be read, has more, or is no text; it calls the file ``what``.
    """
    try:
        content = file.read(-1 if most is None else most + 1)
        text = content.decode("utf-8-sig") if most is None or len(content) <= most else None
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8 text"
        raise PromptError(f"can't read {what}: {reason}") from None
    if text is None:
        raise PromptError(f"can't read {what}: it doesn't end within {MOST_PIPED >> 20} MiB")
    if "\0" in text:
        raise PromptError(f"can't read {what}: it has NUL bytes, so it is not text")
    return text


def checked_text(text: str, what: str) -> str:
    """``text``, if it can be written in UTF-8: no bytes that were none, no half of a pair of surrogates.

    Raises:
        PromptError: if it can't; it calls the text ``what``.
    """
    try:
        text.encode()
    except UnicodeEncodeError as error:
        odd = text[error.start]
        raise PromptError(f"{what} is not UTF-8 text: it has {odd!r} at character {error.start}") from None
    return text


def read_prompts(path: str | Path, per_category: int | None = None, turns: int | None = None) -> list[Conversation]:
    """The entries of a JSON-lines file: objects with ``turns`` (a list of texts) or ``prompt`` (one text), and
    optionally ``category`` and an id (``id``, ``question_id`` or ``task_id``). Lines end at a newline alone; a
    byte-order mark and carriage returns before newlines are taken as well.

    Args:
        per_category: at most so many of each category, the first ones; the categories then take turns, so that a run
            that is cut short has seen them all.
        turns: at most so many turns of each, the first ones.

    Raises:
        PromptError: if the file can't be read, is empty, or a line is none of this; it names the line.
    """
    default_category = Path(path).stem
    found: list[tuple[int, Conversation]] = []
    seen = Counter[str]()
    for number, line in enumerate(read_text(path, "the prompt file").split("\n"), start=1):
        if not line.strip():
            continue
        where = f"line {number} of {str(path)!r}"
        entry = _entry(line, where, default_category, number)
        seen[entry.category] += 1
        if per_category is None or seen[entry.category] <= per_category:
            found.append((seen[entry.category], replace(entry, turns=entry.turns[:turns])))
    if not found:
        raise PromptError(f"the prompt file {str(path)!r} has no prompts")
    if per_category is not None:
        found.sort(key=lambda item: item[0])
    return distinct([entry for _, entry in found])


def distinct(entries: list[Conversation]) -> list[Conversation]:
    """``entries``, if no two have the same category and name.

    Raises:
        PromptError: if two have.
    """
    counted = Counter((entry.category, entry.name) for entry in entries)
    for (category, name), times in counted.items():
        if times > 1:
            raise PromptError(f"{times} prompts of the category {category!r} have the id {name!r}")
    return entries


def _entry(line: str, where: str, default_category: str, number: int) -> Conversation:
    try:
        entry: Any = json.loads(line)
    except (ValueError, RecursionError):  # ValueError of numbers with too many digits, too
        raise PromptError(f"{where} is not JSON") from None
    if not isinstance(entry, dict) or not ({"turns", "prompt"} & set(entry)):
        raise PromptError(f'{where} has neither "turns" nor "prompt"')
    turns = entry.get("turns", [entry.get("prompt")])
    if not isinstance(turns, list) or not turns or not all(isinstance(turn, str) and turn.strip() for turn in turns):
        raise PromptError(f"{where} has an empty turn, or one that is not a text")
    known = {key: value for key, value in entry.items() if value is not None}
    name = next((known[key] for key in ("id", "question_id", "task_id") if key in known), number)
    category = known.get("category", default_category)
    for key, value in (("id", name), ("category", category)):
        if isinstance(value, bool) or not isinstance(value, str | int | float):
            raise PromptError(f"{where} has a {key} that is neither a text nor a number")
    texts = [checked_text(turn, f"a turn on {where}") for turn in turns]
    name, category = (checked_text(str(value), f"the id or category on {where}") for value in (name, category))
    return Conversation(name, category, tuple(texts), "turns" in entry)
