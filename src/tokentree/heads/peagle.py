"""P-EAGLE heads (Hui et al. 2026, arXiv:2602.01469): EAGLE-3 with further layers, guessing in the places of masks."""

from __future__ import annotations

import torch
from pydantic import Field, model_validator
from torch import nn

from tokentree.heads.eagle import Attend, EagleHead, EagleSizes, RMSNorm, through

MOST_LAYERS = 99


class PEagleSizes(EagleSizes):
    """What a head is made of.

    Args:
        num_layers: its layers, the first one included.
        mask_token: the target's token that stands for those to be guessed.
        slots: the most tokens that are guessed at once.
    """

    num_layers: int = Field(1, ge=1, le=MOST_LAYERS)
    mask_token: int = Field(ge=0, strict=True)
    slots: int = Field(8, ge=1, strict=True)

    @model_validator(mode="after")
    def _masks(self) -> PEagleSizes:
        if self.version != 3:
            raise ValueError("P-EAGLE is EAGLE-3 with masks")
        if self.mask_token >= self.vocab_size:
            raise ValueError(f"the mask token {self.mask_token} is none of {self.vocab_size} tokens")
        return self


class PEagleHead(EagleHead):
    """An EAGLE-3 head whose first layer is followed by plain ones.

    A row of a mask has the mask token's embedding, and `mask` in place of what is known of the position before it. All
    rows of a forward are computed at once: a mask's row sees what stands before the masks, and the masks before it.

    Args:
        sizes: see there.

    Attributes:
        mask_hidden: [1, 1, taps x hidden size of the target], what stands for the target's hidden states at masks.
    """

    sizes: PEagleSizes

    def __init__(self, sizes: PEagleSizes) -> None:
        super().__init__(sizes)
        self.layers = nn.ModuleList(PlainLayer(sizes) for _ in range(sizes.num_layers - 1))
        self.mask_hidden = nn.Parameter(torch.zeros(1, 1, self.fc.in_features))
        self.float()

    @property
    def mask(self) -> torch.Tensor:
        """[1, hidden size], what is known of the position before a mask."""
        return self.fuse(self.mask_hidden[0])

    def run(self, embedded: torch.Tensor, known: torch.Tensor, attend: Attend) -> torch.Tensor:
        x = super().run(embedded, known, attend)
        for layer in self.layers:
            x = layer(x, attend)
        return x


class PlainLayer(nn.Module):
    """A decoder layer, as Llama has it."""

    def __init__(self, sizes: EagleSizes) -> None:
        super().__init__()
        self.sizes = sizes
        self.input_layernorm = RMSNorm(sizes.hidden_size, sizes.eps)
        self.qkv = nn.Linear(sizes.hidden_size, sum(sizes.counts) * sizes.head_dim, sizes.qkv_bias)
        self.o_proj = nn.Linear(sizes.num_heads * sizes.head_dim, sizes.hidden_size, bias=False)
        self.post_attention_layernorm = RMSNorm(sizes.hidden_size, sizes.eps)
        self.gate_up = nn.Linear(sizes.hidden_size, 2 * sizes.intermediate_size, bias=False)
        self.down_proj = nn.Linear(sizes.intermediate_size, sizes.hidden_size, bias=False)

    def forward(self, x: torch.Tensor, attend: Attend) -> torch.Tensor:
        return through(self, self.input_layernorm(x), x, attend)
