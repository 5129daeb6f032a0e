"""Options as users write them behind a name: ``nodes=16,depth=6``, ``vocabulary=tli``."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from enum import Enum
from typing import Any

from tokentree.errors import OptionError


def options_of(text: str, kind: Callable[..., object], what: str) -> dict[str, Any]:
    """The options ``name=value,…`` of ``kind``, each of the type of its default: a number, or a word of an `Enum`.
    Others can't be written.

    Args:
        what: what ``kind`` makes, for the error.

    Raises:
        OptionError: if ``kind`` has no such option, or a value isn't of its type.
    """
    defaults = {name: option.default for name, option in inspect.signature(kind).parameters.items()}
    known = {name: type(default) for name, default in defaults.items() if isinstance(default, int | float | Enum)}
    found: dict[str, Any] = {}
    for part in filter(None, text.split(",")):
        key, _, value = part.partition("=")
        try:
            found[key] = known[key](value)
        except (KeyError, ValueError):
            takes = f"it takes {_told(known)}" if known else "it takes none"
            raise OptionError(f"{part!r} is not an option of this {what}: {takes}") from None
    return found


def _told(known: dict[str, type]) -> str:
    """The options of these types, in words."""
    words = [f"{name}={'|'.join(one.value for one in kind)}" for name, kind in known.items() if issubclass(kind, Enum)]
    numbers = ", ".join(name for name, kind in known.items() if not issubclass(kind, Enum))
    return ", ".join([*words, *([f"{numbers}, as numbers"] if numbers else [])])
