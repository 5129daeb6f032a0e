"""A run while it goes on: how far it is, and its table so far."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console, Group
from rich.live import Live
from rich.progress import Progress

from tokentree.bench.report import table
from tokentree.bench.results import Run, Sample
from tokentree.cli.terminal import spelled

NARROW = 70  # columns, in which the table has no room


@contextmanager
def watched(console: Console, run: Run, total: int) -> Iterator[Callable[[Sample], None]]:
    """Gives what is to be called with each of ``total`` samples, once ``run`` has it. Nothing is shown but failures
    where ``console`` is no terminal."""
    bar = Progress(console=console)
    task = bar.add_task("measuring", total=total, completed=len(run.samples))
    live = Live(bar, console=console, transient=True) if console.is_terminal else None

    def progress(sample: Sample) -> None:
        bar.advance(task)
        if sample.error is not None:
            told = f"{sample.method} failed on prompt {sample.prompt}: {sample.error}"
            console.print(spelled(told), markup=False, highlight=False)
        if live is not None:
            live.update(Group(table(run), bar) if console.width >= NARROW else bar)

    if live is None:
        yield progress
        return
    with live:
        yield progress
