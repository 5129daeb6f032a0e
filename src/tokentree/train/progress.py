"""What is shown while a training works: a bar on a terminal, and elsewhere a line now and then."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import TracebackType
from typing import Protocol

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn

from tokentree.cli.terminal import spelled


class Show(Protocol):
    def __call__(self, done: int, word: str = "") -> None: ...


FIRST, PAUSE = 3.0, 30.0  # seconds until the first line of a phase, and between the others


class Phases:
    """The phases of a training, one after another. A phase that is interrupted says how far it came, in a note on the
    exception.

    Args:
        shown: False where nothing is to be shown, as in all processes of a training but the first.
    """

    def __init__(self, console: Console, shown: bool = True) -> None:
        columns = TextColumn("{task.description}"), BarColumn(24), TextColumn("{task.fields[told]}")
        self._console, self._shown = console, shown
        self._bars = Progress(*columns, console=console, transient=True, disable=not (shown and console.is_terminal))

    def __enter__(self) -> Phases:
        self._bars.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bars.stop()

    def say(self, line: str) -> None:
        if self._shown:
            self._console.print(spelled(line), markup=False, emoji=False, highlight=False, soft_wrap=True)

    @contextmanager
    def phase(self, what: str, total: int | None = None, unit: str = "tokens", begun: int = 0) -> Iterator[Show]:
        """Shows ``what`` is done. Yields what is called with how much of ``total`` is done, and with a word to be shown
        beside it, whenever there is more.

        Args:
            begun: how much an earlier run has done of it.
        """
        phase = _Phase(what, total, unit, begun)
        if begun:
            self.say(f"{what}: going on from {begun:,} {unit}")
        elif total is not None and not self._console.is_terminal:
            self.say(f"{what}: {total:,} {unit}")
        bar = self._bars.add_task(what, total=total, completed=begun, told=phase.told(begun))
        due = phase.started + FIRST

        def show(done: int, word: str = "") -> None:
            nonlocal due
            phase.done = done
            now, told = time.monotonic(), ", ".join(filter(None, (phase.told(done), word)))
            self._bars.update(bar, completed=done, told=told)
            if now >= due and done > begun:
                first, due = due == phase.started + FIRST, now + PAUSE
                if first or not self._console.is_terminal:
                    self.say(f"{what}: {told}")

        try:
            yield show
        except KeyboardInterrupt as error:
            error.add_note(f"{what}: {phase.amount(phase.done)}" if total is not None else what)
            raise
        finally:
            self._bars.remove_task(bar)


class _Phase:
    def __init__(self, what: str, total: int | None, unit: str, begun: int) -> None:
        self.what, self.total, self.unit, self.begun = what, total, unit, begun
        self.started, self.done = time.monotonic(), begun

    def amount(self, done: int) -> str:
        return f"{min(done, self.total or done):,} of {self.total:,} {self.unit}"

    def told(self, done: int) -> str:
        """How much is done, how fast, and how long the rest takes."""
        passed = time.monotonic() - self.started
        if self.total is None:
            return ""
        if done <= self.begun or done >= self.total or passed < 1.0:
            return self.amount(done)
        rate = (done - self.begun) / passed
        rest = duration(max(0, self.total - done) / rate)
        pace = f"{rate:,.{0 if rate >= 10 else 1}f} a second" if rate >= 1 else f"{duration(1 / rate)} for each"
        return f"{self.amount(done)}, {pace}, about {rest} to go"


def duration(seconds: float) -> str:
    """So many seconds, in words."""
    for size, name in ((86400, "days"), (3600, "h"), (60, "min")):
        if seconds >= 1.5 * size:
            return f"{seconds / size:,.{0 if seconds >= 10 * size else 1}f} {name}"
    return f"{seconds:.0f} s"
