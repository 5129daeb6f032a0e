"""What is looked at of texts held back, kind by kind, so that a kind at which a head is weak is seen."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from tokentree.train.features import HiddenTexts
from tokentree.train.loop import Figures

LOOK = 24  # texts that a look reads, and
EACH = 6  # of each kind at least, if there are so many
STEP = "tokens a step"
BY_KIND = ": "  # in the name of a figure, between the kind that it is of and what it is


@dataclass
class KindLook:
    """What a head does at texts of one kind.

    Args:
        loss: summed over texts.
        texts: how many there were.
        right: first choices that were the text's tokens, where all before them were.
        places: that these were counted behind.
    """

    kind: str
    loss: float = 0.0
    texts: int = 0
    right: int = 0
    places: int = 0

    def note(self, loss: float, texts: int, right: int, places: int) -> None:
        """Further texts, of this mean loss."""
        self.loss, self.texts = self.loss + loss * texts, self.texts + texts
        self.right, self.places = self.right + right, self.places + places


def joined(looks: Sequence[KindLook]) -> tuple[float, Figures]:
    """The loss of all, and figures: the tokens of a step, the target's own included, and if there are several kinds
    both of each."""
    there = [look for look in looks if look.texts]
    texts, right, places = (sum(getattr(look, name) for look in there) for name in ("texts", "right", "places"))
    figures = {STEP: 1 + right / max(1, places)}
    for look in there if len(there) > 1 else ():
        figures[f"{look.kind}{BY_KIND}{STEP}"] = 1 + look.right / max(1, look.places)
        figures[f"{look.kind}{BY_KIND}loss"] = look.loss / look.texts
    return sum(look.loss for look in there) / max(1, texts), figures


def looked_at(
    texts: HiddenTexts, spans: Sequence[tuple[int, int]], look: int = LOOK
) -> dict[str, list[tuple[int, int]]]:  # fmt: skip
    """Spans of about ``look`` of the texts, of each kind as many, by kind."""
    kinds = dict(zip(texts.spans(), texts.kinds_of(), strict=True))
    found = dict[str, list[tuple[int, int]]]()
    for span in spans:
        found.setdefault(kinds[span], []).append(span)
    each = max(EACH, look // max(1, len(found)))
    return {kind: found[kind][:each] for kind in sorted(found)}


def told(figures: Mapping[str, float]) -> list[str]:
    """Lines that tell figures: those of all texts, then those of each kind."""
    general = ", ".join(f"{name} {value:.3f}" for name, value in figures.items() if BY_KIND not in name)
    kinds = ", ".join(f"{kind} {step:.2f} (loss {loss:.2f})" for kind, step, loss in by_kind(figures))
    return [general, *([f"tokens a step by kind: {kinds}"] if kinds else [])]


def by_kind(figures: Mapping[str, float]) -> list[tuple[str, float, float]]:
    """Of each kind, its tokens a step and its loss."""
    kinds = [name.removesuffix(BY_KIND + STEP) for name in figures if name.endswith(BY_KIND + STEP)]
    return [(kind, figures[f"{kind}{BY_KIND}{STEP}"], figures[f"{kind}{BY_KIND}loss"]) for kind in kinds]


def listed(figures: Mapping[str, float]) -> str:
    """For a model card: figures of all texts as a list, then those of each kind as a table."""
    lines = [
        f"- {name}: {value:.1%}" if "top-1" in name else f"- {name}: {value:.2f}"
        for name, value in figures.items()
        if BY_KIND not in name
    ]
    return "\n".join(lines) + table(figures)


def table(figures: Mapping[str, float]) -> str:
    """For a model card: the figures of each kind, behind an empty line; nothing if there are none."""
    rows = [f"| {kind} | {step:.2f} | {loss:.3f} |" for kind, step, loss in by_kind(figures)]
    return "\n".join(["\n\n| kind of texts | tokens a step | loss |", "|---|---|---|", *rows]) if rows else ""
