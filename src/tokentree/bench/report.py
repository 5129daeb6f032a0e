"""Tables from a run."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from rich.table import Table

from tokentree.bench.loops import first_loop
from tokentree.bench.results import Run, Sample

LEGEND = (
    "tokens/s: of decoding; x: times the first method's, of decoding, and end to end, with the prompt read; "
    "MAL: tokens a forward; accepted: candidates / (those + steps that ended above a leaf); rows: of a forward"
)


@dataclass(frozen=True)
class Row:
    """One method, pooled over samples: rates are total tokens over total seconds, not means of rates.
    ``tokens_per_second`` and ``speed_up`` (over the first method) are of decoding alone; ``end_to_end`` is in tokens/s
    too, with the time of reading the prompt."""

    method: str
    tokens_per_second: float
    end_to_end: float
    speed_up: float
    mean_accepted_length: float | None
    acceptance_rate: float | None
    rows: float | None
    same: int
    samples: int
    failures: int


@dataclass(frozen=True)
class Work:
    """What a method did for one turn, or for the first ``tokens`` of it. Forwards, rows and what was accepted are
    None where they aren't known."""

    tokens: int
    seconds: float
    forwards: int | None
    rows: int | None


def work(sample: Sample, upto: int | None = None) -> Work:
    """The work of a whole turn, or of its first ``upto`` tokens, a step that goes past them counted in part."""
    metrics, steps = sample.metrics, sample.metrics.get("steps", [])
    if upto is None or not steps:
        rows = metrics["drafted_tokens"] + metrics["target_forwards"] if "drafted_tokens" in metrics else None
        return Work(sample.decoded_tokens, sample.decode_seconds, metrics.get("target_forwards"), rows)
    left = upto - (len(sample.token_ids) - sample.decoded_tokens)  # tokens that came with the prefill
    done, seconds, forwards, all_rows = 0, 0.0, 0, 0
    for rows, tokens, took in steps:
        if done >= left:
            break
        part = min(1.0, (left - done) / tokens)
        done += min(tokens, left - done)
        seconds += took * part
        forwards += 1
        all_rows += rows
    return Work(done, seconds, forwards, all_rows or None)


def summarise(run: Run, category: str | None = None, cut_loops: bool = False) -> list[Row]:
    """A row per method, in the order they were given. The first method is what the others are compared with.

    Only turns that no method failed on are counted, so that all are measured on the same work. With ``cut_loops`` each
    turn counts only up to its first repetition loop (`first_loop` of the first method's text).
    """
    samples = [sample for sample in run.samples if category in (None, sample.category)]
    failed = {sample.place for sample in samples if sample.error is not None}
    methods = list(dict.fromkeys(sample.method for sample in samples))
    ends: dict[tuple[str, str, int], int | None] = {}
    for sample in samples if cut_loops else []:
        if sample.method == methods[0]:
            ends[sample.place] = first_loop(sample.token_ids)
    rows: list[Row] = []
    for method in methods:
        mine = [sample for sample in samples if sample.method == method]
        used = [sample for sample in mine if sample.place not in failed]
        done = [work(sample, ends.get(sample.place)) for sample in used]
        rate = _ratio((w.tokens for w in done), (w.seconds for w in done))
        whole = _ratio((len(s.token_ids) for s in used), (s.prefill_seconds + s.decode_seconds for s in used))
        counted = [w for w in done if w.forwards]
        shaped = [w for w in counted if w.rows]
        rows.append(
            Row(
                method=method,
                tokens_per_second=rate,
                end_to_end=whole,
                speed_up=rate / rows[0].tokens_per_second if rows and rows[0].tokens_per_second else 1.0,
                mean_accepted_length=_mean((w.tokens for w in counted), (w.forwards for w in counted)),
                acceptance_rate=_acceptance(used),
                rows=_mean((w.rows for w in shaped), (w.forwards for w in shaped)),
                same=sum(sample.same_as_plain is True for sample in used),
                samples=len(used),
                failures=sum(sample.error is not None for sample in mine),
            )
        )
    return rows


def table(run: Run, category: str | None = None, cut_loops: bool = False) -> Table:
    """The rows of `summarise` for a terminal: see `LEGEND`."""
    rows = summarise(run, category, cut_loops)
    first = f"x {rows[0].method}" if rows else "x"
    shown = Table(title=(category or "all categories") + (", up to the first loop" if cut_loops else ""))
    shown.add_column("method", overflow="fold")
    for name in ("tokens/s", first, f"{first}, end to end", "MAL", "accepted", "rows", "same ids", "failed"):
        shown.add_column(name, justify="right")
    for row in rows:
        shown.add_row(
            row.method,
            f"{row.tokens_per_second:.1f}",
            f"{row.speed_up:.2f}",
            f"{row.end_to_end / rows[0].end_to_end:.2f}" if rows[0].end_to_end else "",
            "" if row.mean_accepted_length is None else f"{row.mean_accepted_length:.2f}",
            "" if row.acceptance_rate is None else f"{row.acceptance_rate:.0%}",
            "" if row.rows is None else f"{row.rows:.1f}",
            f"{row.same}/{row.samples}",
            str(row.failures or ""),
        )
    return shown


def _ratio(over: Iterable[float | None], under: Iterable[float | None]) -> float:
    return _mean(over, under) or 0.0


def _mean(over: Iterable[float | None], under: Iterable[float | None]) -> float | None:
    total = sum(part or 0 for part in under)
    return sum(part or 0 for part in over) / total if total else None


def _acceptance(samples: list[Sample]) -> float | None:
    """Accepted draft tokens / (those + steps that stopped before a leaf)."""
    known = [sample.metrics for sample in samples if "accepted_tokens" in sample.metrics]
    return _mean((m["accepted_tokens"] for m in known), (m["accepted_tokens"] + m["refused_steps"] for m in known))
