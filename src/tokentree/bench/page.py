"""A run as a page, `report.md`, and what its pictures show."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from tokentree.bench.report import Row, summarise
from tokentree.bench.results import Run, Sample
from tokentree.errors import OptionError

# Spec-Bench's kinds (Xia et al. 2024, arXiv:2401.07851) and HumanEval, as tasks
GROUPS = {
    "Q&A": ("qa", "rag"),
    "summarisation": ("summarization",),
    "code": ("coding", "humaneval"),
    "creative writing": ("writing", "roleplay"),
    "translation": ("translation",),
    "maths": ("math", "math_reasoning"),
    "other": ("reasoning", "extraction", "stem", "humanities"),
}
DRAWS = 2000  # of a bootstrap
CHAIN = ":chain:"  # what tells a chain's name


@dataclass(frozen=True)
class Gain:
    """A speed-up, and the interval that holds it in 95% of the bootstrap's draws."""

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.value:.2f} ({self.low:.2f} to {self.high:.2f})"


def group_of(category: str) -> str:
    """The task that a category belongs to; an unknown one is a task by itself."""
    for name, members in GROUPS.items():
        if any(category.lower().startswith(member) for member in members):
            return name
    return category


def methods_of(run: Run) -> list[str]:
    return list(dict.fromkeys(sample.method for sample in run.samples))


def best_chain(run: Run) -> str | None:
    """The fastest of the methods that draft chains, over all prompts."""
    chains = [row for row in summarise(run) if CHAIN in row.method]
    return max(chains, key=lambda row: row.tokens_per_second).method if chains else None


def gain(samples: Sequence[Sample], method: str, base: str, seed: int = 0) -> Gain | None:
    """How many times as fast as ``base`` a method decoded: rates pooled over the turns that both finished, and a
    bootstrap over these turns (Efron 1979), seeded. None if there are none."""
    times = {
        name: {
            s.place: (s.decoded_tokens, s.decode_seconds)
            for s in samples
            if s.method == name and s.error is None and s.decode_seconds
        }
        for name in (method, base)
    }
    places = [place for place in times[method] if place in times[base]]
    if not places:
        return None
    mine, theirs = (np.array([times[name][place] for place in places]) for name in (method, base))
    drawn = np.random.default_rng(seed).integers(0, len(places), (DRAWS, len(places)))
    ratios = _ratio(mine[drawn].sum(1), theirs[drawn].sum(1))
    low, high = np.quantile(ratios, [0.025, 0.975])
    return Gain(float(_ratio(mine.sum(0), theirs.sum(0))), float(low), float(high))


def _ratio(mine: np.ndarray, theirs: np.ndarray) -> np.ndarray:
    """Of rates; [..., 2] holds tokens and seconds."""
    rates: np.ndarray = (mine[..., 0] / mine[..., 1]) / (theirs[..., 0] / theirs[..., 1])
    return rates


def acceptance_by_depth(samples: Sequence[Sample], method: str) -> list[tuple[int, float, int]]:
    """Depth, the share of steps whose tree went so deep in which a node there was accepted, and how many these were."""
    accepted, offered = Counter[int](), Counter[int]()
    for sample in samples:
        if sample.method == method:
            accepted.update(dict(enumerate(sample.metrics.get("accepted_by_depth", []), start=1)))
            offered.update(dict(enumerate(sample.metrics.get("offered_by_depth", []), start=1)))
    return [(depth, accepted[depth] / steps, steps) for depth, steps in sorted(offered.items()) if steps]


