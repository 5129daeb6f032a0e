"""The registry of drafters: where each one is, imported when it is asked for, and what it drafts from."""

from __future__ import annotations

from dataclasses import dataclass
from importlib import import_module
from importlib.metadata import entry_points
from typing import Any

from tokentree.errors import OptionError

GROUP = "tokentree.drafters"  # of the entry points by which other packages add drafters
NOTHING, DRAFT_MODELS, EAGLE_HEADS, MEDUSA_HEADS, TEXT, OTHERS = (
    "nothing", "draft models", "EAGLE heads", "Medusa heads", "the text", "other drafters",
)  # fmt: skip


@dataclass(frozen=True)
class Entry:
    """A drafter of the registry.

    Args:
        where: its class, as ``module:name``.
        drafts_from: what it needs.
    """

    where: str
    drafts_from: str


# in the order in which they are merged, and shown
DRAFTERS = {
    "none": Entry("tokentree.drafters.none:NoDrafter", NOTHING),
    "draft_model": Entry("tokentree.drafters.draft_model:DraftModel", DRAFT_MODELS),
    "eagle": Entry("tokentree.drafters.eagle:Eagle", EAGLE_HEADS),
    "medusa": Entry("tokentree.drafters.medusa:Medusa", MEDUSA_HEADS),
    "recycling": Entry("tokentree.drafters.lookup.recycling:Recycling", TEXT),
    "suffix": Entry("tokentree.drafters.lookup.suffix:Suffix", TEXT),
    "ngram": Entry("tokentree.drafters.lookup.ngram:NGram", TEXT),
    "merged": Entry("tokentree.drafters.merged:Merged", OTHERS),
}
LOOKUPS = tuple(name for name, entry in DRAFTERS.items() if entry.drafts_from == TEXT)


def fitting(has: set[str]) -> list[str]:
    """The drafters that are merged where there is what ``has`` names: all that need that, or the text alone."""
    return [name for name, entry in DRAFTERS.items() if entry.drafts_from in {TEXT, *has}]


def installed() -> dict[str, str]:
    """The drafters of other packages that are installed here, with the package of each."""
    return {point.name: point.dist.name if point.dist else "?" for point in entry_points(group=GROUP)}


def named(name: str) -> Any:
    """What the registry, or else an installed package, has under that name.

    Raises:
        OptionError: if there is nothing, if two packages have it, or if it can't be imported.
    """
    if isinstance(name, str) and name in DRAFTERS:
        module, _, attribute = DRAFTERS[name].where.partition(":")
        return getattr(import_module(module), attribute)
    found = [point for point in entry_points(group=GROUP) if point.name == name]
    if not found:
        raise OptionError(f"unknown drafter {name!r}: choose one of {', '.join(sorted({*DRAFTERS, *installed()}))}")
    packages = [point.dist.name if point.dist else point.value for point in found]
    if len(found) > 1:
        raise OptionError(f"the drafter {name!r} is in several packages: {', '.join(sorted(packages))}")
    try:
        return found[0].load()
    except (ImportError, AttributeError) as error:
        raise OptionError(f"the drafter {name!r} of {packages[0]} can't be imported: {error}") from error
