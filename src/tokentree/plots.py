"""Pictures. They need matplotlib: the extra `plot`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from tokentree.calibrate import SIZES, Calibration
from tokentree.errors import OptionError
from tokentree.shapes import CostCurve

if TYPE_CHECKING:
    from matplotlib.axes import Axes

BLUE = "#0072B2"  # Okabe and Ito's
FORMATS = (".png", ".svg", ".pdf")


def check_plot(file: Path) -> None:
    """Raises `OptionError` where a picture could not be drawn into ``file``."""
    if file.suffix not in FORMATS:
        raise OptionError(f"{str(file)!r} is no picture's name: end it in {', '.join(FORMATS)}")
    if not file.parent.is_dir():
        raise OptionError(f"there is no folder {str(file.parent)!r}")
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        raise OptionError("drawing needs matplotlib: pip install 'tokentree[plot]'") from None


def plot_calibration(found: Calibration, file: Path) -> None:
    """Draws the cost curve, the acceptance rates and the expected speed-up by tree size, side by side."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(15, 4.6), layout="constrained")
    cost, rates, gains = figure.subplots(1, 3, width_ratios=(1, 1.25, 1))
    _cost(cost, found.rows, found.seconds)
    _rates(rates, found)
    _gains(gains, found)
    figure.suptitle(found.engine, fontsize=10)
    figure.savefig(file, dpi=130)


def plot_cost(curve: CostCurve, engine: str, file: Path) -> None:
    """Draws T(n), what a forward over n rows takes: in milliseconds, and in forwards over one row."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 4), layout="constrained", facecolor="white")
    left, right = figure.subplots(1, 2)
    times = [1e3 * seconds for seconds in curve.points]
    left.plot(curve.rows, times, "o-", color=BLUE)
    for rows, time in zip(curve.rows, times, strict=True):
        if rows in (1, 8, 16, 32, 64):
            left.annotate(
                f"{time:.1f}", (rows, time), xytext=(0, 7), textcoords="offset points", ha="center", fontsize=8
            )
    _by_rows(left)
    left.set(ylabel="milliseconds", title="T(n)", ylim=(0, 1.15 * max(times)))
    _cost(right, curve.rows, curve.points)
    figure.suptitle(engine, fontsize=10)
    figure.savefig(file, dpi=130)


def _cost(axes: Axes, rows: list[int], seconds: list[float]) -> None:
    relative = np.array(seconds) / seconds[0]
    axes.plot(rows, relative, "o-", color=BLUE, label="measured")
    axes.plot(rows, rows, ":", color="grey", label="as dear as plain decoding")
    _by_rows(axes)
    axes.set(ylabel="time of a forward, x one row", title="What a tree costs")
    axes.set_ylim(0, max(3.0, 1.15 * float(relative.max())))
    axes.legend()


def _by_rows(axes: Axes) -> None:
    axes.set(xscale="log", xlabel="rows verified")
    axes.set_xticks([1, 2, 4, 8, 16, 32, 64], ["1", "2", "4", "8", "16", "32", "64"])
    axes.minorticks_off()
    axes.grid(alpha=0.3)


def _rates(axes: Axes, found: Calibration) -> None:
    most = [rate for rate in found.rates if rate.depth == "1"][:12]
    labels = [f"{rate.drafters}, rank {rate.rank}" for rate in most]
    axes.barh(range(len(most)), [rate.hits / rate.trials for rate in most])
    for place, rate in enumerate(most):
        axes.text(rate.hits / rate.trials + 0.01, place, f"of {rate.trials:.0f}", va="center", fontsize=8)
    axes.set_yticks(range(len(most)), labels, fontsize=8)
    axes.invert_yaxis()
    axes.set(xlim=(0, 1.12), xlabel="accepted", title="What candidates are worth, first level")
    axes.grid(axis="x", alpha=0.3)


def _gains(axes: Axes, found: Calibration) -> None:
    for pick in found.picks:
        axes.plot(SIZES, pick.by_size, "o-", markersize=3, label=f"batch {pick.batch}")
    axes.axhline(1, color="grey", linestyle=":")
    axes.set(xscale="log", xlabel="rows per sequence", ylabel="expected speed-up", title="What fixed trees bring")
    axes.set_xticks([2, 4, 8, 16, 32, 64], ["2", "4", "8", "16", "32", "64"])
    axes.minorticks_off()
    axes.grid(alpha=0.3)
    axes.legend()
