"""What a run would have taken on another machine: its steps, under another cost of a forward."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from tokentree.bench.results import Run, Sample
from tokentree.errors import OptionError
from tokentree.shapes.curve import CostCurve

PLAIN = "plain"  # the method that all are compared with, wherever it stands
TIMED = ("draft_seconds", "verify_seconds", "accept_seconds")


@dataclass(frozen=True)
class Replayed:
    """One method.

    Args:
        tokens_per_forward: as recorded.
        rows: of a forward, on average.
        measured: times plain's speed, in the run; None where plain decoding wasn't measured there.
        predicted: the same under the other cost.
    """

    method: str
    tokens_per_forward: float
    rows: float
    measured: float | None
    predicted: float


def replay(run: Run, cost: CostCurve, drafting: float = 1.0) -> list[Replayed]:
    """Every recorded step is charged what a forward of so many rows costs under ``cost``, and what drafting and
    accepting took in the run, ``drafting`` times; plain decoding a forward of one row for each token.

    What was accepted stays as it was recorded, so the trees are those of the run: a shape that sizes its trees by cost
    would grow others. Record fixed ones of several sizes, and see which is best.

    Raises:
        OptionError: if ``drafting`` is negative, or no method of the run has steps.
    """
    if not 0 <= drafting < math.inf:
        raise OptionError("drafting is a factor of at least 0")
    base, found = _rate(run.samples, PLAIN), list[Replayed]()
    for method in dict.fromkeys(sample.method for sample in run.samples):
        mine = [s for s in run.samples if s.method == method and s.error is None and set(TIMED) <= set(s.metrics)]
        steps = [step for sample in mine for step in sample.metrics.get("steps", ())]
        if not steps:
            continue
        tokens, plain = sum(step[1] for step in steps), cost.seconds(1)
        spent = sum(cost.seconds(step[0]) for step in steps)
        spent += drafting * sum(s.metrics["draft_seconds"] + s.metrics["accept_seconds"] for s in mine)
        rows = sum(step[0] for step in steps) / len(steps)
        measured = _rate(run.samples, method) / base if base else None
        found.append(Replayed(method, tokens / len(steps), rows, measured, tokens * plain / spent))
    if not found:
        raise OptionError("this run has no steps of this library's methods to replay")
    return found


def _rate(samples: Sequence[Sample], method: str) -> float:
    mine = [sample for sample in samples if sample.method == method and sample.error is None]
    return sum(s.decoded_tokens for s in mine) / max(1e-9, sum(s.decode_seconds for s in mine))
