"""Attention over what an index chooses: DeepSeek-V3.2's, and its relatives'.

Their indexers ready queries, keys and weights of heads by code of their own. What depends on other rows is done here:
keys are stored, and positions are chosen on each row's own path.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

from tokentree.engines.cpu.attention import Choosing, running


def by_index(module: Any) -> None:
    """Has an indexer of transformers choose through `attention.running`, where something there can."""
    own = module.forward

    def forward(*args: Any, **kwargs: Any) -> Any:
        chooses = running()
        if not isinstance(chooses, Choosing):
            return own(*args, **kwargs)
        with _Chosen(chooses, module.index_topk):
            return own(*args, **kwargs)

    module.forward = forward


class _Chosen(TorchFunctionMode):
    """In here an indexer's two products aren't computed: that of queries and keys, and that of the weights of heads and
    what the first one gives. In place of the highest scores it gets what ``forward`` chooses. A factor that all scores
    share is above 0, and changes no choice.

    Args:
        forward: what chooses.
        most: positions that a row sees.
    """

    def __init__(self, forward: Choosing, most: int) -> None:
        super().__init__()
        self._forward, self._most, self._given = forward, most, list[torch.Tensor]()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.matmul and args[0].ndim == 4:
            self._given += [args[0][0], args[1][0]]
            return args[0].new_zeros(*args[0].shape[:3], 1)
        if func is torch.Tensor.topk:
            queries, keys, weights, _ = self._given  # [rows, heads, width], [1, width, rows], [rows, 1, heads]
            chosen = self._forward.choose(queries, keys[0].T, weights[:, 0], self._most)
            return SimpleNamespace(indices=chosen[None])
        return func(*args, **(kwargs or {}))
