"""How an engine proves itself when it is made: a few tokens go through the model's own forward, and through the
engine's in trees."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np
import torch

from tokentree.engines.kv import SequenceKV
from tokentree.engines.segment import Segment
from tokentree.errors import ModelError
from tokentree.tree import TokenTree

if TYPE_CHECKING:
    from transformers import PreTrainedModel

OWN = "own forward"  # the name by which what a model says by itself is kept
PROBE = (0.11, 0.37, 0.23, 0.71, 0.53, 0.31, 0.83)  # any tokens, as parts of the vocabulary


@torch.inference_mode()
def own_forward(model: PreTrainedModel) -> dict[str, torch.Tensor]:
    """What ``model`` says of a few ``tokens`` by itself (causal attention, its own cache): ``logits`` [tokens, vocab],
    and ``shapes`` int64[layers, 3] of its KV: heads, key width, value width.

    Raises:
        ModelError: if it can't read text alone, or keeps more than KV.
    """
    tokens = torch.tensor(probe(model))
    try:
        out = model(input_ids=tokens[None].to(model.device), use_cache=True, return_dict=True)
    except ValueError as error:
        raise ModelError(f"{type(model).__name__} can't read a text alone: {' '.join(str(error).split())}") from None
    layers = getattr(out.past_key_values, "layers", [])
    if not layers or any(not isinstance(getattr(layer, "keys", None), torch.Tensor) for layer in layers):
        raise ModelError(f"{type(model).__name__} keeps more than keys and values, which a tree can't roll back")
    shapes = [(layer.keys.shape[1], layer.keys.shape[3], layer.values.shape[3]) for layer in layers]
    return {"tokens": tokens, "logits": out.logits[0], "shapes": torch.tensor(shapes)}


@torch.inference_mode()
def in_trees(
    tokens: torch.Tensor, forward: Callable[[Segment], torch.Tensor], kv: SequenceKV
) -> tuple[torch.Tensor, set[int | None]]:
    """The logits of the same ``tokens`` from ``forward``, which gives those of a segment's nodes: in a tree, alone
    behind it, and in another tree behind that. And the sliding windows that layers asked for."""
    a, b, c, d, e, f, g = tokens.tolist()
    other, got, windows = d - 1 if d else 1, [], set[int | None]()
    for nodes, parents, path in (
        ([a, b, other, c, d, c, d], [-1, 0, 0, 1, 2, 2, 3], [0, 1, 3, 6]),
        ([e], [-1], [0]),
        ([f, other, g, g], [-1, 0, 1, 0], [0, 3]),
    ):
        segment = Segment(kv, TokenTree(np.array(nodes), np.array(parents)), 0, 0)
        got.append(forward(segment)[path].float())
        kv.commit(path)
        windows |= segment.windows
    return torch.cat(got), windows


def probe(model: PreTrainedModel) -> list[int]:
    size: int = model.get_input_embeddings().num_embeddings  # type: ignore[assignment]
    return [int(part * size) for part in PROBE]
