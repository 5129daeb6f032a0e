"""Pictures of what a forward costs, and of what drafts are worth. They need matplotlib: the extra `plot`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from tokentree.calibrate import SIZES, Calibration
from tokentree.plots.drawing import BLUE, HEAD, PAGE, SMALL, draw, readable, wrapped
from tokentree.shapes import CostCurve

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

MOST = 12  # kinds of candidates that are shown
BELOW: dict[str, Any] = {"ncols": 2, "loc": "upper center", "bbox_to_anchor": (0.5, -0.22), "columnspacing": 1.2}
TICKS = (1, 2, 4, 8, 16, 32, 64)


def plot_calibration(found: Calibration, file: Path) -> None:
    """Draws the cost curve, the expected speed-up by tree size, and the acceptance rates.

    Raises:
        OptionError: if the file can't be written.
    """

    def make(ink: str) -> Figure:
        from matplotlib.figure import Figure

        bars = max(1, min(MOST, len(_first_level(found))))
        figure = Figure(figsize=(PAGE, 4.0 + 0.2 * bars), layout="constrained")
        grid = figure.add_gridspec(2, 1, height_ratios=(3.2, 0.8 + 0.2 * bars))
        cost, gains = figure.add_subfigure(grid[0]).subplots(1, 2)
        _cost(cost, found.rows, found.seconds, ink)
        _gains(gains, found, ink)
        _rates(figure.add_subfigure(grid[1]).add_subplot(), found)
        figure.suptitle(_engine(found.engine), fontsize=HEAD)
        return figure

    draw(file, make)


def plot_cost(curve: CostCurve, engine: str, file: Path) -> None:
    """Draws T(n), what a forward over n rows takes: in milliseconds, and in forwards over one row.

    Raises:
        OptionError: if the file can't be written.
    """

    def make(ink: str) -> Figure:
        from matplotlib.figure import Figure

        figure = Figure(figsize=(PAGE, 3.1), layout="constrained")
        left, right = figure.subplots(1, 2)
        times = [1e3 * seconds for seconds in curve.points]
        left.plot(curve.rows, times, "o-", color=BLUE, markersize=4)
        for rows, time in zip(curve.rows, times, strict=True):
            if rows in (1, 8, 16, 32, 64):
                left.annotate(
                    f"{time:.1f}", (rows, time), xytext=(0 if rows == 1 else -3, 5), textcoords="offset points",
                    ha="center" if rows == 1 else "right",
                )  # fmt: skip
        _by_rows(left)
        left.set(
            ylabel="T(n), milliseconds", title="What a forward costs", ylim=(0, 1.15 * max(times)), xlim=(0.7, None)
        )
        _cost(right, curve.rows, curve.points, ink)
        figure.suptitle(_engine(engine), fontsize=HEAD)
        return figure

    draw(file, make)


def _engine(name: str) -> str:
    return wrapped(readable(name, 200), PAGE - 0.2, HEAD)


def _cost(axes: Axes, rows: list[int], seconds: list[float], ink: str) -> None:
    relative = np.array(seconds) / seconds[0]
    axes.plot(rows, relative, "o-", color=BLUE, markersize=4, label="measured")
    axes.plot(range(1, max(rows) + 1), range(1, max(rows) + 1), ":", color=ink, label="a forward for each row")
    _by_rows(axes)
    axes.set(ylabel="T(n) / T(1)", title="What a tree costs, in forwards of one row")
    axes.set_ylim(0, max(3.0, 1.1 * float(relative.max())))
    axes.legend(**BELOW)


def _by_rows(axes: Axes) -> None:
    axes.set(xscale="log", xlabel="rows verified, n")
    axes.set_xticks(TICKS, [str(rows) for rows in TICKS])
    axes.minorticks_off()
    axes.grid(alpha=0.25, linewidth=0.5)


def _first_level(found: Calibration) -> list[tuple[str, float, float]]:
    """Name, share that was accepted, and trials."""
    rates = [rate for rate in found.rates if rate.depth == "1" and rate.trials]
    return [(f"{rate.drafters}, rank {rate.rank}", rate.hits / rate.trials, rate.trials) for rate in rates]


def _rates(axes: Axes, found: Calibration) -> None:
    most = _first_level(found)[:MOST]
    axes.barh(range(len(most)), [share for _, share, _ in most], height=0.6, color=BLUE)
    for place, (_, share, trials) in enumerate(most):
        axes.annotate(f"of {trials:.0f}", (share, place), xytext=(4, 0), textcoords="offset points", va="center")
    axes.set_yticks(range(len(most)), [wrapped(readable(name), PAGE / 3, SMALL, 1) for name, _, _ in most])
    axes.set_ylim(max(1, len(most)) - 0.4, -0.6)
    axes.tick_params(axis="y", length=0)
    axes.set(xlim=(0, 1.12), xlabel="share that was accepted", title="What candidates are worth, first level")
    axes.grid(axis="x", alpha=0.25, linewidth=0.5)


def _gains(axes: Axes, found: Calibration, ink: str) -> None:
    for pick, style in zip(found.picks, ("-", "--", "-.", ":"), strict=False):
        axes.plot(SIZES, pick.by_size, style, marker="o", markersize=3, color=BLUE, label=f"batch of {pick.batch}")
    axes.axhline(1, color=ink, linestyle="--", linewidth=0.9)
    axes.set(xscale="log", xlabel="rows per sequence", ylabel="expected speed, x plain")
    axes.set(
        title="What fixed trees bring", ylim=(0, 1.1 * max([1.0, *(gain for p in found.picks for gain in p.by_size)]))
    )
    axes.set_xticks(TICKS[1:], [str(rows) for rows in TICKS[1:]])
    axes.minorticks_off()
    axes.grid(alpha=0.25, linewidth=0.5)
    axes.legend(**BELOW)
