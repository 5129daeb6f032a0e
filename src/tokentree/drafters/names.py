"""The registry of drafters: where each one is, what it drafts from, and those that installed packages add."""

from __future__ import annotations

from dataclasses import dataclass

from tokentree.plugins import Registry

NOTHING, DRAFT_MODELS, EAGLE_HEADS, BLOCK_HEADS, MEDUSA_HEADS, ASSISTANTS, OWN_LAYERS, TEXT, OTHERS = (
    "nothing", "draft models", "EAGLE heads", "block heads", "Medusa heads", "Gemma 4 assistants",
    "the target's own layers", "the text", "other drafters",
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
    "draft_model": Entry("tokentree.drafters.other_tokenizer:DraftModels", DRAFT_MODELS),
    "eagle": Entry("tokentree.drafters.eagle:Eagle", EAGLE_HEADS),
    "block": Entry("tokentree.drafters.block:Block", BLOCK_HEADS),
    "medusa": Entry("tokentree.drafters.medusa:Medusa", MEDUSA_HEADS),
    "assistant": Entry("tokentree.drafters.assistant:Assistant", ASSISTANTS),
    "mtp": Entry("tokentree.drafters.mtp:Mtp", OWN_LAYERS),
    "recycling": Entry("tokentree.drafters.lookup.recycling:Recycling", TEXT),
    "suffix": Entry("tokentree.drafters.lookup.suffix:Suffix", TEXT),
    "ngram": Entry("tokentree.drafters.lookup.ngram:NGram", TEXT),
    "merged": Entry("tokentree.drafters.merged:Merged", OTHERS),
}
LOOKUPS = tuple(name for name, entry in DRAFTERS.items() if entry.drafts_from == TEXT)


def fitting(has: set[str]) -> list[str]:
    """The drafters that are merged where there is what ``has`` names: all that need that, or the text alone."""
    return [name for name, entry in DRAFTERS.items() if entry.drafts_from in {TEXT, *has}]


REGISTRY = Registry("drafter", "tokentree.drafters", {name: entry.where for name, entry in DRAFTERS.items()})