def page(run: Run, pictures: Sequence[Path] = ()) -> str:
    """The page, as Markdown; ``pictures`` are named beside it."""
    methods, chain = methods_of(run), best_chain(run)
    by_group: dict[str, list[Sample]] = {}
    for sample in run.samples:
        by_group.setdefault(group_of(sample.category), []).append(sample)
    order = [name for name in GROUPS if name in by_group] + [name for name in by_group if name not in GROUPS]
    parts = [f"# {Path(str(run.settings.get('model'))).name}", _where(run)]
    parts += ["## All prompts", _overall(run, chain)]
    parts += [f"![{picture.stem}]({picture.name})" for picture in pictures]
    parts += ["## By task", "Times plain's speed, decoding, with 95% intervals:", _gains(by_group, order, methods)]
    parts += ["Tokens per forward:", _lengths(run, by_group, order, methods)]
    categories = list(dict.fromkeys(sample.category for sample in run.samples))
    if categories != order:
        by_category = {name: [s for s in run.samples if s.category == name] for name in categories}
        parts += ["## By category", _gains(by_category, categories, methods)]
    parts += ["## Where the time goes", _shares(run, methods)]
    return "\n\n".join(part for part in parts if part) + "\n"


def main_table(run: Run) -> str:
    """All prompts in one table, and what was measured where."""
    lines = [
        [
            one.name(short), f"{one.row.tokens_per_second:.1f}", _value(one.first), _value(one.chain), one.end_to_end,
            _number(one.row.mean_accepted_length), f"{one.row.same}/{one.row.samples}",
        ]
        for one in _compared(run)
    ]  # fmt: skip
    settings, machine = run.settings, run.machine
    numbers = settings.get("quantization") or str(settings.get("dtype", "")).removeprefix("torch.")
    turns = len({sample.place for sample in run.samples})
    model, place = (
        Path(str(settings.get("model"))).stem,
        f"{machine.get('threads')} threads of {machine.get('processor')}",
    )
    place += "" if machine.get("device") == "cpu" else f" and {machine.get('device')}"
    told = f"{model}, {numbers}, {place}, {turns} turns, {run.started[:10]}, commit {run.commit or 'unknown'}:"
    heads = ["method", "tokens/s", "x plain", "x best chain", "end to end", "tokens a forward", "ids as plain"]
    return f"{told}\n\n{_table(heads, lines)}"


