"""Pictures of a real step: its tree, and the mask that one forward verified it under. They need matplotlib."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from pathlib import Path
from typing import TYPE_CHECKING

from tokentree.draft import Draft
from tokentree.sequence import Accepted
from tokentree.sequence import Sequence as Text
from tokentree.tree import TokenTree

if TYPE_CHECKING:
    from matplotlib.axes import Axes

ACCEPTED, BONUS, REFUSED, INK = "#009E73", "#0072B2", "#B0B0B0", "#222222"  # of Okabe and Ito's colours, and greys


@dataclass(frozen=True)
class Step:
    """A step of decoding.

    Args:
        tree: what was verified.
        probs: per node, what its drafter gave it after its parent.
        proposers: per node, who proposed it.
        path: the nodes that were accepted, the root first.
        bonus: the token that the target added.
    """

    tree: TokenTree
    probs: list[float]
    proposers: list[str]
    path: list[int]
    bonus: int


@dataclass
class Recorder:
    """Keeps all steps, as a decoder's ``watch``.

    Args:
        names: of the drafters, in the order of a node's source bits.
    """

    names: Sequence[str]
    steps: list[Step] = field(default_factory=list)

    def __call__(self, seq: Text, draft: Draft, accepted: Accepted) -> None:
        proposers = ["+".join(name for bit, name in enumerate(self.names) if s >> bit & 1) for s in draft.sources]
        probs = [math.exp(score) for score in draft.log_probs]
        self.steps.append(Step(draft.tree, probs, proposers, list(accepted.path), accepted.tokens[-1]))

    def starts(self) -> list[int]:
        """Per step, how many tokens the text had gained before it."""
        return [0, *accumulate(len(step.path) for step in self.steps)][:-1]

    def busiest(self) -> int:
        """The first step of those that accepted the most, counted from 1; of equals that with the larger tree."""
        best = max(self.steps, key=lambda step: (len(step.path), len(step.tree)))
        return self.steps.index(best) + 1


def draw_tree(step: Step, texts: Sequence[str], bonus: str, file: Path, title: str) -> None:
    """The tree from left to right: tokens, probabilities, who proposed what if that differs, the accepted path and the
    bonus token."""
    from matplotlib.figure import Figure

    depth, rows = int(step.tree.depths.max()), len(step.tree.leaves) + 1
    figure = Figure(figsize=(2.2 + 1.9 * (depth + 1), 1.1 + 0.55 * rows), layout="constrained", facecolor="white")
    axes = figure.subplots()
    _tree(axes, step, texts, bonus)
    axes.set_title(title, fontsize=10)
    figure.savefig(file, dpi=130)


@dataclass(frozen=True)
class Panel:
    """One way to draft, in `draw_methods`.

    Args:
        title: what it is called, and what it does.
        step: of the same place in a text as those of the other panels.
        texts, bonus: as for `draw_tree`.
    """

    title: str
    step: Step
    texts: Sequence[str]
    bonus: str


def draw_methods(panels: Sequence[Panel], file: Path) -> None:
    """Ways to draft side by side: what each proposes after the same text, and what the target takes of it."""
    from matplotlib.figure import Figure

    widths = [2.2 + 1.9 * (int(panel.step.tree.depths.max()) + 1) for panel in panels]
    rows = max(len(panel.step.tree.leaves) for panel in panels) + 1
    figure = Figure(figsize=(sum(widths), 2.2 + 0.55 * rows), layout="constrained", facecolor="white")
    for axes, panel in zip(figure.subplots(1, len(panels), width_ratios=widths), panels, strict=True):
        step = panel.step
        _tree(axes, step, panel.texts, panel.bonus)
        axes.set_title(panel.title, fontsize=10)
        taken = f"{len(step.path) - 1} accepted, and a bonus token"
        told = f"verified in one forward of the target, {len(step.tree)} rows: {taken}"
        axes.text(0.5, -0.04, told, transform=axes.transAxes, ha="center", va="top", fontsize=9, color=INK)
    figure.savefig(file, dpi=130)


def common_step(recorders: Sequence[Recorder]) -> list[Step]:
    """A step of each that begins at the same place in the text: where all together accepted the most."""
    by_start = [dict(zip(recorder.starts(), recorder.steps, strict=True)) for recorder in recorders]
    shared = set.intersection(*(set(steps) for steps in by_start))
    best = max(sorted(shared), key=lambda start: sum(len(steps[start].path) for steps in by_start))
    return [steps[best] for steps in by_start]


def draw_mask(step: Step, texts: Sequence[str], bonus: str, file: Path, title: str) -> None:
    """The tree, and beside it which nodes each row of the forward sees: itself and its ancestors. All rows see the text
    before as well."""
    from matplotlib.figure import Figure

    count, depth = len(step.tree), int(step.tree.depths.max())
    size = max(3.4, 0.34 * count)
    figure = Figure(
        figsize=(2.2 + 1.9 * (depth + 1) + size + 1.6, max(size + 1.2, 1.1 + 0.55 * len(step.tree.leaves))),
        layout="constrained", facecolor="white",
    )  # fmt: skip
    left, right = figure.subplots(1, 2, width_ratios=(2.2 + 1.9 * (depth + 1), size + 1.6))
    _tree(left, step, texts, bonus)
    for row, col in zip(*step.tree.mask.nonzero(), strict=True):
        colour = ACCEPTED if row in step.path and col in step.path else "#707070"
        right.add_patch(_square(int(col), int(row), colour))
    names = [f"{text}  {node}" for node, text in enumerate(texts)]
    right.set(xlim=(-0.5, count - 0.5), ylim=(count - 0.5, -0.5), aspect="equal")
    right.set_yticks(range(count), names, fontsize=8)
    right.set_xticks(range(count), [str(node) for node in range(count)], fontsize=8)
    right.set_xticks([x - 0.5 for x in range(count + 1)], minor=True)
    right.set_yticks([y - 0.5 for y in range(count + 1)], minor=True)
    right.grid(which="minor", color="#DDDDDD", linewidth=0.6)
    right.tick_params(which="both", length=0)
    right.set(xlabel="sees node", title="the mask, one row for each node")
    figure.suptitle(title, fontsize=10)
    figure.savefig(file, dpi=130)


def _places(tree: TokenTree, last: int) -> tuple[list[float], float]:
    """Per node, its height, and that of the bonus token, which goes on from node ``last``: leaves lie one below
    another, and what has something below it in the middle of that."""
    heights, bonus, taken = [0.0] * len(tree), 0.0, 0

    def place(node: int) -> None:
        nonlocal bonus, taken
        below = []
        if node == last:
            bonus, taken = float(taken), taken + 1
            below.append(bonus)
        for child in tree.children[node]:
            place(child)
            below.append(heights[child])
        if not below:
            below, taken = [float(taken)], taken + 1
        heights[node] = (below[0] + below[-1]) / 2

    place(0)
    return heights, bonus


def _tree(axes: Axes, step: Step, texts: Sequence[str], bonus: str) -> None:
    depths, kept, several = step.tree.depths.tolist(), set(step.path), len(set(step.proposers[1:])) > 1
    last = step.path[-1]
    heights, height = _places(step.tree, last)
    for node in range(1, len(step.tree)):
        parent, colour = int(step.tree.parents[node]), ACCEPTED if node in kept else REFUSED
        axes.plot(
            [depths[parent], depths[node]], [heights[parent], heights[node]], color=colour, zorder=1,
            linewidth=2.4 if node in kept else 1.1,
        )  # fmt: skip
    axes.plot([depths[last], depths[last] + 1], [heights[last], height], color=BONUS, linestyle="--", zorder=1)
    _label(axes, depths[last] + 1, height, bonus, BONUS, "bonus")
    for node, text in enumerate(texts):
        note = "" if node == 0 else f"{step.probs[node]:.2f}"
        if several and node:
            note += f"  {step.proposers[node]}"
        colour = INK if node == 0 else ACCEPTED if node in kept else REFUSED
        _label(axes, depths[node], heights[node], text, colour, note)
    axes.set(xlim=(-0.5, max(*depths, depths[last] + 1) + 0.6), ylim=(max(*heights, height) + 0.7, -0.7))
    axes.axis("off")


def _label(axes: Axes, x: float, y: float, text: str, colour: str, note: str) -> None:
    box = {"boxstyle": "round,pad=0.3", "facecolor": "white", "edgecolor": colour, "linewidth": 1.6}
    axes.text(x, y, text, ha="center", va="center", fontsize=9, color=INK, bbox=box, zorder=2, parse_math=False)
    if note:
        axes.annotate(
            note, (x, y), xytext=(0, -14), textcoords="offset points", ha="center", va="center", fontsize=7,
            color="#555555", zorder=3, bbox={"boxstyle": "square,pad=0.1", "facecolor": "white", "edgecolor": "none"},
        )  # fmt: skip


def _square(x: int, y: int, colour: str):  # type: ignore[no-untyped-def]  # matplotlib is imported when it is needed
    from matplotlib.patches import Rectangle

    return Rectangle((x - 0.5, y - 0.5), 1, 1, facecolor=colour, edgecolor="white")
