"""Convolutions over the rows of a block, around the sublayers of a block head (DFlash 2)."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn
from torch.nn.functional import pad

Sublayer = Callable[[torch.Tensor], torch.Tensor]


class Bare(nn.Module):
    """Nothing around a sublayer."""

    def forward(self, x: torch.Tensor, sublayer: Sublayer) -> torch.Tensor:
        """[..., rows, size], what ``sublayer`` makes of ``x`` [..., rows, size]."""
        return sublayer(x)


class Convolution(nn.Module):
    """A convolution in front of a sublayer and one behind it. Each channel of a row takes some of its own row and some
    of those before it. How much, the channel says, and the row that comes in, for groups of channels. Before the first
    row of a block there is nothing.

    Args:
        size: channels.
        taps: rows that are taken of, the own one included.
        group: channels of a group; their number is a multiple of it.

    Attributes:
        base: float32[2, taps, size], what channels say, in front and behind. A fresh one changes nothing.
        told: a linear layer from a row to [2 x taps x groups], what it says.
    """

    def __init__(self, size: int, taps: int, group: int) -> None:
        super().__init__()
        self.base = nn.Parameter(torch.zeros(2, taps, size))
        with torch.no_grad():
            self.base[:, 0] = 1
        self.told = nn.Linear(size, 2 * taps * (size // group), bias=False)
        self._shape, self._group = (2, taps, size // group), group

    def forward(self, x: torch.Tensor, sublayer: Sublayer) -> torch.Tensor:
        """See `Bare`."""
        told = self.told(x).unflatten(-1, self._shape).repeat_interleave(self._group, -1)
        front, behind = (told + self.base).unbind(-3)  # [..., rows, taps, size] each
        return convolved(sublayer(convolved(x, front)), behind)


def convolved(x: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """[..., rows, size]: of each row, and of those before it in ``x`` [..., rows, size], as much as its ``weights``
    [..., rows, taps, size] say, its own first."""
    taps = weights.shape[-2]
    near = pad(x, (0, 0, taps - 1, 0)).unfold(-2, taps, 1).flip(-1)  # [..., rows, size, taps]
    return (near * weights.transpose(-1, -2)).sum(-1)
