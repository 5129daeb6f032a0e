"""Gated short convolutions, as LFM2 has them, for forwards that are one compiled call."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import nn

from tokentree.engines.cpu.checked import expect, is_tensor
from tokentree.engines.cpu.fused import Kind, Packed
from tokentree.engines.cpu.linear import restored
from tokentree.engines.cpu.packing import Packing
from tokentree.engines.recurrent import Recurrence


class ShortConvolution(nn.Module):
    """The weights of out(C * conv(B * x)), where one product makes B, C and x. `program` computes it.

    Attributes:
        weight: float32[taps, channels].
        bias: float32[channels].
    """

    name: ClassVar[str] = "convolution"
    weight: torch.Tensor
    bias: torch.Tensor

    def __init__(self, own: Any, packing: Packing) -> None:
        super().__init__()
        self.in_proj, self.out_proj = packing.pack(own.in_proj), own.out_proj
        weight, bias = own.conv.weight.detach(), own.conv.bias
        self.register_buffer("weight", weight.squeeze(1).t().float().contiguous())
        self.register_buffer("bias", torch.zeros(len(weight)) if bias is None else bias.detach().float())

    @staticmethod
    def joined(own: Any) -> list[Any]:
        """The linear layers of ``own`` that are packed when one is made."""
        return [own.in_proj]

    @staticmethod
    def products(own: Any) -> list[Any]:
        """The linear layers of ``own``."""
        return [own.in_proj, own.out_proj]

    @classmethod
    def fits(cls, own: Any, packing: Packing) -> bool:
        """Whether ``own`` is such a module, with sizes that suit ``packing``."""
        if type(own).__name__ != "Lfm2ShortConv" or not type(own).__module__.startswith("transformers."):
            return False
        conv, first, last = own.conv, own.in_proj, own.out_proj
        if type(conv) is not nn.Conv1d or conv.weight.dtype is not torch.bfloat16 or not packing.fits(first, last):
            return False
        channels, taps = conv.in_channels, conv.kernel_size[0]
        return (
            conv.weight.shape == (channels, 1, taps)
            and (conv.groups, conv.stride, conv.dilation, conv.padding) == (channels, (1,), (1,), (taps - 1,))
            and (conv.padding_mode, first.out_features, last.in_features) == ("zeros", 3 * channels, channels)
        )

    @property
    def first(self) -> Packed:
        """The product that it begins with."""
        return self.in_proj

    @property
    def recurrence(self) -> Recurrence:
        """What it keeps of a text."""
        taps, channels = self.weight.shape
        return Recurrence(channels, taps - 1, 0)

    def sizes_of_products(self, hidden: int) -> dict[Packed, tuple[int, int]]:
        """Inputs and outputs that its products have in a model of that hidden size, if they fit one another."""
        channels = self.weight.shape[1]
        return {self.in_proj: (hidden, 3 * channels), self.out_proj: (channels, hidden)}

    def state(self) -> dict[str, Any]:
        """What `of_state` makes one of."""
        products = {"in_proj": self.in_proj.state(), "out_proj": self.out_proj.state()}
        return {"weight": self.weight, "bias": self.bias, **products}

    @classmethod
    def of_state(cls, state: dict[str, Any], kind: Kind) -> ShortConvolution:
        """One that is kept, whose linear layers are of this kind.

        Raises:
            ModelError: if its weights are none, or don't belong together.
        """
        expect("a convolution", set(state) == {"weight", "bias", "in_proj", "out_proj"})
        weight = state["weight"]
        expect("a convolution", is_tensor(weight, torch.float32, None, None), len(weight) > 0)
        expect("a convolution", is_tensor(state["bias"], torch.float32, weight.shape[1]))
        return restored(cls, state | {name: kind.of_state(state[name]) for name in ("in_proj", "out_proj")})
