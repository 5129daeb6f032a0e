"""Drafters by name (`drafters.names`), imported when asked for."""

from __future__ import annotations

from collections.abc import Sequence as SequenceOf

from tokentree.drafters.base import Drafter, Parts
from tokentree.drafters.merged import Merged
from tokentree.drafters.names import DRAFT_MODELS, EAGLE_HEADS, MEDUSA_HEADS, fitting, named
from tokentree.errors import OptionError
from tokentree.heads.saved import is_eagle

Named = str | SequenceOf[str | Drafter] | Drafter | None


def drafter_class(name: str) -> type[Drafter]:
    """The drafter class of that name: one of ours, or of an installed package (entry points ``tokentree.drafters``).

    Raises:
        OptionError: if there is none, or what is there is no drafter.
    """
    found = named(name)
    if not (isinstance(found, type) and issubclass(found, Drafter)):
        raise OptionError(f"the drafter {name!r} is no class of drafters: {found!r}")
    return found


def check_names(drafter: Named) -> None:
    """Raises `OptionError` unless ``drafter`` is None, a drafter, the name of one, or a list of these in which none
    comes twice."""
    if drafter is None or isinstance(drafter, Drafter):
        return
    if isinstance(drafter, str):
        drafter_class(drafter)
        return
    if not isinstance(drafter, list | tuple):
        raise OptionError(f"drafter={drafter!r} is neither a name, a list of names nor a Drafter")
    if not drafter:
        raise OptionError("drafter=[] names none: give at least one drafter")
    for place, one in enumerate(drafter):
        if not isinstance(one, Drafter):
            drafter_class(one)
            if one in drafter[:place]:
                raise OptionError(f"the drafter {one!r} is named twice")
            if one == "none" and len(drafter) > 1:
                raise OptionError("the drafter 'none' proposes nothing: leave it out beside others")


def make_drafter(drafter: Named, parts: Parts) -> Drafter:
    """A drafter by its name; several names are merged. Without a name the draft models draft, if there are any and no
    heads. Otherwise it is ``merged``: all drafters that ``parts`` allow, see `drafters.names.fitting`.

    Raises:
        OptionError: if there is none of that name.
        PairingError: if ``parts`` lacks what it needs.
    """
    if isinstance(drafter, Drafter):
        return drafter
    if drafter is None:
        drafter = "draft_model" if parts.draft_engines and parts.heads is None else "merged"
    if drafter == "merged":
        heads = set() if parts.heads is None else {EAGLE_HEADS if is_eagle(parts.heads) else MEDUSA_HEADS}
        drafter = fitting(heads | ({DRAFT_MODELS} if parts.draft_engines else set()))
    if isinstance(drafter, str):
        return drafter_class(drafter).make(parts)
    return Merged([make_drafter(name, parts) for name in drafter])
