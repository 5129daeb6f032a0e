"""Memory that forwards write their logits to, handed out again and again."""

from __future__ import annotations

import sys

import numpy as np
import torch
from numpy.typing import NDArray

ALIGNED = 32  # numbers: 64 bytes, a line of the cache


class Reused:
    """Memory for the logits of one forward after another.

    Fresh memory of that size comes from the system, page by page. So what an earlier forward wrote to is used again,
    but only if nobody holds any of it: a tensor, or a view of one.
    """

    def __init__(self) -> None:
        self._new(ALIGNED)
        self._alone = self._holders()

    def take(self, rows: int, columns: int) -> NDArray[np.int16]:
        """Room for bfloat16[rows, columns]."""
        count = rows * columns
        if (size := count + ALIGNED) > len(self._memory):  # by a half, since what is freed may be too small for others
            self._new(max(size, 3 * len(self._memory) // 2))
        elif self._holders() > self._alone:
            self._new(len(self._memory))
        # while that lives, the whole memory has one more holder
        return self._memory[self._start : self._start + count].reshape(rows, columns)

    def _new(self, size: int) -> None:
        self._memory = np.empty(size, np.int16)
        self._start = -self._memory.ctypes.data % (2 * ALIGNED) // 2

    def _holders(self) -> int:
        return sys.getrefcount(self._memory)


def tensor_in(memory: NDArray[np.int16], columns: int) -> torch.Tensor:
    """bfloat16[rows, columns], contiguous: the first columns of what lies there."""
    whole = torch.from_numpy(memory).view(torch.bfloat16)
    return whole if whole.shape[1] == columns else whole[:, :columns].contiguous()
