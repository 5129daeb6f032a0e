"""Tables from a run."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from rich.table import Table
from rich.text import Text

from tokentree.bench.loops import first_loop
from tokentree.bench.results import Run, Sample
from tokentree.cli.terminal import spelled


@dataclass(frozen=True)
class Row:
    """One method, pooled over samples: rates are total tokens over total seconds, not means of rates.

    Args:
        tokens_per_second: while decoding; the prompt's reading is not counted.
        speed_up: that, over the first method's.
        end_to_end: the same of all tokens over all seconds, the prompt's reading counted in.
        mean_accepted_length: tokens per forward of the target.
        acceptance_rate: accepted draft tokens / (those + steps that stopped before a leaf).
        rows: of a forward, on average.
        same: turns with the first method's ids.
        same_ids: the share of all ids (of the longer text) that stand before a turn's first difference from the first
            method's.
        samples: turns that are counted.
        failures: turns that it failed on.
    """

    method: str
    tokens_per_second: float
    speed_up: float | None
    end_to_end: float | None
    mean_accepted_length: float | None
    acceptance_rate: float | None
    rows: float | None
    same: int
    same_ids: float | None
    samples: int
    failures: int

    @property
    def ids(self) -> str:
        """Turns with the first method's ids, of all, and the share of ids."""
        if self.same_ids is None:
            return ""
        # what isn't all is not called 100%
        share = "100%" if self.same_ids == 1 else f"{min(self.same_ids, 0.999):.1%}"
        return f"{self.same}/{self.samples} ({share})"


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
        drafted, forwards = metrics.get("drafted_tokens"), metrics.get("target_forwards")
        rows = None if drafted is None or forwards is None else drafted + forwards
        return Work(sample.decoded_tokens, sample.decode_seconds, forwards, rows)
    left = upto - (len(sample.token_ids) - sample.decoded_tokens)  # tokens that came with the prefill
    done, seconds, count, all_rows = 0, 0.0, 0, 0
    for rows, tokens, took in steps:
        if done >= left:
            break
        part = min(1.0, (left - done) / tokens)
        done += min(tokens, left - done)
        seconds += took * part
        count += 1
        all_rows += rows
    return Work(done, seconds, count, all_rows or None)


def summarise(run: Run, category: str | None = None, cut_loops: bool = False) -> list[Row]:
    """A row per method, in the order they were given. The first method is what the others are compared with.

    Only turns that no method failed on are counted, so that all are measured on the same work. With ``cut_loops`` each
    turn counts only up to its first repetition loop (`first_loop` of the first method's text).
    """
    samples = [sample for sample in run.samples if category in (None, sample.category)]
    failed = {sample.place for sample in samples if sample.error is not None}
    methods = list(dict.fromkeys(sample.method for sample in samples))
    firsts = {sample.place: sample.token_ids for sample in samples if sample.method == methods[0]}
    ends = {place: first_loop(ids) for place, ids in firsts.items()} if cut_loops else {}
    rows, base = list[Row](), (0.0, 0.0)
    for method in methods:
        mine = [sample for sample in samples if sample.method == method]
        used = [sample for sample in mine if sample.place not in failed]
        done = [work(sample, ends.get(sample.place)) for sample in used]
        rate = _ratio((w.tokens for w in done), (w.seconds for w in done))
        whole = _ratio((len(s.token_ids) for s in used), (s.prefill_seconds + s.decode_seconds for s in used))
        base = base if rows else (rate, whole)
        counted = [w for w in done if w.forwards]
        shaped = [w for w in counted if w.rows]
        alike = [_alike(s.token_ids, firsts.get(s.place, [])) for s in used]
        rows.append(
            Row(
                method=method,
                tokens_per_second=rate,
                speed_up=rate / base[0] if base[0] and used else None,
                end_to_end=whole / base[1] if base[1] and used else None,
                mean_accepted_length=_mean((w.tokens for w in counted), (w.forwards for w in counted)),
                acceptance_rate=_acceptance(used),
                rows=_mean((w.rows for w in shaped), (w.forwards for w in shaped)),
                same=sum(sample.same_as_plain is True for sample in used),
                same_ids=_mean((same for same, _ in alike), (ids for _, ids in alike)),
                samples=len(used),
                failures=sum(sample.error is not None for sample in mine),
            )
        )
    return rows


def explained(first: str) -> str:
    """What the columns of a table mean, whose first method is called ``first``."""
    return (
        f"x {first}: tokens/s while decoding, over those of {first}. End to end: the same with the prompt's reading "
        "counted in. Accepted: the share of draft tokens that were right, of these and the steps that stopped before a "
        "leaf; a step that ends at a leaf refused nothing. Tokens a forward: of the target, its own token counted. "
        f"Ids as {first}: turns whose ids are all the same, and the share of ids before a turn's first difference."
    )


def table(run: Run, category: str | None = None, cut_loops: bool = False) -> Table:
    """The rows of `summarise` for a terminal; what they mean is said under the table of everything."""
    rows = summarise(run, category, cut_loops)
    first = rows[0].method if rows else "the first"
    shown = Table(title=_spelled((category or "all categories") + (", up to the first loop" if cut_loops else "")))
    if category is None and not cut_loops:
        shown.caption, shown.caption_justify = _spelled(explained(first)), "left"
    shown.add_column("method", overflow="fold")
    for name in ("tokens/s", f"x {first}", "end to end", "tokens a forward", "accepted", "rows", f"ids as {first}",
                 "failed"):  # fmt: skip
        shown.add_column(_spelled(name), justify="right")
    for row in rows:
        shown.add_row(
            _spelled(row.method),
            number(row.tokens_per_second if row.samples else None, 1),
            number(row.speed_up),
            number(row.end_to_end),
            number(row.mean_accepted_length),
            "" if row.acceptance_rate is None else f"{row.acceptance_rate:.0%}",
            number(row.rows, 1),
            row.ids,
            str(row.failures or ""),
        )
    return shown


def _spelled(text: str) -> Text:
    """``text`` for a table: no marks of rich's, and nothing that a terminal obeys."""
    return Text(spelled(text))


def number(value: float | None, digits: int = 2) -> str:
    """``value`` for a table, which stays empty where nothing was measured."""
    return "" if value is None else f"{value:.{digits}f}"


def _alike(ids: Sequence[int], other: Sequence[int]) -> tuple[int, int]:
    """How many ids come before the first difference, and how many there are."""
    shorter, longer = sorted((len(ids), len(other)))
    return next((place for place in range(shorter) if ids[place] != other[place]), shorter), longer


def _ratio(over: Iterable[float | None], under: Iterable[float | None]) -> float:
    return _mean(over, under) or 0.0


def _mean(over: Iterable[float | None], under: Iterable[float | None]) -> float | None:
    total = sum(part or 0 for part in under)
    return sum(part or 0 for part in over) / total if total else None


def _acceptance(samples: list[Sample]) -> float | None:
    """Accepted draft tokens / (those + steps that stopped before a leaf)."""
    known = [s.metrics for s in samples if {"accepted_tokens", "refused_steps"} <= set(s.metrics)]
    return _mean((m["accepted_tokens"] for m in known), (m["accepted_tokens"] + m["refused_steps"] for m in known))
