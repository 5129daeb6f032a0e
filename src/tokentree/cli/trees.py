"""The trees of steps, drawn as text."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from tokentree.cli.terminal import BOLD, CYAN, DIM, GREEN, branches, paint, spelled

if TYPE_CHECKING:
    from tokentree.draft import Draft
    from tokentree.sequence import Accepted


@dataclass(frozen=True)
class Step:
    """What one step drafted, and what was accepted of it. Lists have an entry for each node, parents first; node 0 is
    the last token of the text before.

    Args:
        texts: of the tokens, as they are shown.
        parents: -1 for node 0.
        log_probs: the drafter's, after the parent.
        drafters: who proposed a node.
        accepted: whether it was accepted; node 0 always is.
        bonus: likewise, of the token that the model added itself.
    """

    texts: list[str]
    parents: list[int]
    log_probs: list[float]
    drafters: list[list[str]]
    accepted: list[bool]
    bonus: str


def step_of(draft: Draft, accepted: Accepted, names: Sequence[str], text_of: Callable[[int], str]) -> Step:
    """What a watcher sees of a step.

    Args:
        names: the proposers, in the order of the bits in `Draft.sources`.
        text_of: what a token is called.
    """
    kept = set(accepted.path)
    return Step(
        [text_of(token) for token in draft.tokens],
        draft.parents,
        draft.log_probs,
        [[name for bit, name in enumerate(names) if sources >> bit & 1] for sources in draft.sources],
        [node in kept for node in range(len(draft))],
        text_of(accepted.tokens[-1]),
    )


def drawn(step: Step, title: str, with_drafters: bool) -> str:
    """A step as lines for standard error, the accepted path marked.

    Args:
        title: what stands before the root.
        with_drafters: whether it tells who proposed a node.
    """
    labels = [_paint(f"{title}: {step.texts[0]}", BOLD)]
    children: dict[int, list[int]] = {}
    for node in range(1, len(step.texts)):
        kept = step.accepted[node]
        label = _paint(step.texts[node], f"{BOLD};{GREEN}" if kept else DIM)
        label += _paint(f"  {math.exp(step.log_probs[node]):.2f}", DIM)
        if with_drafters:
            label += _paint(f"  {'+'.join(map(spelled, step.drafters[node]))}", DIM)
        labels.append(label + (_paint("  accepted", GREEN) if kept else ""))
        children.setdefault(step.parents[node], []).append(node)
    end = max(node for node, kept in enumerate(step.accepted) if kept or not node)
    children.setdefault(end, []).append(len(labels))
    labels.append(_paint(f"{step.bonus}  bonus", f"{BOLD};{CYAN}"))
    return "\n".join([labels[0], *_lines(labels, children, 0)])


def scale(names: Sequence[str]) -> str:
    """What the numbers in a drawing are, where these drafters propose."""
    told = "numbers: how probable the drafter finds a candidate, after its parent"
    if len(names) > 1:
        told += "; each drafter has a scale of its own, so that siblings of several may add up to more than 1"
    return told


def _paint(text: str, colour: str) -> str:
    return paint(text, colour, sys.stderr)


def _lines(labels: list[str], children: dict[int, list[int]], root: int) -> Iterator[str]:
    """The lines below ``root``."""
    inner, last, bar = branches(sys.stderr)
    waiting = [(child, "") for child in reversed(children.get(root, []))]
    ends = {below[-1] for below in children.values()}
    while waiting:
        node, before = waiting.pop()
        yield before + (last if node in ends else inner) + labels[node]
        before += "    " if node in ends else bar
        waiting += [(child, before) for child in reversed(children.get(node, []))]
