"""The pictures of a run. They need matplotlib: the extra `plot`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from tokentree.bench.figures import PEERS, Gain, acceptance, by_task, gain, methods_of, prompts_of, short_names
from tokentree.bench.results import Run
from tokentree.plots.drawing import BLUE, GREY, HEAD, PAGE, SMALL, draw, readable, width, wrapped

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# inches: of a row's first line and of each further one, of a task's column, around all, of the longest name, of bars
ROW, MORE, COLUMN, MARGIN, NAME, BARS = 0.25, 0.14, 0.4, 0.08, 1.9, 1.0
BAR, SLANT = 0.16, 0.71  # inches of a bar; how far a slanted text reaches, to the right and up
MOST_TASKS = 8  # columns that a page has room for
PANEL = 1.25  # inches of a small picture's height


def draw_speed(run: Run, file: Path) -> None:
    """How many times as fast as the first method each other one decodes, the fastest first: over all prompts with its
    95% interval as bars, and by task in figures. Methods without a turn to compare stand below, without one.

    Raises:
        OptionError: if the file can't be written.
    """
    base, *others = methods_of(run)
    found = {name: gain(run.samples, name, base) for name in others}
    order = sorted(others, key=lambda name: -_speed_of(found[name]))
    tasks = by_task(run)
    parts = {"all": run.samples} | (tasks if 1 < len(tasks) <= MOST_TASKS else {})
    cells = {name: [gain(samples, name, base) for samples in parts.values()] for name in order}
    heads = [f"{readable(name, 24)} ({prompts_of(samples)})" for name, samples in parts.items()]
    heads = heads if len(heads) > 1 else [""]
    draw(file, lambda ink: _speed(run, order, found, cells, heads, ink))


def _speed(
    run: Run, order: Sequence[str], found: dict[str, Gain | None], cells: dict[str, list[Gain | None]],
    heads: Sequence[str], ink: str,
) -> Figure:  # fmt: skip
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    shorter = short_names(methods_of(run))
    base = readable(shorter[methods_of(run)[0]])
    names = [wrapped(readable(shorter[name], 110), NAME) for name in order]
    rows = [ROW + MORE * name.count("\n") for name in names]
    middles = [sum(rows[:row]) + rows[row] / 2 for row in range(len(rows))]
    peers = [name.partition(":")[0] in PEERS for name in order]
    left = MARGIN + max(map(width, names)) + 0.1
    slants = [width(head) * SLANT + 0.1 for head in heads]  # the heads' widths and heights
    beside = max(COLUMN * (column + 0.5) + max(COLUMN / 2, slant) for column, slant in enumerate(slants))
    bars = max(BARS, PAGE - left - beside - MARGIN)
    ends = [left + bars + COLUMN * (column + 0.5) for column in range(len(heads))]
    top, below = MARGIN + 0.25 + max(slants), 0.62
    wide = left + bars + beside + MARGIN
    high = top + sum(rows) + below
    figure = Figure(figsize=(wide, high))
    axes = figure.add_axes((left / wide, below / high, bars / wide, sum(rows) / high))
    reach = max([1.0, *(value.high or value.value for value in found.values() if value is not None)])
    axes.set(xlim=(0, 1.03 * reach), ylim=(sum(rows), 0), xlabel=f"decoding speed, times {base}")
    axes.xaxis.set_major_locator(MaxNLocator(4, steps=[1, 2, 5, 10]))
    axes.axvline(1, color=ink, linestyle="--", linewidth=0.9, zorder=0)
    axes.annotate(base, (1, 0), xytext=(0, 3), textcoords="offset points", ha="center")
    for name, y, peer in zip(order, middles, peers, strict=True):
        _bar(axes, found[name], y, GREY if peer else BLUE, ink)
    axes.set_yticks(middles, names)
    axes.tick_params(axis="y", length=0)
    figure.text(MARGIN / wide, 1 - MARGIN / high, _told(run, base, len(heads) > 1), va="top", fontsize=HEAD)
    for column, (head, x) in enumerate(zip(heads, ends, strict=True)):
        figure.text(x / wide, 1 - (top - 0.06) / high, head, va="bottom", rotation=45, rotation_mode="anchor")
        best = max(_speed_of(cells[name][column]) for name in order)
        for name, y in zip(order, middles, strict=True):
            value = _speed_of(cells[name][column])
            told, weight = f"{value:.2f}" if value else "-", "bold" if value == best else "normal"
            figure.text(x / wide, 1 - (top + y) / high, told, ha="center", va="center", weight=weight)
    _tones(figure, peers, any(value is not None and value.low is not None for value in found.values()), ink)
    return figure


def _speed_of(value: Gain | None) -> float:
    return 0.0 if value is None else value.value


def _told(run: Run, base: str, tasks: bool) -> str:
    prompts = prompts_of(run.samples)
    over = "1 prompt, no interval" if prompts == 1 else f"{prompts} prompts"
    return f"Times the speed of {base}: over {over}" + (", and by task (number of prompts)" if tasks else "")


def _bar(axes: Axes, value: Gain | None, y: float, colour: str, ink: str) -> None:
    """What lies on the bar is white, what lies beside it has the page's ink."""
    if value is None:
        return
    axes.barh(y, value.value, height=BAR, color=colour)
    if value.value > 1:
        axes.plot([1, 1], [y - BAR / 2, y + BAR / 2], color="white", linestyle="--", linewidth=0.9)
    if value.low is not None and value.high is not None:
        for end, tone in ((value.low, "white"), (value.high, ink)):
            axes.plot([end, value.value], [y, y], color=tone, linewidth=1, solid_capstyle="butt")
            axes.plot([end], [y], color=tone, marker="|", markersize=6, clip_on=False)


