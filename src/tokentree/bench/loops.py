"""Where a text starts to repeat itself."""

from __future__ import annotations

from collections.abc import Sequence as SequenceOf

import numpy as np

COPIES, LEAST = 3, 16


def first_loop(ids: SequenceOf[int]) -> int | None:
    """How many tokens come before the second copy of the first stretch that stands `COPIES` times in a row and fills
    at least `LEAST` tokens with its copies; None where there is no such loop.

    Small models loop, and lookups feast on loops: speed-ups are told with and without what follows.
    """
    tokens, found = np.asarray(ids), list[int]()
    for period in range(1, len(tokens) // COPIES + 1):
        needed = max(period * (COPIES - 1), LEAST - period)
        same = np.concatenate([[0], tokens[period:] == tokens[:-period], [0]]).astype(np.int8)
        edges = np.diff(same)
        starts, ends = np.flatnonzero(edges == 1), np.flatnonzero(edges == -1)
        long = starts[ends - starts >= needed]
        if long.size:
            found.append(int(long[0]) + period)
    return min(found, default=None)
