"""The pictures of a run. They need matplotlib: the extra `plot`."""

from __future__ import annotations

from pathlib import Path

from tokentree.bench.page import GROUPS, acceptance_by_depth, gain, group_of, methods_of, short
from tokentree.bench.results import Run

# Okabe and Ito's colours, which colour-blind people can tell apart
COLOURS = ("#0072B2", "#E69F00", "#009E73", "#D55E00", "#CC79A7", "#56B4E9", "#F0E442", "#000000")
AGAIN = (("", "-", "o"), ("///", "--", "s"), ("...", ":", "^"))  # hatch, line and marker, as colours come round again
FEW = 20  # steps below which a depth is not drawn


def draw_speed(run: Run, file: Path) -> None:
    """How many times as fast as the first method each other one is, overall with its interval, and by task."""
    from matplotlib.figure import Figure

    methods = methods_of(run)
    groups = {group_of(sample.category) for sample in run.samples}
    order = [name for name in GROUPS if name in groups] + sorted(groups - set(GROUPS))
    figure = Figure(figsize=(10, 1.2 + 0.55 * len(methods) + 2.6), layout="constrained", facecolor="white")
    above, below = figure.subplots(2, 1, height_ratios=(0.55 * len(methods) + 0.4, 2.6))
    found = [(name, gain(run.samples, name, methods[0])) for name in methods[1:]]
    shown = [(name, value) for name, value in found if value is not None]
    for place, (_, value) in enumerate(shown):
        errors = [[value.value - value.low], [value.high - value.value]]
        colour, (hatch, _, _) = _style(place)
        above.barh(
            place, value.value, xerr=errors, color=colour, hatch=hatch, edgecolor="white", ecolor="#444444", capsize=3
        )
        above.text(value.high + 0.03, place, f"{value.value:.2f}", va="center", fontsize=9)
    above.set_yticks(range(len(shown)), [short(name) for name, _ in shown], fontsize=9)
    above.invert_yaxis()
    above.axvline(1, color="grey", linestyle=":")
    above.set(title=f"times the speed of {methods[0]}, all prompts", xlim=(0, 1.08 * above.get_xlim()[1]))
    above.grid(axis="x", alpha=0.3)
    fastest = sorted(range(len(shown)), key=lambda place: -shown[place][1].value)[: len(COLOURS)]
    wide = 0.8 / max(1, len(fastest))
    for beside, place in enumerate(sorted(fastest)):
        colour, (hatch, _, _) = _style(place)
        values = [
            gain([s for s in run.samples if group_of(s.category) == g], shown[place][0], methods[0]) for g in order
        ]
        xs = [i + (beside - (len(fastest) - 1) / 2) * wide for i in range(len(order))]
        below.bar(xs, [v.value if v else 0 for v in values], wide, color=colour, hatch=hatch, edgecolor="white")
    below.set_xticks(range(len(order)), order, fontsize=9)
    below.axhline(1, color="grey", linestyle=":")
    title = "by task" if len(fastest) == len(shown) else f"by task, the {len(fastest)} fastest"
    below.set(title=title, ylim=(0, None))
    below.grid(axis="y", alpha=0.3)
    figure.savefig(file, dpi=130)


def _style(place: int) -> tuple[str, tuple[str, str, str]]:
    """Of the method at ``place``: its colour, and what tells it from others of that colour."""
    return COLOURS[place % len(COLOURS)], AGAIN[place // len(COLOURS) % len(AGAIN)]


def draw_acceptance(run: Run, file: Path) -> bool:
    """How often a node was accepted at each depth, by method. False if no method tells."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    figure = Figure(figsize=(9, 4.2), layout="constrained", facecolor="white")
    axes, drawn = figure.subplots(), 0
    for place, name in enumerate(methods_of(run)[1:]):
        points = [(depth, share) for depth, share, steps in acceptance_by_depth(run.samples, name) if steps >= FEW]
        if points:
            colour, (_, line, marker) = _style(place)
            xs, ys = zip(*points, strict=True)
            axes.plot(xs, ys, linestyle=line, marker=marker, color=colour, label=short(name), markersize=4)
            drawn += 1
    if not drawn:
        return False
    axes.set(
        xlabel="depth", ylabel="accepted, of the trees so deep", title="Acceptance by depth", ylim=(0, 1),
        xlim=(0.7, None),
    )  # fmt: skip
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8, loc="upper left", bbox_to_anchor=(1.01, 1.0))  # beside the lines, none of which it hides
    figure.savefig(file, dpi=130)
    return True
