"""The KV of a prompt that a model has read by itself, as there is more in it than tokens: a picture, for instance."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True, eq=False)
class PromptKV:
    """All rows of a prompt but the last one, which is the root of the first tree.

    Args:
        rows: how many there are.
        layers: of each layer, keys [heads, n, key width] and values [heads, n, value width]. These are the last n rows:
            all of them, or as many as the layer's sliding window has.
        shift: what a row's position is more than its number, from the last row of the prompt on. A picture may take
            fewer positions than rows.
        logits: [vocab], what the model says behind the last row.
    """

    rows: int
    layers: tuple[tuple[torch.Tensor, torch.Tensor], ...]
    shift: int
    logits: torch.Tensor
