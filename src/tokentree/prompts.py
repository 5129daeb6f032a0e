"""Prompts from files."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from tokentree.errors import PromptError


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


def read_prompts(path: str | Path, per_category: int | None = None, turns: int | None = None) -> list[Conversation]:
    """The entries of a JSON-lines file: objects with ``turns`` (a list of texts) or ``prompt`` (one text), and
    optionally ``category`` and an id (``id``, ``question_id`` or ``task_id``).

    Args:
        per_category: at most so many of each category, the first ones; the categories then take turns, so that a run
            that is cut short has seen them all.
        turns: at most so many turns of each, the first ones.

    Raises:
        PromptError: if the file can't be read, is empty, or a line is none of this; it names the line.
    """
    file = Path(path)
    try:
        lines = file.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8 text"
        raise PromptError(f"can't read the prompt file {str(path)!r}: {reason}") from None
    found: list[tuple[int, Conversation]] = []
    seen = Counter[str]()
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        entry = _entry(line, f"line {number} of {str(path)!r}", file.stem, number)
        seen[entry.category] += 1
        if per_category is None or seen[entry.category] <= per_category:
            found.append((seen[entry.category], replace(entry, turns=entry.turns[:turns])))
    if not found:
        raise PromptError(f"the prompt file {str(path)!r} has no prompts")
    if per_category is not None:
        found.sort(key=lambda item: item[0])
    return [entry for _, entry in found]


def _entry(line: str, where: str, default_category: str, number: int) -> Conversation:
    try:
        entry: Any = json.loads(line)
    except json.JSONDecodeError:
        raise PromptError(f"{where} is not JSON") from None
    if not isinstance(entry, dict) or not ({"turns", "prompt"} & set(entry)):
        raise PromptError(f'{where} has neither "turns" nor "prompt"')
    turns = entry.get("turns", [entry.get("prompt")])
    if not isinstance(turns, list) or not turns or not all(isinstance(turn, str) and turn for turn in turns):
        raise PromptError(f"{where} has an empty turn, or one that is not a text")
    name = next((entry[key] for key in ("id", "question_id", "task_id") if key in entry), number)
    return Conversation(str(name), str(entry.get("category", default_category)), tuple(turns), "turns" in entry)
