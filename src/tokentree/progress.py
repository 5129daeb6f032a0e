"""What takes long and is done once (a file converted, weights packed, forwards measured) is told to the logger
``tokentree`` at level INFO, and loops that are compiled by numba's own events; here is who listens."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from numba.core.event import Event, Listener, install_listener


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