def _tones(figure: Figure, peers: Sequence[bool], intervals: bool, ink: str) -> None:
    """What the tones and the lines mean, below."""
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    keys: list[Patch | Line2D] = [Patch(color=BLUE, label="tokentree")] if not all(peers) else []
    keys += [Patch(color=GREY, label="other libraries")] if any(peers) else []
    keys += (
        [Line2D([], [], color=ink, linewidth=1, marker="|", markersize=5, label="95% interval")] if intervals else []
    )
    wide, high = figure.get_size_inches()
    figure.legend(
        handles=keys, ncols=3, loc="lower left", bbox_to_anchor=(MARGIN / wide, 0.02 / high), borderaxespad=0,
        handlelength=1.2, columnspacing=1.2,
    )  # fmt: skip


def draw_acceptance(run: Run, file: Path) -> bool:
    """How often a node was accepted at each depth: a small picture for each method, with the others' lines behind its
    own. False if no method tells, and then nothing is drawn.

    Raises:
        OptionError: if the file can't be written.
    """
    found = acceptance(run)
    if found:
        order = sorted(found, key=lambda name: -found[name][0][1])
        shorter = short_names(methods_of(run))
        names = [readable(shorter[name], 110) for name in order]
        draw(file, lambda ink: _acceptance(names, [found[name] for name in order], ink))
    return bool(found)


def _acceptance(names: Sequence[str], found: Sequence[list[tuple[int, float]]], ink: str) -> Figure:
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator, PercentFormatter

    columns = min(3, len(found))
    rows = -(-len(found) // columns)
    wide = PAGE if columns == 3 else 1.2 + 2.4 * columns
    names = [wrapped(name, (wide - 0.5) / columns - 0.25) for name in names]
    lines = 1 + max(name.count("\n") for name in names)
    figure = Figure(figsize=(wide, 0.5 + rows * (PANEL + MORE * lines)), layout="constrained")
    panels = figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False).flatten()
    deepest = max(depth for points in found for depth, _ in points)
    for axes, name, points in zip(panels, names, found):
        for other in found:
            axes.plot(*zip(*other, strict=True), color=ink, alpha=0.25, linewidth=0.7)
        axes.plot(*zip(*points, strict=True), "o-", color=BLUE, markersize=3.5, linewidth=1.5)
        axes.set_title(name, fontsize=SMALL, loc="left")
        axes.set(xlim=(0.6, deepest + 0.4), ylim=(0, 1.03))
        axes.yaxis.set_major_formatter(PercentFormatter(1))
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=8))
        axes.grid(alpha=0.25, linewidth=0.5)
        axes.tick_params(labelbottom=True)
    for axes in panels[len(found) :]:
        axes.remove()
    figure.supxlabel("depth of a node, in tokens after the text", fontsize=SMALL)
    figure.supylabel("accepted,\n% of steps so deep", fontsize=SMALL)
    return figure
