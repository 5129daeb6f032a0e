"""Weights in 8 bits for the kernels: symmetric, with a scale for each output and 64 inputs."""

from __future__ import annotations

from dataclasses import dataclass

import torch

GROUP = 64  # inputs that share a scale
MOST = 127  # the greatest code
LEAST = 2.0**-100  # the least scale: of weights that are as good as none
AT_ONCE = 8192  # outputs that are converted at a time, so that little memory is needed beside them


@dataclass(frozen=True, eq=False)
class Int8:
    """A matrix [outputs, inputs] in 8 bits. An entry is code times scale, rounded to bfloat16.

    Scales of neighbouring outputs lie beside one another, in 32 bits: so kernels load them ahead.

    Args:
        codes: int8[outputs, inputs], from -127 to 127.
        scales: float32[inputs / 64, outputs], numbers that bfloat16 has.
    """

    codes: torch.Tensor
    scales: torch.Tensor

    @classmethod
    def of(cls, weight: torch.Tensor) -> Int8:
        """The nearest codes. A scale is a group's greatest magnitude over 127, rounded up.

        Args:
            weight: bfloat16[outputs, inputs]; inputs are a multiple of 64.
        """
        outputs, inputs = weight.shape
        codes = torch.empty(outputs, inputs, dtype=torch.int8, device=weight.device)
        scales = torch.empty(inputs // GROUP, outputs, device=weight.device)
        for start in range(0, outputs, AT_ONCE):
            part = weight[start : start + AT_ONCE].float().unflatten(1, (-1, GROUP))
            scale = _up((part.abs().amax(2) / MOST).clamp(min=LEAST))
            codes[start : start + AT_ONCE] = (part / scale[..., None]).round().flatten(1).to(torch.int8)
            scales[:, start : start + AT_ONCE] = scale.T
        return cls(codes, scales)

    def __len__(self) -> int:
        return len(self.codes)

    def __getitem__(self, outputs: torch.Tensor | slice) -> torch.Tensor:
        """bfloat16[outputs, inputs]: the weights of some outputs."""
        codes = self.codes[outputs].unflatten(1, (-1, GROUP))
        values: torch.Tensor = codes * self.scales[:, outputs].T[..., None]
        return values.bfloat16().flatten(1)

    @property
    def shape(self) -> torch.Size:
        return self.codes.shape

    @property
    def nbytes(self) -> int:
        return self.codes.nbytes + self.scales.nbytes


Matrix = torch.Tensor | Int8


def linear(x: torch.Tensor, weight: Matrix, bias: torch.Tensor | None) -> torch.Tensor:
    """x [..., inputs] times ``weight`` [outputs, inputs], plus bias, by torch."""
    if isinstance(weight, torch.Tensor):
        return torch.nn.functional.linear(x, weight, bias)
    starts = range(0, len(weight), AT_ONCE)
    y = torch.cat([torch.nn.functional.linear(x, weight[slice(start, start + AT_ONCE)]) for start in starts], -1)
    return y if bias is None else y + bias


def _up(values: torch.Tensor) -> torch.Tensor:
    """float32 that bfloat16 has, not below ``values``, which are positive and normal."""
    near = values.bfloat16()
    above = (near.view(torch.int16) + 1).view(torch.bfloat16)
    return torch.where(near.float() < values, above, near).float()
