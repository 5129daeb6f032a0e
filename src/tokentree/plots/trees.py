"""Pictures of a real step: its tree, and the mask that one forward verified it under. They need matplotlib."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from pathlib import Path
from typing import TYPE_CHECKING

from tokentree.draft import Draft
from tokentree.plots.drawing import BLUE, GREEN, GREY, HEAD, PAGE, SLATE, SMALL, TEXT, draw, readable, width, wrapped
from tokentree.sequence import Accepted
from tokentree.sequence import Sequence as Text
from tokentree.tree import TokenTree

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# inches: around texts, between levels, from leaf to leaf, around a picture and between its parts, of a line of text
PAD, GAP, PITCH, MARGIN, LINE = 0.06, 0.19, 0.46, 0.08, 0.17
CELL, SMALL_CELL, LARGE = 0.16, 0.14, 20  # inches of a node in a mask, and of one in a mask of more nodes than that
MASK = "the mask: each row sees the nodes in its columns, and the text before"
LEGEND = (("accepted", GREEN), ("refused", None), ("bonus token, the target's own", BLUE))


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
    bonus token.

    Raises:
        OptionError: if the file can't be written.
    """
    draw(file, lambda ink: _figure([_tree_block(step, texts, bonus, ink)], title, ink))


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
    """Ways to draft: what each proposes after the same text, and what the target takes of it.

    Raises:
        OptionError: if the file can't be written.
    """

    def make(ink: str) -> Figure:
        blocks = list[_Block]()
        for panel in panels:
            taken = f"{len(panel.step.path) - 1} accepted, and a bonus token"
            note = f"{len(panel.step.tree)} rows in one forward of the target: {taken}"
            blocks.append(_tree_block(panel.step, panel.texts, panel.bonus, ink, panel.title, note))
        return _figure(blocks, "", ink)

    draw(file, make)


def common_step(recorders: Sequence[Recorder]) -> list[Step]:
    """A step of each that begins at the same place in the text: where all together accepted the most."""
    by_start = [dict(zip(recorder.starts(), recorder.steps, strict=True)) for recorder in recorders]
    shared = set.intersection(*(set(steps) for steps in by_start))
    best = max(sorted(shared), key=lambda start: sum(len(steps[start].path) for steps in by_start))
    return [steps[best] for steps in by_start]


def draw_mask(step: Step, texts: Sequence[str], bonus: str, file: Path, title: str) -> None:
    """The tree, and the mask: which nodes each row of the forward sees, itself and its ancestors. All rows see the text
    before as well.

    Raises:
        OptionError: if the file can't be written.
    """
    draw(file, lambda ink: _figure([_tree_block(step, texts, bonus, ink), _mask_block(step, texts, ink)], title, ink))


@dataclass(frozen=True)
class _Block:
    """A part of a picture, ``width`` x ``height`` inches; ``draw`` fills axes whose units are inches, from above."""

    width: float
    height: float
    draw: Callable[[Axes], None]


def _figure(blocks: Sequence[_Block], title: str, ink: str) -> Figure:
    """All blocks beside each other where a page is wide enough, and otherwise below each other."""
    from matplotlib.figure import Figure

    title, legend = readable(title, 200), sum(0.35 + width(name) for name, _ in LEGEND)
    wide = sum(block.width for block in blocks) + 2 * MARGIN * (len(blocks) - 1)
    beside = wide + 2 * MARGIN <= PAGE
    wide = wide if beside else max(block.width for block in blocks)
    wide = max(wide, legend, min(width(title, HEAD), PAGE - 2 * MARGIN)) + 2 * MARGIN
    told = wrapped(title, wide - 2 * MARGIN, HEAD)
    above = LINE * (1 + told.count("\n")) + MARGIN if title else 0.0
    heights = [block.height + 2 * MARGIN for block in blocks]
    high = above + (max(heights) if beside else sum(heights)) + LINE + 2 * MARGIN
    figure = Figure(figsize=(wide, high))

    def part(left: float, top: float, block: _Block) -> None:
        axes = figure.add_axes((left / wide, 1 - (top + block.height) / high, block.width / wide, block.height / high))
        axes.set(xlim=(0, block.width), ylim=(block.height, 0))
        axes.axis("off")
        block.draw(axes)

    if title:
        figure.text(MARGIN / wide, 1 - MARGIN / high, told, va="top", fontsize=HEAD)
    left, top = MARGIN, above + MARGIN
    for block, height in zip(blocks, heights, strict=True):
        part(left, top, block)
        left, top = (left + block.width + 2 * MARGIN, top) if beside else (left, top + height)
    part(MARGIN, high - LINE - MARGIN, _Block(legend, LINE, lambda axes: _legend(axes, ink)))
    return figure


