"""Texts to train on, from a file."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from tokentree.errors import PromptError
from tokentree.prompts import read_text

LEAST = 8  # tokens of a text that is worth reading
FEWEST = 2  # texts: one to train on, and one to look at
OTHER = "other"  # the kind of what no kind is told of
ROLES = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "system": "system"}


@dataclass(frozen=True)
class Text:
    """A text.

    Args:
        ids: of its tokens.
        kind: by which it is told from others in figures.
        answers: the first of its tokens that the model wrote, and the one behind the last, for each answer; None: all
            of it is learnt from.
        group: texts of one group are about one another; None: it is about no other.
    """

    ids: list[int]
    kind: str = OTHER
    answers: tuple[tuple[int, int], ...] | None = None
    group: int | None = None


@dataclass
class Texts:
    """Texts, and what was wrong with the lines that were left out."""

    texts: list[Text] = field(default_factory=list)
    bad: list[str] = field(default_factory=list)

    @property
    def ids(self) -> list[list[int]]:
        return [text.ids for text in self.texts]

    @property
    def tokens(self) -> int:
        return sum(len(text.ids) for text in self.texts)

    def held_back(self, share: float) -> list[int]:
        """Numbers of texts that are not trained on: of each kind about this share, spread over it, and of several at
        least one; and with each text those of its group, which is of the kind of its last one. They stay what they are
        where more texts follow."""
        groups = dict[object, list[int]]()
        for number, text in enumerate(self.texts):
            groups.setdefault(("alone", number) if text.group is None else text.group, []).append(number)
        by_kind = dict[str, list[list[int]]]()
        for numbers in groups.values():
            by_kind.setdefault(self.texts[numbers[-1]].kind, []).append(numbers)
        found = list[int]()
        for some in by_kind.values():
            chosen = [at for at in range(len(some)) if int((at + 1) * share) > int(at * share)]
            for at in chosen or [len(some) - 1] * (len(some) > 1):
                found += some[at]
        return sorted(found) or [len(self.texts) - 1]

    @property
    def digest(self) -> str:
        """What tells these texts from others."""
        said = [[text.kind, text.ids, text.answers, text.group] for text in self.texts]
        return hashlib.sha256(json.dumps(said).encode()).hexdigest()


def read_texts(
    path: str | Path, tokenizer: PreTrainedTokenizerBase, max_tokens: int = 1024, vocab_size: int | None = None
) -> Texts:
    """The texts of a JSON-lines file: objects with ``text``, with ``prompt`` and ``completion``, with ``messages``
    (``role``, ``content``) or with ``conversations`` (``from``, ``value``). The latter two go through the chat
    template. ``kind`` tells texts of several kinds apart.

    Args:
        max_tokens: what a text has beyond these is left out.
        vocab_size: texts with a token id of so much or more are left out, if it is given.

    Raises:
        PromptError: if the file can't be read, or no line of it is such a text.
    """
    found = Texts()
    for number, line in _lines(path):
        try:
            entry = _entry(line)
            ids = _ids(entry, tokenizer)[:max_tokens]
            if len(ids) < LEAST:
                raise PromptError(f"has fewer than {LEAST} tokens")
            if vocab_size is not None and max(ids) >= vocab_size:
                raise PromptError("has a token that the model doesn't know")
        except PromptError as error:
            found.bad.append(f"line {number} {error}")
        else:
            found.texts.append(Text(ids, _kind(entry)))
    if not found.texts:
        raise _no_text(path, found.bad)
    if len(found.texts) < FEWEST:
        raise PromptError(f"the training data {str(path)!r} has one text: some are trained on, and others looked at")
    return found


def check_data(path: str | Path) -> None:
    """Raises `PromptError` unless `read_texts` would find a text in the file that a tokenizer can read: what can be
    told before a model is loaded."""
    bad = list[str]()
    for number, line in _lines(path):
        try:
            parts_of(_entry(line))
        except PromptError as error:
            bad.append(f"line {number} {error}")
        else:
            return
    raise _no_text(path, bad)


def _no_text(path: str | Path, bad: list[str]) -> PromptError:
    more = f", and {len(bad) - 1:,} more lines are no texts" if len(bad) > 1 else ""
    return PromptError(f"the training data {str(path)!r} has no text: " + (bad or ["it is empty"])[0] + more)


def _lines(path: str | Path) -> Iterator[tuple[int, str]]:
    """The lines of a file that aren't empty, and their numbers. They end at line feeds alone, as JSON lines do."""
    content = read_text(path, "the training data")
    return ((number, line) for number, line in enumerate(content.split("\n"), start=1) if line.strip())


def _entry(line: str) -> Any:
    try:
        return json.loads(line)
    except (ValueError, RecursionError):
        raise PromptError("is not JSON") from None


def parts_of(entry: Any) -> str | list[dict[str, str]]:
    """The text of a line, or its messages.

    Raises:
        PromptError: if it has neither.
    """
    if not isinstance(entry, dict):
        raise PromptError("is not an object")
    text = entry.get("text")
    if isinstance(entry.get("prompt"), str) and isinstance(entry.get("completion"), str):
        text = entry["prompt"] + entry["completion"]
    if isinstance(text, str):
        return _unicode(text)
    turns = entry.get("messages", entry.get("conversations"))
    if not isinstance(turns, list) or not turns:
        raise PromptError('has neither "text", "prompt" and "completion", "messages" nor "conversations"')
    return [_message(turn) for turn in turns]


def _kind(entry: dict[str, Any]) -> str:
    kind = entry.get("kind")
    return kind if isinstance(kind, str) and kind.strip() else OTHER


def _ids(entry: Any, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    parts = parts_of(entry)
    if isinstance(parts, str):
        return [int(token) for token in tokenizer(parts).input_ids]
    return chat_ids(tokenizer, parts, answered=True)


def _unicode(text: str) -> str:
    try:
        text.encode()
    except UnicodeEncodeError:
        raise PromptError("has half a character: a surrogate without its other one") from None
    return text


def _message(turn: Any) -> dict[str, str]:
    if isinstance(turn, dict):
        role, content = turn.get("role", turn.get("from")), turn.get("content", turn.get("value"))
        if isinstance(role, str) and role in ROLES and isinstance(content, str):
            return {"role": ROLES[role], "content": _unicode(content)}
    raise PromptError("has a message without a known role, or without a text")


def chat_ids(tokenizer: PreTrainedTokenizerBase, messages: list[dict[str, str]], answered: bool = False) -> list[int]:
    """``messages`` in the chat template, open for an answer unless they are ``answered``."""
    if not tokenizer.chat_template:
        raise PromptError("is a conversation, and the tokenizer has no chat template")
    options: dict[str, Any] = {"tokenize": True, "return_dict": False}
    try:
        ids = tokenizer.apply_chat_template(messages, add_generation_prompt=not answered, **options)
    except (TemplateError, ValueError) as error:
        reason = str(error).partition("\n")[0]
        raise PromptError(f"is a conversation that the chat template refuses: {reason}") from None
    return [int(token) for token in ids]  # type: ignore[arg-type]


def coverage(texts: Texts, known: torch.Tensor | None) -> float:
    """The share of all tokens of the texts that are among ``known``."""
    if known is None:
        return 1.0
    there = set(known.tolist())
    return sum(token in there for ids in texts.ids for token in ids) / max(1, texts.tokens)
