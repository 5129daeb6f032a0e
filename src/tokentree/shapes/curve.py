# numba gives every scalar a type of its own, which annotations can't follow:
# mypy: disable-error-code="arg-type,assignment,index,call-overload,operator"
"""What a target forward costs by the number of its rows."""

from __future__ import annotations

import math
from collections.abc import Sequence as SequenceOf

import numpy as np

from tokentree.errors import OptionError
from tokentree.jit import njit
from tokentree.tree import Floats, Ints

MOST_ROWS = 1_000_000  # of a forward
PACE = 0.1  # how fast one observation moves what is believed
GUESS = ((1, 4, 16, 64), (1.0, 1.1, 1.6, 4.0))  # relative, for an engine that wasn't measured


class CostCurve:
    """T(n): seconds of a forward over n rows, measured at a few n, linear between and beyond them.

    Args:
        rows: where it was measured, ascending.
        seconds: the time there.
        per_sequence: what each sequence after the first adds, in seconds.

    Raises:
        OptionError: unless there are two points or more, with times above 0, of as many rows as a forward can have.
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
        if rows[0] < 1 or rows[-1] > MOST_ROWS or not 0 <= per_sequence < math.inf:
            raise OptionError(f"a cost curve has 1 to {MOST_ROWS:,} rows, and a further sequence costs at least 0")
        self.rows, self.per_sequence = list(rows), per_sequence
        self._seconds = np.array(seconds, np.float64)
        self._knots, self._table = np.array(rows, np.int64), np.zeros(0)
        self.upto(max(rows))
        table = self._table.copy()  # compiled before a request waits
        refine(self._knots, self._seconds.copy(), table, 1, float(table[1]), 0.0)

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
        """float64[rows + 1] or longer: entry n is the time of n rows. It holds until `observe` is called."""
        if rows >= len(self._table):
            self._table = np.empty(2 * rows + 1)
            _tabulate(self._knots, self._seconds, self._table)
        return self._table if sequences == 1 else self._table + self.per_sequence * (sequences - 1)

    def observe(self, rows: int, sequences: int, seconds: float) -> None:
        """Learns from a forward. Half of a difference is taken for a
        machine that is slower or faster now; what is left belongs to this number of rows. A time of 0, from an engine
        without a clock, says nothing."""
        self.refined(refine(*self.told(rows, sequences, seconds)))

    def told(self, rows: int, sequences: int, seconds: float) -> tuple[Ints, Floats, Floats, int, float, float]:
        """What `refine` is told of a forward."""
        self.upto(rows)
        return self._knots, self._seconds, self._table, rows, float(seconds), self.per_sequence * (sequences - 1)

    def refined(self, ratio: float) -> None:
        """Learns what `refine` has returned."""
        self.per_sequence *= ratio ** (PACE / 2)

    def first_seen(self, rows: int, seconds: float) -> None:
        """Scales the whole curve so that a forward over ``rows`` rows takes ``seconds``, unless that is 0."""
        if seconds <= 0:
            return
        factor = seconds / self.seconds(rows)
        self._seconds *= factor
        self.per_sequence *= factor
        _tabulate(self._knots, self._seconds, self._table)


@njit(cache=True)
def _tabulate(knots: Ints, seconds: Floats, table: Floats) -> None:
    """Fills in the time of every number of rows."""
    time, begin = seconds[0], 0
    slope = 0.0
    for knot in range(len(knots)):
        before, time = time, max(time, seconds[knot])  # more rows never take less time; noise may say so
        if knot:
            slope = (time - before) / (knots[knot] - knots[knot - 1])
        for rows in range(begin, min(knots[knot] + 1, len(table))):
            table[rows] = time - slope * (knots[knot] - rows)
        begin = knots[knot] + 1
    for rows in range(begin, len(table)):
        table[rows] = time + slope * (rows - knots[-1])


@njit(cache=True)
def refine(knots: Ints, seconds: Floats, table: Floats, rows: int, measured: float, others: float) -> float:
    """Moves the curve at ``rows`` by a part of what ``measured`` seconds are of those believed, half of it with the
    whole curve; returns that ratio, 1 where that is 0. ``others``: seconds that the sequences after the first take."""
    if measured <= 0:
        return 1.0
    ratio = min(2.0, max(0.5, measured / (table[rows] + others)))
    right = min(np.searchsorted(knots, rows), len(knots) - 1)
    left = max(0, right - 1) if rows < knots[right] else right
    for knot in range(left, right + 1):
        share = 1.0 if left == right else abs(rows - knots[left + right - knot]) / (knots[right] - knots[left])
        # the highest point so far is what is believed of this one: that is what was wrong
        wrong = np.argmax(seconds[: knot + 1]) if ratio < 1 else knot
        seconds[wrong] = seconds[np.argmax(seconds[: knot + 1])] * ratio ** (PACE / 2 * share)
    seconds *= ratio ** (PACE / 2)
    _tabulate(knots, seconds, table)
    return float(ratio)
