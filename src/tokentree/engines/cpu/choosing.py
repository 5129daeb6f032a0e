"""Which positions on its own path each row of a forward sees, where an index chooses among them."""

from __future__ import annotations

from collections.abc import Sequence as SequenceOf

import numpy as np
import torch

from tokentree.engines.segment import Segment
from tokentree.kernels.indexing import IndexCall, along_paths, score_worker
from tokentree.kernels.threads import address, run
from tokentree.kernels.tile import BLOCK

ALL = -1  # begins the positions of a row that sees all on its path


def all_of(rows: int) -> torch.Tensor:
    """int32[rows, 1]: every row sees all on its path."""
    return torch.full((rows, 1), ALL, dtype=torch.int32)


def choose_rows(
    segments: SequenceOf[Segment], layer: int, queries: torch.Tensor, weights: torch.Tensor, most: int
) -> torch.Tensor:  # fmt: skip
    """int32[rows, positions]: those with the ``most`` highest scores on the path of each row, ascending; `ALL` first if
    there are no more. Rows that only fill up have `ALL`.

    A row's scores lie in the order of its path, and torch's ``topk`` takes the highest of just these. So it also
    decides where scores are equal, as it does in transformers when one token is decoded after another.

    Args:
        segments: whose keys are stored.
        layer: where these are.
        queries: float32[rows, heads, width].
        weights: float32[rows, heads].
    """
    rows, heads, width = queries.shape
    if max(segment.prefix + int(segment.tree.depths[-segment.count :].max()) for segment in segments) < most:
        return all_of(rows)
    end = max(segment.prefix + len(segment.tree) for segment in segments)
    scores = torch.empty(rows, -(-end // BLOCK) * BLOCK, dtype=torch.float32)
    call = IndexCall(
        queries=address(queries, torch.float32, rows, heads, width),
        weights=address(weights, torch.float32, rows, heads), scores=scores.data_ptr(), columns=scores.shape[1],
        width=width, heads=heads, segments=len(segments),
    )  # fmt: skip
    table = list[int]()
    for segment in segments:
        table += segment.described(layer)
    run(score_worker(), [*call, *table])
    chosen = torch.full((rows, most), ALL, dtype=torch.int32)
    for segment in segments:
        own = scores[segment.start : segment.start + segment.count]
        if not segment.tree.is_chain:
            along_paths(own.numpy(), segment.paths, segment.prefix)
        lengths = segment.positions + 1
        for length in np.unique(lengths[lengths > most]).tolist():
            at = torch.from_numpy(np.flatnonzero(lengths == length))
            with torch._C.DisableTorchFunction():  # it is no router's choice
                found = torch.topk(own[at, :length], most).indices
            chosen[segment.start + at] = found.sort().values.int()
    return chosen
