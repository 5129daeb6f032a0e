"""The time of a simulation."""

from __future__ import annotations


class Clock:
    """Stands still, until it is set forward. It is called for the time, as ``time.perf_counter`` is.

    Attributes:
        now: seconds since the simulation began.
    """

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now

    def advance(self, seconds: float) -> None:
        """Sets it forward."""
        self.now += seconds
