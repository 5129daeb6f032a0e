"""Attention over a committed prefix and a token tree, for all sequences of a forward at once.

`tree_attention` gives a row the same bits however many rows go with it and wherever its ancestors' KV happens to lie,
so that a tree's logits are those of plain decoding, bit for bit: see `attend`.
"""

from __future__ import annotations

from collections.abc import Sequence as SequenceOf
from typing import Any

import numpy as np
import torch
from transformers import Cache

from tokentree.engines.attend import attend_worker
from tokentree.engines.segment import Segment
from tokentree.errors import ModelError
from tokentree.threads import num_threads, run


class ForwardKV(Cache):
    """What transformers' modules see as the cache of one forward: the KV of several sequences, side by side.

    The rows of all segments form one batch row; nothing is padded. `update` stores the new rows; a model that attends
    by itself gets all rows back, one sequence behind another, to be seen through a block-diagonal mask.
    """

    def __init__(self, segments: SequenceOf[Segment], attends_itself: bool) -> None:
        super().__init__(layers=[])
        self.segments = segments
        self._attends_itself = attends_itself

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        self.write(layer_idx, key_states[0], value_states[0])
        if not self._attends_itself:
            return key_states, value_states
        stored = [(segment.kv.layer(layer_idx), segment.prefix + len(segment.tree)) for segment in self.segments]
        if len(stored) == 1:
            ((keys, values), end), *_ = stored
            return keys[None, :, :end], values[None, :, :end]
        all_keys = [keys[:, :end] for (keys, _), end in stored]
        all_values = [values[:, :end] for (_, values), end in stored]
        # a padding row, if there is one, sees row 0 of the first sequence
        return torch.cat(all_keys, 1)[None], torch.cat(all_values, 1)[None]

    def write(self, layer: int, keys: torch.Tensor, values: torch.Tensor) -> None:
        """Stores the new rows of all sequences, [heads, rows, width]."""
        for segment in self.segments:
            rows = slice(segment.start, segment.start + segment.count)
            segment.kv.write(layer, segment.prefix + segment.first, keys[:, rows], values[:, rows])

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return 0

    def get_mask_sizes(self, query_length: int, layer_idx: int = 0) -> tuple[int, int]:
        return query_length, 0


def dense_mask(
    segments: SequenceOf[Segment], rows: int, window: int | None, dtype: torch.dtype, device: torch.device,
    columns: int | None = None,
) -> torch.Tensor:  # fmt: skip
    """[1, 1, rows, columns], additive: what each row sees, for models that attend by themselves; by default there are
    as many columns as KV rows of all segments."""
    seen = np.zeros((rows, columns or sum(s.prefix + len(s.tree) for s in segments)), np.bool_)
    column = 0
    for segment in segments:
        width = segment.prefix + len(segment.tree)
        seen[segment.start : segment.start + segment.count, column : column + width] = segment.visible(window)
        column += width
    seen[~seen.any(1), 0] = True
    mask = torch.zeros(seen.shape, dtype=dtype).masked_fill(torch.from_numpy(~seen), torch.finfo(dtype).min)
    return mask[None, None].to(device)


def tree_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    forward_kv: ForwardKV | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Attention for transformers' `AttentionInterface`; ``query`` is [1, heads, rows, width], and so on.

    Returns:
        [1, rows, heads, value width], in the model's dtype; padding rows get zeros.
    """
    if forward_kv is None:
        raise ModelError(f"{type(module).__name__} drops the keyword arguments of its attention: use attention='sdpa'")
    scale = query.shape[3] ** -0.5 if scaling is None else scaling
    layer: int = module.layer_idx  # type: ignore[assignment]
    sizes = key.shape[1], value.shape[3]
    out = attend_rows(forward_kv, layer, query[0].float(), *sizes, scale, sliding_window, softcap)
    return out[None].to(value.dtype), None


def attend_rows(
    forward_kv: ForwardKV, layer: int, query: torch.Tensor, kv_heads: int, value_width: int, scale: float,
    window: int | None, softcap: float | None = None,
) -> torch.Tensor:  # fmt: skip
    """float32[rows, heads, value width]: attention of all rows of a forward over what `layer` has stored for them.

    Args:
        query: float32[heads, rows, width].
    """
    if query.stride(2) != 1:
        query = query.contiguous()
    heads, rows, width = query.shape
    table = list[int]()
    for segment in forward_kv.segments:
        segment.windows.add(window)
        table += segment.described(layer)
    out = torch.zeros(rows, heads, value_width, dtype=torch.float32)  # rows that only fill up get zeros
    numbers = np.array([scale, softcap or 0.0])
    run(
        attend_worker(),
        [num_threads(), query.data_ptr(), 4 * query.stride(0), 4 * query.stride(1), out.data_ptr(),
         4 * out.stride(1), 4 * out.stride(0), width, value_width, heads // kv_heads, window or 0, heads,
         len(forward_kv.segments), 0, *table, numbers.ctypes.data],
    )  # fmt: skip
    return out
