"""Drafters by name (`drafters.names`), imported when asked for."""

from __future__ import annotations

from collections.abc import Sequence as SequenceOf
from importlib import import_module

from tokentree.drafters.base import Drafter, Parts
from tokentree.drafters.merged import Merged
from tokentree.drafters.names import DRAFTERS, LOOKUPS
from tokentree.errors import OptionError
from tokentree.heads.saved import is_eagle

Named = str | SequenceOf[str] | Drafter | None


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


def check_names(drafter: Named) -> None:
    """Raises `OptionError` if ``drafter`` names one that there isn't."""
    if drafter is not None and not isinstance(drafter, Drafter):
        for name in [drafter] if isinstance(drafter, str) else drafter:
            drafter_class(name)


def make_drafter(drafter: Named, parts: Parts) -> Drafter:
    """A drafter by its name; several names are merged. Without a name the draft models draft, and if there are none,
    heads (if there are any) and all of `LOOKUPS`. ``merged`` stands for everything that ``parts`` allow.

    Raises:
        OptionError: if there is none of that name.
        PairingError: if ``parts`` lacks what it needs.
    """
    if isinstance(drafter, Drafter):
        return drafter
    if drafter is None:
        drafter = "draft_model" if parts.draft_engines else "merged"
    if drafter == "merged":
        models = ("draft_model",) if parts.draft_engines else ()
        heads = () if parts.heads is None else ("eagle",) if is_eagle(parts.heads) else ("medusa",)
        drafter = (*models, *heads, *LOOKUPS)
    if isinstance(drafter, str):
        return drafter_class(drafter).make(parts)
    return Merged([make_drafter(name, parts) for name in drafter])
