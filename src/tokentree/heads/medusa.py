"""Medusa: heads on the target's last hidden state (Cai et al. 2024, arXiv:2401.10774)."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn
from torch.nn.functional import silu

from tokentree.errors import OptionError

Layer = Callable[[torch.Tensor], torch.Tensor]


class MedusaHeads(nn.Module):
    """K heads. From the hidden state of position t after the final norm, where the target's own output layer predicts
    token t + 1, head k (from 0) predicts token t + 2 + k.

    A head is ``num_layers`` residual blocks ``x + SiLU(W x + b)`` and a projection to the vocabulary: its own, or the
    target's output layer, which then all heads share. Fresh heads are zero in every block, as in the paper, so that
    heads which share the output layer begin with the target's own predictions.

    Args:
        num_heads, num_layers: at least 1 head, and 0 or more blocks in each.
        hidden_size: of the target.
        vocab_size: width of the heads' own projections; None if they share the target's.
        bias: whether blocks have one.

    Attributes:
        weight: [num_layers, num_heads, hidden, hidden], as a linear layer has it (outputs first).
        bias: [num_layers, num_heads, hidden], or None without them.
        projection: [num_heads, vocab, hidden], or None.
        token_map: int64[vocab], the target's ids for the logits of heads that know fewer tokens, or None.

    Raises:
        OptionError: if a size makes no sense.
    """

    def __init__(
        self, num_heads: int, num_layers: int, hidden_size: int, vocab_size: int | None = None, bias: bool = True
    ) -> None:
        super().__init__()
        if num_heads < 1 or num_layers < 0 or hidden_size < 1 or (vocab_size is not None and vocab_size < 1):
            raise OptionError("Medusa heads need at least 1 head, 0 layers, and sizes of at least 1")
        self.num_heads, self.num_layers, self.hidden_size = num_heads, num_layers, hidden_size
        self.weight = nn.Parameter(torch.zeros(num_layers, num_heads, hidden_size, hidden_size))
        self.bias = nn.Parameter(torch.zeros(num_layers, num_heads, hidden_size)) if bias and num_layers else None
        self.projection = None if vocab_size is None else nn.Parameter(torch.zeros(num_heads, vocab_size, hidden_size))
        self.token_map: torch.Tensor | None
        self.register_buffer("token_map", None)
        self.float()  # whatever torch's default type is

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """[num_heads, rows, hidden]: what each head projects, of ``hidden`` [rows, hidden]; all in one product."""
        x = hidden.expand(self.num_heads, *hidden.shape)
        for layer in range(self.num_layers):
            y = x @ self.weight[layer].transpose(1, 2)
            x = x + silu(y if self.bias is None else y + self.bias[layer][:, None])
        return x

    def logits(self, hidden: torch.Tensor, output_layer: Layer | None = None) -> torch.Tensor:
        """[num_heads, rows, vocab], of ``hidden`` [rows, hidden].

        Args:
            output_layer: the target's, for heads that share it; that of the tokens in `token_map` alone, if there is
                one. It is given what has the type of ``hidden``.

        Raises:
            OptionError: if it is needed and missing.
        """
        states = self(hidden.to(self.weight.dtype))
        if self.projection is not None:
            return torch.matmul(states, self.projection.transpose(1, 2))
        if output_layer is None:
            raise OptionError("these Medusa heads share the target's output layer: pass output_layer=")
        return output_layer(states.to(hidden.dtype))
