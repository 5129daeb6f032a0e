"""What takes long and is done once (a file converted, weights packed, forwards measured) is told to the logger
``tokentree`` at level INFO, and loops that are compiled by numba's own events; here is who listens."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from collections.abc import Sequence as SequenceOf
from contextlib import contextmanager

from numba.core.event import Event, Listener, install_listener

from tokentree.sequence import Sequence


class _Phases(logging.Handler):
    def __init__(self, listener: Callable[[str], None]) -> None:
        super().__init__(logging.INFO)
        self.listener = listener

    def emit(self, record: logging.LogRecord) -> None:
        self.listener(record.getMessage())


class _Compiling(Listener):
    def __init__(self, listener: Callable[[str], None]) -> None:
        self.listener = listener

    def on_start(self, event: Event) -> None:
        self.listener("compiling loops for this CPU (once)")

    def on_end(self, event: Event) -> None:
        return


@contextmanager
def told(listener: Callable[[str], None]) -> Iterator[None]:
    """Calls ``listener`` with what begins, each time that something does."""
    logger, phases = logging.getLogger("tokentree"), _Phases(listener)
    level, passed = logger.level, logger.propagate
    logger.addHandler(phases)
    logger.setLevel(logging.INFO)
    logger.propagate = False
    try:
        with install_listener("numba:compile", _Compiling(listener)):
            yield
    finally:
        logger.propagate = passed
        logger.setLevel(level)
        logger.removeHandler(phases)


@contextmanager
def token_bar(seqs: SequenceOf[Sequence], shown: bool) -> Iterator[Callable[[], None]]:
    """A bar over the tokens of ``seqs``, if it is to be shown, and what to call after each step."""
    if not shown:
        yield lambda: None
        return
    from rich.console import Console
    from rich.progress import Progress

    console = Console(stderr=True)
    with Progress(console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task("decoding", total=sum(seq.params.max_tokens for seq in seqs))

        def advance() -> None:
            done = sum(seq.params.max_tokens if seq.finished else seq.metrics.new_tokens for seq in seqs)
            bar.update(task, completed=done)

        yield advance
