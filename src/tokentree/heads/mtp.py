"""Layers for multi-token prediction that models carry in their own checkpoints (DeepSeek-V3, arXiv:2412.19437)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import nn

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class MtpHead(nn.Module):
    """One decoder layer of the target's family, with row i for token i + 1 of a text and what is known of position i.

    What is known is a vector of the target's width: at a position that the target has read, its last hidden state,
    which follows its final norm; behind it, what the head gave there itself. The head takes it together with the
    token's embedding, and gives the next position's. The target's output layer says of that which token comes.

    Args:
        model: a model of the family with one layer and a final norm, which are the head's.
        embedding_norm, hidden_norm: of what comes together.
        projection: of both behind one another, the embedding first, to the model's width; without a bias.
    """

    def __init__(
        self, model: PreTrainedModel, embedding_norm: nn.Module, hidden_norm: nn.Module, projection: nn.Module
    ) -> None:  # fmt: skip
        super().__init__()
        self.model, self.projection = model, projection
        self.embedding_norm, self.hidden_norm = embedding_norm, hidden_norm

    @property
    def hidden_size(self) -> int:
        return int(self.model.config.hidden_size)

    def forward(self, embedded: torch.Tensor, known: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        """What is known of the next positions, [rows, hidden size]; attention is `attention.tree_attention`'s.

        Args:
            embedded, known: [rows, hidden size].
            positions: int64[rows].
        """
        parts: Any = self.model
        x = self.projection(torch.cat([self.embedding_norm(embedded), self.hidden_norm(known)], -1))[None]
        turns = parts.rotary_emb(x, positions[None])
        all_seen = torch.zeros(1, 1, 1, 1, dtype=torch.int64)  # as `attention.tree_mask` says it
        given = parts.layers[0](x, position_embeddings=turns, position_ids=positions[None], attention_mask=all_seen)
        normed: torch.Tensor = parts.norm(given[0] if isinstance(given, tuple) else given)
        return normed[0]
