"""Drafters by name, imported when asked for."""

from __future__ import annotations

from importlib import import_module

from tokentree.drafters.base import Drafter
from tokentree.errors import OptionError

DRAFTERS = {
    "none": ("tokentree.drafters.none", "NoDrafter"),
    "draft_model": ("tokentree.drafters.draft_model", "DraftModel"),
    "ngram": ("tokentree.drafters.ngram", "NGram"),
    "suffix": ("tokentree.drafters.suffix", "Suffix"),
    "recycling": ("tokentree.drafters.recycling", "Recycling"),
    "merged": ("tokentree.drafters.merged", "Merged"),
}


def drafter_class(name: str) -> type[Drafter]:
    """The drafter class of that name.

    Raises:
        OptionError: if there is none.
    """
    if name not in DRAFTERS:
        raise OptionError(f"unknown drafter {name!r}: choose one of {', '.join(sorted(DRAFTERS))}")
    module, cls = DRAFTERS[name]
    found: type[Drafter] = getattr(import_module(module), cls)
    return found
