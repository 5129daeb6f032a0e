"""Commands that are interrupted: a line that says how to go on, and the exit status of what a signal ended."""

from __future__ import annotations

import signal
from types import FrameType, TracebackType

import typer

from tokentree.cli.terminal import say, spelled

SIGNALS = signal.SIGINT, signal.SIGTERM


class Interruptible:
    """In its block Ctrl-C and a request to end are `KeyboardInterrupt`. Whatever ends the block behind one was its
    doing: libraries that are interrupted raise errors of their own.

    Args:
        said: printed then, behind what notes on the exception say; nothing if empty.
    """

    def __init__(self, said: str = "") -> None:
        self._said = said
        self._came: int | None = None

    @property
    def status(self) -> int | None:
        """The exit status of what was interrupted, as shells have it; None where nothing was."""
        return None if self._came is None else 128 + self._came

    def __enter__(self) -> Interruptible:
        self._own = {number: own for number in SIGNALS if (own := signal.getsignal(number)) is not signal.SIG_IGN}
        for number in self._own:
            signal.signal(number, self._note)
        return self

    def _note(self, number: int, frame: FrameType | None) -> None:
        self._came = number
        raise KeyboardInterrupt

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, own in self._own.items():
            signal.signal(number, own)
        if self.status is None or error is None:
            return
        if self._said:
            where = "".join(f" ({note})" for note in getattr(error, "__notes__", [])[:1])
            say(spelled(f"interrupted{where}: {self._said}"))
        raise typer.Exit(self.status)
