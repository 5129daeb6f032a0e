"""Tables from a run."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from rich.table import Table

from tokentree.bench.results import Run, Sample


@dataclass(frozen=True)
class Row:
    """One method, pooled over samples: rates are total tokens over total seconds, not means of rates."""

    method: str
    tokens_per_second: float
    end_to_end: float
    speed_up: float
    mean_accepted_length: float | None
    acceptance_rate: float | None
    nodes: float | None
    same: int
    samples: int
    failures: int


def summarise(run: Run, category: str | None = None) -> list[Row]:
    """A row per method, in the order they were given. The first method is what the others are compared with.

    Only turns that no method failed on are counted, so that all are measured on the same work.
    """
    samples = [sample for sample in run.samples if category in (None, sample.category)]
    failed = {(sample.prompt, sample.turn) for sample in samples if sample.error is not None}
    methods = list(dict.fromkeys(sample.method for sample in samples))
    rows: list[Row] = []
    for method in methods:
        mine = [sample for sample in samples if sample.method == method]
        used = [sample for sample in mine if (sample.prompt, sample.turn) not in failed]
        rate = _ratio((s.decoded_tokens for s in used), (s.decode_seconds for s in used))
        whole = _ratio((len(s.token_ids) for s in used), (s.prefill_seconds + s.decode_seconds for s in used))
        rows.append(
            Row(
                method=method,
                tokens_per_second=rate,
                end_to_end=whole,
                speed_up=rate / rows[0].tokens_per_second if rows and rows[0].tokens_per_second else 1.0,
                mean_accepted_length=_pooled(used, "new_tokens", ("target_forwards",)),
                acceptance_rate=_pooled(used, "accepted_tokens", ("accepted_tokens", "refused_steps")),
                nodes=_pooled(used, "drafted_tokens", ("target_forwards",)),
                same=sum(sample.same_as_plain is True for sample in used),
                samples=len(used),
                failures=sum(sample.error is not None for sample in mine),
            )
        )
    return rows


def table(run: Run, category: str | None = None) -> Table:
    """The rows of `summarise` for a terminal."""
    shown = Table(title=category or "all categories")
    shown.add_column("method")
    for name in ("tokens/s", "x first", "end to end", "MAL", "accepted", "nodes", "same ids", "failed"):
        shown.add_column(name, justify="right")
    for row in summarise(run, category):
        shown.add_row(
            row.method,
            f"{row.tokens_per_second:.1f}",
            f"{row.speed_up:.2f}",
            f"{row.end_to_end:.1f}",
            "" if row.mean_accepted_length is None else f"{row.mean_accepted_length:.2f}",
            "" if row.acceptance_rate is None else f"{row.acceptance_rate:.0%}",
            "" if row.nodes is None else f"{row.nodes + 1:.1f}",
            f"{row.same}/{row.samples}",
            str(row.failures or ""),
        )
    return shown


def _ratio(over: Iterable[float], under: Iterable[float]) -> float:
    total = sum(under)
    return sum(over) / total if total else 0.0


def _pooled(samples: list[Sample], over: str, under: tuple[str, ...]) -> float | None:
    measured = [sample.metrics for sample in samples if sample.metrics]
    if not measured:
        return None
    return _ratio((m[over] for m in measured), (sum(m[name] for name in under) for m in measured))
