"""Plans as tables for a terminal."""

from __future__ import annotations

from collections.abc import Sequence as SequenceOf

from rich.table import Table

from tokentree.planning.figures import Figures

LOADS, TEXTS, NEEDED = "what becomes of each load", "texts at a time on one replica", "replicas needed"


def duration(seconds: float | None) -> str:
    """As people read it."""
    if seconds is None:
        return "-"
    return f"{1e3 * seconds:.3g} ms" if seconds < 1 else f"{seconds:.3g} s"


def _pair(first: float | None, second: float | None) -> str:
    return f"{duration(first)} / {duration(second)}"


def _speed(figures: Figures) -> str:
    return f"{figures.tokens_a_second:.4g}"


def _cells(figures: Figures) -> list[str]:
    if figures.overloaded:
        return [_speed(figures), "overloaded", "overloaded"]
    first = _pair(figures.first_token_p50, figures.first_token_p95)
    return [_speed(figures), first, _pair(figures.gap_p50, figures.gap_p95)]


def times_as_fast(plain: Figures, tree: Figures) -> float | None:
    """How long a request takes plainly, in times that it takes with speculation; None if one has no end."""
    if plain.request_mean is None or tree.request_mean is None:
        return None
    return plain.request_mean / tree.request_mean


def loads(found: SequenceOf[SequenceOf[Figures]]) -> Table:
    """One row for each load and number of replicas, the methods side by side."""
    table = Table(title=LOADS, caption="first token and gap: the 50th / the 95th of 100")
    for name in ("load", "replicas"):
        table.add_column(name, justify="right")
    several = len(found[0]) > 1
    for one in found[0]:
        for name in ("tokens/s", "first token", "gap"):
            table.add_column(f"{one.method}: {name}" if several else name, justify="right")
    if several:
        table.add_column("a request is x as fast", justify="right")
    for methods in found:
        cells = [cell for one in methods for cell in _cells(one)]
        if several:
            gain = times_as_fast(methods[0], methods[1])
            cells.append("-" if gain is None else f"{gain:.2f}")
        table.add_row(methods[0].load, str(methods[0].replicas), *cells)
    return table


def texts(found: SequenceOf[tuple[Figures, Figures]], stop: Figures | None) -> Table:
    """What speculation brings, by texts that are decoded at a time."""
    table = Table(title=TEXTS)
    for name in ("clients", "plain tokens/s", "speculation tokens/s", "times", "tokens a forward", "plain requests/s"):
        table.add_column(name, justify="right")
    for plain, tree in found:
        times = tree.tokens_a_second / plain.tokens_a_second if plain.tokens_a_second else 1.0
        table.add_row(
            plain.load.partition(" ")[0], _speed(plain), _speed(tree), f"{times:.2f}", f"{tree.tokens_a_forward:.2f}",
            f"{plain.requests_a_second:.3g}",
        )  # fmt: skip
    last = found[-1][0].load
    table.caption = (
        f"speculation pays up to {last}, the most that were tried"
        if stop is None
        else f"speculation stops paying at {stop.load}: {stop.requests_a_second:.3g} requests a second for each replica"
    )
    return table


def needed(found: SequenceOf[tuple[str, str, Figures | None]]) -> Table:
    """Replicas by load and method."""
    table = Table(title=NEEDED)
    for name in ("load", "method", "replicas", "first token", "gap"):
        table.add_column(name, justify="right")
    for load, method, best in found:
        cells = ["can't be met", "-", "-"] if best is None else [str(best.replicas), *_cells(best)[1:]]
        table.add_row(load, method, *cells)
    return table
