"""How a training keeps what it has: whole or not at all, at any second."""

from __future__ import annotations

import json
import os
import pickle
import re
import signal
import threading
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

from tokentree.cache import replacing
from tokentree.errors import OptionError

SIGNALS = signal.SIGINT, signal.SIGTERM


@contextmanager
def whole() -> Iterator[None]:
    """An interruption waits for the end of the block; a second one doesn't wait.

    Signals that no Python function handles, and threads that don't get any, are left alone.
    """
    came = list[int]()

    def note(number: int, frame: FrameType | None) -> None:
        if came:
            raise KeyboardInterrupt
        came.append(number)

    main = threading.current_thread() is threading.main_thread()
    handlers = {number: own for number in SIGNALS if main and callable(own := signal.getsignal(number))}
    for handled in handlers:
        signal.signal(handled, note)
    try:
        yield
    finally:
        for handled, own in handlers.items():
            signal.signal(handled, own)
        for number in came[:1]:
            handlers[signal.Signals(number)](number, None)


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Raises `OptionError` if what is written in the block can't be; ``path`` is named."""
    try:
        yield
    except (OSError, SafetensorError, RuntimeError) as error:
        raise OptionError(f"can't write {str(path)!r}: {_reason(error)}") from None


def _reason(error: Exception) -> str:
    """The system's own words. safetensors gives its number alone; torch raises something else behind it."""
    cause = error if isinstance(error, OSError) else error.__context__
    if isinstance(cause, OSError) and cause.strerror:
        return cause.strerror
    number = re.search(r"os error (\d+)", str(error))
    return os.strerror(int(number[1])) if number else str(error).splitlines()[0]


def keep_text(file: Path, text: str) -> None:
    """Writes ``text`` into ``file``.

    Raises:
        OptionError: if it can't be written.
    """
    with whole(), writing(file), replacing(file) as part:
        part.write_text(text, encoding="utf-8")


def kept_json(file: Path) -> dict[str, Any] | None:
    """What the JSON in ``file`` says: nothing if it is damaged, None if there is no such file."""
    if not file.is_file():
        return None
    try:
        content = json.loads(file.read_text(encoding="utf-8", errors="replace"))
    except (ValueError, RecursionError):
        return {}
    return content if isinstance(content, dict) else {}


def keep_tensors(file: Path, tensors: dict[str, torch.Tensor]) -> None:
    """Writes ``tensors`` into ``file``.

    Raises:
        OptionError: if it can't be written.
    """
    with whole(), writing(file), replacing(file) as part:
        save_file(tensors, part)


def keep_state(file: Path, content: dict[str, Any]) -> None:
    """Writes ``content``, of plain values and tensors, into ``file``, for `kept_state`.

    Raises:
        OptionError: if it can't be written.
    """
    # through a file of Python's, whose errors say what is wrong
    with whole(), writing(file), replacing(file) as part, part.open("wb") as out:
        torch.save(content, out)


def kept_state(file: Path) -> dict[str, Any] | None:
    """What `keep_state` wrote into ``file``; None if it is damaged.

    Raises:
        OptionError: if it can't be read.
    """
    try:
        with zipfile.ZipFile(file) as parts:
            if parts.testzip() is not None:  # torch.load doesn't look at check sums
                return None
        content = torch.load(file, weights_only=True)
    except OSError as error:
        raise OptionError(f"can't read {str(file)!r}: {error.strerror}") from None
    except (zipfile.BadZipFile, zlib.error, RuntimeError, ValueError, EOFError, KeyError, pickle.UnpicklingError):
        return None
    return content if isinstance(content, dict) else None