def insert(text: str, name: str, file: Path) -> None:
    """Puts ``text`` into a Markdown file, in place of what stands between ``<!-- name -->`` and ``<!-- /name -->``.

    Raises:
        OptionError: if the file has no such place, or can't be read or written.
    """
    first, last = f"<!-- {name} -->", f"<!-- /{name} -->"
    try:
        before, found, rest = file.read_text(encoding="utf-8").partition(first)
        _, ends, after = rest.partition(last)
        if not (found and ends):
            raise OptionError(f"{str(file)!r} has no {first} with {last} behind it")
        file.write_text(f"{before}{first}\n\n{text}\n\n{last}{after}", encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        raise OptionError(f"can't put a table into {str(file)!r}: it can't be read or written") from None


def short(method: str) -> str:
    """A method's name without the folders of files in it."""
    return ":".join(part.rsplit("/", 1)[-1] for part in method.split(":"))


def _where(run: Run) -> str:
    machine, versions = run.machine, run.versions
    sampling = run.settings.get("sampling", {})
    lines = [
        f"- {run.started[:10]}, commit {run.commit or 'unknown'}",
        f"- {machine.get('processor')}, {machine.get('cores')} cores, {machine.get('threads')} threads, "
        f"{machine.get('device')}; " + ", ".join(f"{name} {number}" for name, number in versions.items()),
        f"- {run.settings.get('dtype', '').removeprefix('torch.')}"
        + (f", {run.settings['quantization']}" if run.settings.get("quantization") else "")
        + f", at most {sampling.get('max_tokens')} tokens, temperature {sampling.get('temperature')}",
        f"- {len({s.place for s in run.samples})} turns, methods interleaved on each",
    ]
    if run.memory_mb:
        lines.append(f"- at most {run.memory_mb:.0f} MB resident, all methods in one process")
    return "\n".join([*lines, "", f"```\n{run.command}\n```"])


@dataclass(frozen=True)
class _Compared:
    """A method beside the others.

    Args:
        row: its figures.
        first, chain: its gain over the first method, and over the best chain.
        end_to_end: the same over the first method, prefill counted in, as text.
        fastest: whether none decodes more tokens a second.
    """

    row: Row
    first: Gain | None
    chain: Gain | None
    end_to_end: str
    fastest: bool

    def name(self, form: Callable[[str], str] = str) -> str:
        name = form(self.row.method)
        return f"**{name}**" if self.fastest else name


def _compared(run: Run) -> list[_Compared]:
    """All methods, in the order of the run."""
    methods, chain, rows = methods_of(run), best_chain(run), {row.method: row for row in summarise(run)}
    base, found = rows[methods[0]].end_to_end, list[_Compared]()
    best = max(row.tokens_per_second for row in rows.values())
    for name in methods:
        row = rows[name]
        against = None if chain is None else gain(run.samples, name, chain)
        whole = f"{row.end_to_end / base:.2f}" if base else ""
        found.append(_Compared(row, gain(run.samples, name, methods[0]), against, whole, row.tokens_per_second == best))
    return found


def _overall(run: Run, chain: str | None) -> str:
    heads = ["method", "tokens", "accepted", "tokens a forward", "tokens/s", "x first", "x best chain", "end to end",
             "same ids"]  # fmt: skip
    lines = list[list[str]]()
    for one in _compared(run):
        row, mine = one.row, [s for s in run.samples if s.method == one.row.method and s.error is None]
        mean = sum(len(s.token_ids) for s in mine) / max(1, len(mine))
        lines.append([
            one.name(), f"{mean:.0f}", _share(row.acceptance_rate), _number(row.mean_accepted_length),
            f"{row.tokens_per_second:.1f}", _gain(one.first), _gain(one.chain), one.end_to_end,
            f"{row.same}/{row.samples}" + (f", {row.failures} failed" if row.failures else ""),
        ])  # fmt: skip
    note = f"\n\nThe best chain is {chain}." if chain is not None else ""
    return _table(heads, lines) + note


def _gains(groups: dict[str, list[Sample]], order: Sequence[str], methods: Sequence[str]) -> str:
    lines = [[name, *(_gain(gain(groups[group], name, methods[0])) for group in order)] for name in methods[1:]]
    return _table(["method", *order], lines)


def _lengths(run: Run, groups: dict[str, list[Sample]], order: Sequence[str], methods: Sequence[str]) -> str:
    lines = []
    for name in methods:
        cells = []
        for group in order:
            mine = [s.metrics for s in groups[group] if s.method == name and s.error is None]
            forwards = sum(m.get("target_forwards", 0) for m in mine)
            cells.append(f"{sum(m['new_tokens'] for m in mine) / forwards:.2f}" if forwards else "")
        lines.append([name, *cells])
    return _table(["method", *order], lines)


def _shares(run: Run, methods: Sequence[str]) -> str:
    lines = []
    for name in methods:
        mine = [s.metrics for s in run.samples if s.method == name and "verify_seconds" in s.metrics]
        spent = [sum(m[part] for m in mine) for part in ("draft_seconds", "verify_seconds", "accept_seconds")]
        forwards = sum(m["target_forwards"] for m in mine)
        if forwards:
            each = [f"{1e3 * seconds / forwards:.2f} ({seconds / sum(spent):.0%})" for seconds in spent]
            lines.append([name, *each])
    return _table(["method", "draft, ms a step", "verify", "accept"], lines) if lines else ""


def _table(heads: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    rule = ["---", *["---:"] * (len(heads) - 1)]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in (heads, rule, *lines))


def _gain(found: Gain | None) -> str:
    return "" if found is None or not math.isfinite(found.value) else str(found)


def _value(found: Gain | None) -> str:
    return "" if found is None else f"{found.value:.2f}"


def _share(value: float | None) -> str:
    return "" if value is None else f"{value:.0%}"


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.2f}"
