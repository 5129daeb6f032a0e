"""Conversations in files: a JSON list of messages."""

from __future__ import annotations

import json
from pathlib import Path

from tokentree.cache import replacing
from tokentree.chat import ROLES, Message, read_messages
from tokentree.errors import OptionError, PromptError
from tokentree.prompts import read_text


def save(messages: list[Message], file: Path, over: bool) -> None:
    """Writes ``messages``.

    Args:
        over: whether a file that is there may be replaced.

    Raises:
        OptionError: if it may not, or nothing can be written.
    """
    text = json.dumps(messages, ensure_ascii=False, indent=2) + "\n"
    try:
        if file.is_dir():
            raise OptionError(f"{str(file)!r} is a folder: name a file")
        if not over:
            with file.open("x", encoding="utf-8") as new:
                new.write(text)
            return
        if not file.parent.is_dir():
            raise OptionError(f"there is no folder {str(file.parent)!r}")
        with replacing(file.resolve()) as part:
            part.write_text(text, encoding="utf-8")
    except FileExistsError:
        raise OptionError(f"{str(file)!r} is there already: /save! replaces it") from None
    except OSError as error:
        raise OptionError(f"can't write {str(file)!r}: {error.strerror or error}") from None


def load(file: Path) -> list[Message]:
    """The messages that a file holds: a list of them, or an object with ``messages``. Roles and texts are kept.

    Raises:
        PromptError: if it can't be read, or holds none.
    """
    try:
        messages = read_messages(json.loads(read_text(file, "the conversation")))
    except (ValueError, RecursionError) as error:
        if isinstance(error, PromptError):
            raise
        raise PromptError(f"{str(file)!r} is not JSON") from None
    for number, message in enumerate(messages, start=1):
        if message["role"] not in ROLES:
            raise PromptError(f"message {number} has the unknown role {message['role']!r}: use {', '.join(ROLES)}")
    return [{"role": message["role"], "content": message["content"]} for message in messages]
