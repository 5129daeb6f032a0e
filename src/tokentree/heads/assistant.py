"""Gemma 4's assistants: small models that draft from the keys and values of a target, and have none of their own."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import nn

if TYPE_CHECKING:
    from transformers import PreTrainedModel

ASSISTANTS = {"gemma4_assistant", "gemma4_unified_assistant"}  # their model types


class AssistantHead(nn.Module):
    """A few layers that have queries alone, and read the keys and values of a target's layers of the same kinds.

    A row is a token and what is known of the position before it: a vector of the target's width. At a position that
    the target has read, that is its last hidden state, which follows its final norm; behind it, what the assistant
    gave there. The row gives logits, and what is known of the next position. All rows of a draft have the position of
    the text's last token, and see what stands before that.

    Args:
        model: transformers' model of the layers. Its embedding isn't used.
        pre_projection: of the target's embedding and what is known, behind one another, to the model's width.
        post_projection: of the model's width to the target's.
        output: the output layer.
        centroids: of clusters of tokens, or None. With clusters, the tokens of the likeliest ones get their logits, and
            all others what is one less than the least of these.
        clusters: int64[clusters, tokens], the tokens of each.
        chosen: how many clusters are the likeliest.

    Attributes:
        vocab_size, target_hidden_size, context: tokens, the target's width, and the most positions.
        kinds: the kind of each layer.
        kv_sizes: by kind, how many heads of keys it reads, and how wide these are.
    """

    clusters: torch.Tensor | None

    def __init__(
        self, model: PreTrainedModel, pre_projection: nn.Linear, post_projection: nn.Linear, output: nn.Linear,
        centroids: nn.Linear | None = None, clusters: torch.Tensor | None = None, chosen: int = 0,
    ) -> None:  # fmt: skip
        super().__init__()
        self.model, self.output, self.centroids = model, output, centroids
        self.pre_projection, self.post_projection = pre_projection, post_projection
        self.register_buffer("clusters", clusters)
        self.vocab_size, self.target_hidden_size = output.out_features, post_projection.out_features
        config: Any = model.config
        self.context = int(config.max_position_embeddings)
        self.kinds, self.kv_sizes, self._chosen = list[str](config.layer_types), dict[str, tuple[int, int]](), chosen
        layers: Any = model.layers
        for kind, layer in zip(self.kinds, layers, strict=True):
            own = layer.self_attn
            heads = own.q_proj.out_features // own.head_dim
            self.kv_sizes[kind] = heads // own.num_key_value_groups, own.head_dim
        # as `attention.tree_mask` says it; transformers counts the window from the last position before a row
        window = {"sliding_attention": config.sliding_window + 1}
        self._masks = {
            kind: torch.full((1, 1, 1, 1), window.get(kind, 0), dtype=torch.int64) for kind in self.kv_sizes
        }  # fmt: skip

    def forward(
        self, embedded: torch.Tensor, known: torch.Tensor, positions: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Logits [rows, vocab], and what is known of the next positions, [rows, target's width]; attention is
        `attention.tree_attention`'s, and given no keys or values.

        Args:
            embedded, known: [rows, target's width].
            positions: int64[rows].
        """
        x = self.pre_projection(torch.cat([embedded, known], -1))[None]
        nothing = x.new_empty(1, 1, 0, 1)
        given: Any = self.model(
            inputs_embeds=x, position_ids=positions[None], attention_mask=self._masks, use_cache=False,
            shared_kv_states=dict.fromkeys(self.kv_sizes, (nothing, nothing)),
            logits_to_keep=torch.arange(len(embedded)),  # of a number, it would leave out rows
        )  # fmt: skip
        states: torch.Tensor = given.last_hidden_state[0]
        return self.logits(states), self.post_projection(states)

    def logits(self, states: torch.Tensor) -> torch.Tensor:
        """[rows, vocab], of ``states`` [rows, hidden size]."""
        if self.centroids is None or self.clusters is None:
            return self.output(states)  # type: ignore[no-any-return]
        ids = self.clusters[self.centroids(states).topk(self._chosen).indices].flatten(1)
        known = torch.einsum("rtw,rw->rt", self.output.weight[ids], states)
        others = known.amin(1, keepdim=True) - 1
        return others.expand(-1, self.vocab_size).scatter(1, ids, known)
