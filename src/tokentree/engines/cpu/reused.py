"""Memory that forwards write their logits to, handed out again and again."""

from __future__ import annotations

import sys

import numpy as np
import torch

ALIGNED = 32  # numbers: 64 bytes, a line of the cache


class Reused:
    """Memory for the logits of one forward after another.

    Fresh memory of that size comes from the system, page by page. So what an earlier forward wrote to is used again,
    but only if nobody holds any of it: a tensor, or a view of one.
    """

    def __init__(self) -> None:
        self._new(0)
        self._alone = self._holders()

    def take(self, rows: int, columns: int) -> torch.Tensor:
        """bfloat16[rows, columns], of any values."""
        count = rows * columns
        if count + ALIGNED > len(self._memory) or self._holders() > self._alone:
            self._new(count)
        part = self._memory[self._start : self._start + count]  # while it lives, the whole memory has a holder more
        return torch.from_numpy(part).view(torch.bfloat16).view(rows, columns)

    def _new(self, count: int) -> None:
        self._memory = np.empty(count + ALIGNED, np.int16)
        self._start = -self._memory.ctypes.data % (2 * ALIGNED) // 2

    def _holders(self) -> int:
        return sys.getrefcount(self._memory)
