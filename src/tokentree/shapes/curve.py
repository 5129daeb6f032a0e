"""What a target forward costs by the number of its rows."""

from __future__ import annotations

import math
from collections.abc import Sequence as SequenceOf

import numpy as np

from tokentree.errors import OptionError
from tokentree.tree import Floats

PACE = 0.1  # how fast one observation moves what is believed
GUESS = ((1, 4, 16, 64), (1.0, 1.1, 1.6, 4.0))  # relative, for an engine that wasn't measured


class CostCurve:
    """T(n): seconds of a forward over n rows, measured at a few n, linear between and beyond them.

    Args:
        rows: where it was measured, ascending.
        seconds: the time there.
        per_sequence: what each sequence after the first adds, in seconds.

    Raises:
        OptionError: unless there are two points or more, with times above 0.
    """

    def __init__(
        self,
        rows: SequenceOf[int],
        seconds: SequenceOf[float],
        per_sequence: float = 0.0,
    ) -> None:
        rising = len(rows) == len(seconds) >= 2 and list(rows) == sorted(set(rows))
        if not rising or not all(0 < point < math.inf for point in seconds):
            raise OptionError("a cost curve needs two or more numbers of rows, ascending, each with a time above 0")
        self.rows, self.per_sequence = list(rows), per_sequence
        self._seconds = np.array(seconds, np.float64)
        self._table = self._tabulate(max(rows))

    @classmethod
    def guess(cls) -> CostCurve:
        """A curve for an engine that wasn't measured, in units that the first observations replace."""
        return cls(*GUESS)

    @property
    def points(self) -> list[float]:
        """The seconds at each of `rows`."""
        return [float(point) for point in self._seconds]

    def copy(self) -> CostCurve:
        return CostCurve(self.rows, self.points, self.per_sequence)

    def seconds(self, rows: int, sequences: int = 1) -> float:
        """Of a forward over ``rows`` rows of so many sequences."""
        return float(self.upto(rows, sequences)[rows])

    def upto(self, rows: int, sequences: int = 1) -> Floats:
        """float64[rows + 1] or longer: entry n is the time of n rows."""
        if rows >= len(self._table):
            self._table = self._tabulate(2 * rows)
        return self._table + self.per_sequence * (sequences - 1)

    def observe(self, rows: int, sequences: int, seconds: float) -> None:
        """Learns from a forward. Half of a difference is taken for a
        machine that is slower or faster now; what is left belongs to this number of rows. A time of 0, from an engine
        without a clock, says nothing."""
        if seconds <= 0:
            return
        ratio = min(2.0, max(0.5, seconds / self.seconds(rows, sequences)))
        place = float(np.interp(rows, self.rows, np.arange(len(self.rows))))
        for knot in {int(place), math.ceil(place)}:
            # the highest point so far is what is believed of this one: that is what was wrong
            highest = int(np.argmax(self._seconds[: knot + 1]))
            factor = ratio ** (PACE / 2 * (1 - abs(place - knot)))
            self._seconds[highest if ratio < 1 else knot] = self._seconds[highest] * factor
        self._scale(ratio ** (PACE / 2))
        self._table = self._tabulate(len(self._table) - 1)

    def first_seen(self, rows: int, seconds: float) -> None:
        """Scales the whole curve so that a forward over ``rows`` rows takes ``seconds``, unless that is 0."""
        if seconds <= 0:
            return
        self._scale(seconds / self.seconds(rows))
        self._table = self._tabulate(len(self._table) - 1)

    def _scale(self, factor: float) -> None:
        self._seconds *= factor
        self.per_sequence *= factor

    def _tabulate(self, last: int) -> Floats:
        rising = np.maximum.accumulate(self._seconds)  # more rows never take less time; noise may say so
        table = np.interp(np.arange(last + 1), self.rows, rising)
        slope = (rising[-1] - rising[-2]) / (self.rows[-1] - self.rows[-2])
        beyond = np.arange(self.rows[-1], last + 1)
        table[self.rows[-1] :] = rising[-1] + slope * (beyond - self.rows[-1])
        return table
