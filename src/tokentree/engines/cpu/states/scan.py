"""A recurrence over the rows of a forward."""

from __future__ import annotations

from typing import Any

import torch

from tokentree.engines.cpu.attention import Recurring
from tokentree.engines.recurrent import Recurrence
from tokentree.kernels.recurrence import RecurrenceCall, StateRows
from tokentree.kernels.threads import run
from tokentree.kernels.tile import BLOCK


def scan(
    forward: Recurring, worker: Any, key: torch.Tensor, value: torch.Tensor, decay: torch.Tensor, query: torch.Tensor,
    rate: torch.Tensor | None = None, constants: torch.Tensor | None = None,
) -> torch.Tensor:  # fmt: skip
    """float32[rows, heads, values]: what queries read of the states of all sequences, each behind its row.

    Args:
        worker: one of `kernels.recurrence`.
        key, query: [rows, groups, keys]; as many heads share one as there are heads for each group.
        value: [rows, heads, values].
        decay: [rows, heads, decays].
        rate: [rows, heads], where the worker has one.
        constants: what else it reads.
    """
    rows, groups, keys = key.shape
    heads, values = value.shape[1:]
    stored = [part.reshape(rows, -1).float() for part in (key, value, decay, *([] if rate is None else [rate]))]
    at = [sum(part.shape[1] for part in stored[:place]) for place in range(len(stored) + 1)]
    whole = torch.cat([*stored, query.reshape(rows, -1).float()], 1)
    out = torch.zeros(rows, heads, values, dtype=torch.float32)
    sizes = Recurrence(at[-1], 0, heads * -(-values // BLOCK) * keys * BLOCK)

    def loop(table: list[StateRows]) -> None:
        call = RecurrenceCall(
            heads=heads, keys=keys, values=values, group=heads // groups, value_at=at[1], decay_at=at[2],
            decays=decay.shape[2], rate_at=at[3], query_at=at[-1], rows=whole.data_ptr(), width=whole.shape[1],
            results=out.data_ptr(), constants=0 if constants is None else constants.data_ptr(), segments=len(table),
        )  # fmt: skip
        run(worker, [*call, *(number for rows in table for number in rows)])

    forward.recur(sizes, whole, loop)
    return out
