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
            numbers = [name for name, kind_ in known.items() if not issubclass(kind_, Enum)]
            said = [f"{name}={'|'.join(one.value for one in words)}" for name, words in known.items() if issubclass(words, Enum)]
            said += [f"{', '.join(numbers)}, as numbers"] if numbers else []
            takes = f"it takes {', '.join(said)}" if said else "it takes none"
            raise OptionError(f"{part!r} is not an option of this {what}: {takes}") from None
    return found
