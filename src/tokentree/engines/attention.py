"""Attention over a committed prefix and a token tree.

`tree_attention` gives a row the same bits however many rows go with it and wherever its ancestors' KV happens to
lie, so that a tree's logits are those of plain decoding, bit for bit. It reduces over fixed blocks of `BLOCK`
*absolute positions*: the blocks of the prefix are shared by all nodes; the last ones are gathered per node, with the
node's ancestors in the places that they will have once committed. Sums run in block order, inside a block in a
product of one size, and row counts are padded to multiples of 4, because small float32 products take other code paths
at other counts.
"""

from __future__ import annotations

import math
from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from transformers import Cache

from tokentree.engines.kv import BLOCK, SequenceKV
from tokentree.errors import ModelError
from tokentree.tree import TokenTree

ONES = 16  # columns of ones behind the values: a multiple of the vector width


@dataclass(eq=False)
class Segment:
    """The rows of one sequence in a forward.

    Args:
        kv: its KV; the rows of the tree's nodes follow the committed ones, node j at row ``kv.length + j``.
        tree: all nodes.
        first: the first node to compute; nodes before it have their KV already.
        start: its row in the forward's input.
    """

    kv: SequenceKV
    tree: TokenTree
    first: int
    start: int
    _cache: dict[Any, Any] = field(default_factory=dict, repr=False)

    @property
    def count(self) -> int:
        return len(self.tree) - self.first

    @property
    def prefix(self) -> int:
        return self.kv.length

    @property
    def positions(self) -> np.ndarray:
        """int64[count]: absolute positions of the computed nodes, prefix + depth."""
        return self.prefix + self.tree.depths[self.first :]

    def visible(self, window: int | None) -> np.ndarray:
        """bool[count, prefix + nodes]: which KV rows each computed node sees; ``window`` counts positions."""
        ancestors = self.tree.mask[self.first :]
        seen = np.concatenate([np.ones((self.count, self.prefix), np.bool_), ancestors], axis=1)
        if window is not None:
            row_positions = np.concatenate([np.arange(self.prefix), self.prefix + self.tree.depths])
            seen &= self.positions[:, None] - row_positions < window
        return seen

    # -- the plan of the blockwise reduction, made once per forward and window, used by every layer ----------------

    @property
    def windows(self) -> set[int | None]:
        """The sliding windows that layers asked for."""
        return {window for window, _ in self._cache}

    def plan(self, window: int | None, device: torch.device) -> BlockPlan:
        if (window, device) not in self._cache:
            self._cache[window, device] = self._plan(window, device)
        return self._cache[window, device]  # type: ignore[no-any-return]

    def _plan(self, window: int | None, device: torch.device) -> BlockPlan:
        count, prefix = self.count, self.prefix
        shared = prefix // BLOCK * BLOCK  # positions in blocks that are wholly committed
        if self.tree.is_chain:  # rows lie where they will lie once committed: every block is shared, under a mask
            end = -(-(prefix + len(self.tree)) // BLOCK) * BLOCK
            position = np.arange(end)
            hidden = position > self.positions[:, None]
            if window is not None:
                hidden |= self.positions[:, None] - position >= window
            start = shared if window is None else 0
            return BlockPlan(end, _additive(hidden[:, start:], device), None, None, start)
        slots = -(-(int(self.positions.max()) + 1 - shared) // BLOCK) * BLOCK
        position = shared + np.arange(slots)
        rows = np.zeros((count, slots), np.int64)  # the KV row that holds each position of a node's own path
        hidden = position > self.positions[:, None]
        rows[:, : prefix - shared] = position[: prefix - shared]
        node, ancestor = np.nonzero(self.tree.mask[self.first :])
        rows[node, prefix - shared + self.tree.depths[ancestor]] = prefix + ancestor
        hidden_prefix = None
        if window is not None:
            hidden |= self.positions[:, None] - position >= window
            if shared:
                hidden_prefix = _additive(self.positions[:, None] - np.arange(shared) >= window, device)
        return BlockPlan(shared, hidden_prefix, torch.from_numpy(rows).to(device), _additive(hidden, device), 0)


@dataclass(frozen=True)
class BlockPlan:
    """Which blocks are shared, which are gathered, and what is hidden in each.

    Args:
        shared: positions in shared blocks, a multiple of `BLOCK`.
        shared_mask: None, or additive float32[count, shared - masked_from]: 0 or -inf.
        rows: None, or int64[count, slots]: the KV rows gathered for each node.
        rows_mask: additive float32[count, slots] for them.
        masked_from: the position that ``shared_mask`` starts at.
    """

    shared: int
    shared_mask: torch.Tensor | None
    rows: torch.Tensor | None
    rows_mask: torch.Tensor | None
    masked_from: int


def _additive(hidden: np.ndarray, device: torch.device) -> torch.Tensor:
    return torch.from_numpy(np.where(hidden, np.float32(-math.inf), np.float32(0))).to(device)


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
        for segment in self.segments:
            rows = slice(segment.start, segment.start + segment.count)
            row = segment.prefix + segment.first
            segment.kv.write(layer_idx, row, key_states[0, :, rows], value_states[0, :, rows])
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

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return 0

    def get_mask_sizes(self, query_length: int, layer_idx: int = 0) -> tuple[int, int]:
        return query_length, 0


def dense_mask(
    segments: SequenceOf[Segment], rows: int, window: int | None, dtype: torch.dtype, device: torch.device
) -> torch.Tensor:
    """[1, 1, rows, all KV rows], additive: what each row sees, for models that attend by themselves."""
    seen = np.zeros((rows, sum(s.prefix + len(s.tree) for s in segments)), np.bool_)
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
        [1, rows, heads, width], in the query's dtype; padding rows get zeros.
    """
    if forward_kv is None:
        raise ModelError(f"{type(module).__name__} drops the keyword arguments of its attention: use attention='sdpa'")
    _, heads, rows, width = query.shape
    scale = width**-0.5 if scaling is None else scaling
    parts, end = [], 0
    for segment in forward_kv.segments:
        q = query[0, :, segment.start : segment.start + segment.count]
        keys, values = segment.kv.layer(module.layer_idx)  # type: ignore[arg-type]
        parts.append(_attend(q, keys, values, segment.plan(sliding_window, query.device), scale, softcap, segment))
        end = segment.start + segment.count
    if end < rows:
        parts.append(parts[-1].new_zeros(rows - end, heads, parts[-1].shape[-1]))
    out = torch.cat(parts) if len(parts) > 1 else parts[0]
    return out[None].to(query.dtype), None


def _attend(
    query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, plan: BlockPlan, scale: float,
    softcap: float | None, segment: Segment,
) -> torch.Tensor:  # fmt: skip
    """float32[n, heads, width] for one sequence; ``query`` is [heads, n, width]."""
    _, n, width = query.shape
    kv_heads, group = keys.shape[0], query.shape[0] // keys.shape[0]
    value_width = values.shape[2] - ONES
    padded = -(-n * group // 16) * 16
    q = torch.zeros(kv_heads, padded, width, dtype=keys.dtype, device=keys.device)
    q[:, : n * group].view(kv_heads, n, group, width).copy_(query.view(kv_heads, group, n, width).transpose(1, 2))

    columns = plan.shared if plan.rows is None else -(-(segment.prefix + len(segment.tree)) // BLOCK) * BLOCK
    scores = torch.bmm(q, keys[:, :columns].transpose(1, 2)).mul_(scale)  # [kv_heads, padded, columns]
    if softcap is not None:
        scores = torch.tanh(scores / softcap) * softcap
    shared = scores[:, :, : plan.shared]
    if plan.shared_mask is not None:
        masked = shared[:, : n * group, plan.masked_from :].unflatten(1, (n, group))
        masked += plan.shared_mask[:, None]
    if plan.rows is None:
        top = shared.amax(-1, keepdim=True)
        sums = _fold(shared.sub_(top).exp_(), values)
    else:
        slots = plan.rows.shape[1]
        own = scores[:, : n * group].unflatten(1, (n, group))
        own = own.gather(3, plan.rows[None, :, None].expand(kv_heads, n, group, slots)).add_(plan.rows_mask[:, None])  # type: ignore[index]
        top = own.amax(-1, keepdim=True)
        pad = -(-group // 4) * 4
        sums = torch.zeros(kv_heads, n, pad, value_width + ONES, dtype=values.dtype, device=values.device)
        if plan.shared:
            used = shared[:, : n * group].unflatten(1, (n, group))
            top = torch.maximum(top, used.amax(-1, keepdim=True))
            used.sub_(top).exp_()
            sums[:, :, :group] = _fold(shared, values)[:, : n * group].unflatten(1, (n, group))
        weights = torch.zeros(kv_heads, n, pad, slots, dtype=values.dtype, device=values.device)
        weights[:, :, :group] = own.sub_(top).exp_()
        gathered = values.index_select(1, plan.rows.flatten()).unflatten(1, (n, slots))
        sums = sums.flatten(0, 1)
        for block in range(0, slots, BLOCK):
            w, v = (
                weights[..., block : block + BLOCK].flatten(0, 1),
                gathered[:, :, block : block + BLOCK].flatten(0, 1),
            )
            sums = torch.baddbmm(sums, w, v)
        sums = sums.unflatten(0, (kv_heads, n))[:, :, :group].flatten(1, 2)
    out = sums[:, : n * group, :value_width] / sums[:, : n * group, value_width : value_width + 1]
    rows: torch.Tensor = out.unflatten(1, (n, group)).transpose(0, 1).flatten(1, 2)
    return rows


def _fold(weights: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    """[heads, rows, value width + ones]: the sums over shared blocks, added up in block order."""
    sums = torch.zeros(*weights.shape[:2], values.shape[2], dtype=values.dtype, device=values.device)
    for block in range(0, weights.shape[2], BLOCK):
        sums = torch.baddbmm(sums, weights[:, :, block : block + BLOCK], values[:, block : block + BLOCK])
    return sums