def _legend(axes: Axes, ink: str) -> None:
    left = 0.0
    for name, colour in LEGEND:
        _box(axes, left + 0.02, LINE / 2, 0.16, 0.1, colour, ink)
        axes.text(left + 0.23, LINE / 2, name, va="center_baseline")
        left += 0.35 + width(name)


def _places(tree: TokenTree, last: int) -> tuple[list[float], float]:
    """Per node, its height, and that of the bonus token, which goes on from node ``last``: leaves lie one below
    another, and what has something below it in the middle of that."""
    bonus = len(tree)
    below = {node: [bonus] * (node == last) + list(tree.children[node]) for node in range(bonus)} | {bonus: []}
    heights, rows, waiting = [0.0] * (bonus + 1), 0, [0]
    while waiting:
        node = waiting.pop()
        if not below[node]:
            heights[node], rows = float(rows), rows + 1
        waiting += reversed(below[node])
    for node in reversed(range(bonus)):  # children come after their parents
        if below[node]:
            heights[node] = (heights[below[node][0]] + heights[below[node][-1]]) / 2
    return heights[:bonus], heights[bonus]


@dataclass(frozen=True)
class _Chip:
    """What is drawn for a node: its token, a note below it, its fill (None: an outline)."""

    depth: int
    height: float
    text: str
    note: str
    colour: str | None

    @property
    def width(self) -> float:
        return max(width(self.text, TEXT), width(self.note) if self.note else 0, 0.1) + 2 * PAD


def _chips(step: Step, texts: Sequence[str], bonus: str) -> list[_Chip]:
    """One for each node, and one for the bonus token."""
    depths, kept, several = step.tree.depths.tolist(), set(step.path), len(set(step.proposers[1:])) > 1
    heights, height = _places(step.tree, step.path[-1])
    chips = [_Chip(0, heights[0], readable(texts[0], 24), "", SLATE)]
    for node in range(1, len(step.tree)):
        note = f"{step.probs[node]:.2f}" + (f" {readable(step.proposers[node], 30)}" if several else "")
        colour = GREEN if node in kept else None
        chips.append(_Chip(depths[node], heights[node], readable(texts[node], 24), note, colour))
    return [*chips, _Chip(depths[step.path[-1]] + 1, height, readable(bonus, 24), "bonus", BLUE)]


def _tree_block(step: Step, texts: Sequence[str], bonus: str, ink: str, head: str = "", note: str = "") -> _Block:
    """The tree, under ``head`` and over ``note``. An edge runs level as far as its column is wide, so that it meets no
    other node, and bends in the gap between two columns."""
    chips = _chips(step, texts, bonus)
    columns = [
        max(chip.width for chip in chips if chip.depth == depth) for depth in range(max(c.depth for c in chips) + 1)
    ]
    lefts = [0.02 + sum(columns[:depth]) + GAP * depth for depth in range(len(columns))]
    wide = lefts[-1] + columns[-1] + 0.02
    half = max(wide, PAGE / 2 - 2 * MARGIN)  # of a page, as there are two trees or more where there is a head
    told, noted = wrapped(readable(head, 200), half, HEAD), wrapped(note, half)
    above = LINE * (1 + told.count("\n")) + MARGIN if head else 0.0
    under = LINE * (1 + noted.count("\n")) + MARGIN if note else 0.0
    high = PITCH * (1 + max(chip.height for chip in chips))
    parents = [*step.tree.parents.tolist(), step.path[-1]]

    def fill(axes: Axes) -> None:
        axes.text(0, 0, told, va="top", fontsize=HEAD)
        axes.text(0, above + high + MARGIN, noted, va="top")
        for number, chip in enumerate(chips):
            left, y = lefts[chip.depth], above + PITCH * (chip.height + 0.5)
            if number:
                parent = chips[parents[number]]
                start = lefts[parent.depth] + parent.width, above + PITCH * (parent.height + 0.5)
                _edge(axes, start, left - GAP, (left, y), chip.colour, ink)
            _box(axes, left, y, chip.width, PITCH - 0.1 if chip.note else 0.25, chip.colour, ink)
            colour = ink if chip.colour is None else "white"
            up = 0.075 if chip.note else 0.0
            middle = left + chip.width / 2
            axes.text(middle, y - up, chip.text, ha="center", va="center_baseline", fontsize=TEXT, color=colour)
            axes.text(middle, y + 0.095, chip.note, ha="center", va="center_baseline", fontsize=SMALL, color=colour)

    return _Block(max(wide, width(told, HEAD), width(noted)), above + high + under, fill)


