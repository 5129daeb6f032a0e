"""Positions that a model counts by itself: from how many rows its cache holds, or from another number than 0. In a
private copy, modules that do are told the positions of the forward that runs."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from tokentree.engines.cpu.attention import ForwardKV, running
from tokentree.engines.segment import inputs_of
from tokentree.engines.support import counting, first_of


def tell_positions(model: nn.Module) -> None:
    """Has modules of ``model`` (a `private_copy`) that count positions take those of the forward that runs."""
    for module in counting(model):
        _tell(module)


def _tell(module: Any) -> None:
    own, first = module.forward, first_of(module)

    def forward(*args: Any, **kwargs: Any) -> Any:
        runs = running()
        if isinstance(runs, ForwardKV):
            positions = torch.from_numpy(inputs_of(runs.segments, runs.padding)[1])
            kwargs["position_ids"] = (positions + first)[None] if first else positions
        return own(*args, **kwargs)

    module.forward = forward