def _mask_block(step: Step, texts: Sequence[str], ink: str) -> _Block:
    """Rows are nodes in the order of the forward, with their tokens; columns are the nodes that they see."""
    count = len(step.tree)
    cell, every = (CELL, 1) if count <= LARGE else (SMALL_CELL, 5)
    names = [readable(text, 24) for text in texts]
    number, label = 0.2, max(map(width, names)) + 0.08
    left = label + number
    wide = max(left + cell * count, 1.6)
    told = wrapped(MASK, wide)
    top = LINE * (2 + told.count("\n"))
    kept = set(step.path)

    def fill(axes: Axes) -> None:
        axes.text(0, 0, told, va="top")
        for node, name in enumerate(names):
            x, y = left + cell * (node + 0.5), top + cell * (node + 0.5)
            axes.text(label - 0.04, y, name, ha="right", va="center_baseline")
            axes.text(left - 0.05, y, str(node), ha="right", va="center_baseline")
            if node % every == 0:
                axes.text(x, top - 0.03, str(node), ha="center", va="bottom")
        for line in range(count + 1):
            for xs, ys in (([0, count], [line, line]), ([line, line], [0, count])):
                axes.plot([left + cell * x for x in xs], [top + cell * y for y in ys], color=ink, alpha=0.25, lw=0.5)
        for row, col in zip(*step.tree.mask.nonzero(), strict=True):
            colour = GREEN if row in kept and col in kept else GREY
            axes.add_patch(_square(left + cell * col, top + cell * row, cell, colour))

    return _Block(wide + 0.02, top + cell * count + 0.02, fill)


def _box(axes: Axes, left: float, y: float, wide: float, high: float, colour: str | None, ink: str) -> None:
    from matplotlib.patches import FancyBboxPatch

    shape = f"round,pad=0,rounding_size={min(0.06, high / 3)}"
    edge = ink if colour is None else colour
    axes.add_patch(
        FancyBboxPatch(
            (left, y - high / 2), wide, high, boxstyle=shape, facecolor=colour or "none", edgecolor=edge, linewidth=0.8
        )
    )


def _edge(
    axes: Axes, start: tuple[float, float], bend: float, end: tuple[float, float], colour: str | None, ink: str
) -> None:
    """From ``start`` level to x = ``bend``, and from there in a curve to ``end``."""
    from matplotlib.patches import PathPatch
    from matplotlib.path import Path as Curve

    (x, y), (to, below) = start, end
    middle = (bend + to) / 2
    points = [(x, y), (bend, y), (middle, y), (middle, below), (to, below)]
    codes = [Curve.MOVETO, Curve.LINETO, Curve.CURVE4, Curve.CURVE4, Curve.CURVE4]
    style = "--" if colour == BLUE else "-"
    axes.add_patch(
        PathPatch(
            Curve(points, codes), facecolor="none", edgecolor=colour or ink, linestyle=style,
            linewidth=0.8 if colour is None else 1.8,
        )
    )  # fmt: skip


def _square(x: float, y: float, side: float, colour: str):  # type: ignore[no-untyped-def]  # matplotlib's, when needed
    from matplotlib.patches import Rectangle

    return Rectangle((x + 0.01, y + 0.01), side - 0.02, side - 0.02, facecolor=colour, edgecolor="none")
