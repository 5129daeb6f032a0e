"""A run as a page, `report.md`."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from tokentree.bench.figures import (
    FEW,
    Gain,
    acceptance,
    best_chain,
    by_category,
    by_task,
    gain,
    methods_of,
    prompts_of,
    short_names,
)
from tokentree.bench.markdown import block, code, plain, table
from tokentree.bench.report import Row, explained, number, summarise
from tokentree.bench.results import Run, Sample
from tokentree.cache import replacing
from tokentree.errors import OptionError


def page(run: Run, pictures: Sequence[Path] = ()) -> str:
    """The page, as Markdown; ``pictures`` are named beside it."""
    methods, chain, tasks, categories = methods_of(run), best_chain(run), by_task(run), by_category(run)
    parts = [f"# {plain(Path(str(run.settings.get('model'))).name)}", _where(run)]
    parts += ["## All prompts", _overall(run, chain)]
    parts += [f"![{picture.stem}]({picture.name})" for picture in pictures]
    if len(methods) > 1:
        told = f"Times the speed of {plain(methods[0])}, decoding, with 95% intervals:"
        parts += ["## By task", told, _gains(tasks, methods), _lengths(tasks, methods)]
        if len(categories) > len(tasks):  # else they are the same under other names
            parts += ["## By category", told, _gains(categories, methods)]
    parts += [_depths(run), _shares(run, methods)]
    return "\n\n".join(part for part in parts if part) + "\n"


def main_table(run: Run) -> str:
    """All prompts in one table, and what was measured where."""
    first = plain(methods_of(run)[0])
    shown = _compared(run, best_chain(run))
    lines = [
        [
            one.name, one.rate, _value(one.first), _value(one.chain),
            number(one.row.end_to_end), number(one.row.mean_accepted_length), one.row.ids,
        ]
        for one in shown
    ]  # fmt: skip
    settings, machine = run.settings, run.machine
    numbers = settings.get("quantization") or str(settings.get("dtype", "")).removeprefix("torch.")
    place = f"{machine.get('threads')} threads of {machine.get('processor')}"
    place += "" if machine.get("device") == "cpu" else f" and {machine.get('device')}"
    facts = Path(str(settings.get("model"))).stem, numbers, place, _extent(run), run.started[:10]
    told = ", ".join(plain(str(fact)) for fact in (*facts, f"commit {run.commit or 'unknown'}")) + ":"
    heads = ["method", "tokens/s", f"x {first}", "x best chain", f"end to end, x {first}", "tokens a forward",
             f"ids as {first}"]  # fmt: skip
    return f"{told}\n\n{table(heads, lines)}"


def insert(text: str, name: str, file: Path) -> None:
    """Puts ``text`` into a Markdown file, in place of what stands between ``<!-- name -->`` and ``<!-- /name -->``. All
    else, and the file where it can't be done, stays as it is.

    Raises:
        OptionError: if the file has no such place, or can't be read or written.
    """
    first, last = f"<!-- {name} -->", f"<!-- /{name} -->"
    try:
        target = file.resolve(strict=True)
        if not target.is_file():
            raise OptionError(f"can't put a table into {str(file)!r}: it is no file")
        content = target.read_bytes().decode("utf-8")
        before, found, rest = content.partition(first)
        _, ends, after = rest.partition(last)
        if not (found and ends):
            raise OptionError(f"{str(file)!r} has no {first} with {last} behind it")
        end = "\r\n" if "\r\n" in content else "\n"
        new = f"{before}{first}{end}{end}{end.join(text.splitlines())}{end}{end}{last}{after}"
        with replacing(target) as part:
            part.write_bytes(new.encode("utf-8"))
            shutil.copymode(target, part)
    except (OSError, UnicodeDecodeError, RuntimeError):  # the last where links go in a circle
        raise OptionError(f"can't put a table into {str(file)!r}: it can't be read or written") from None


def _extent(run: Run) -> str:
    """How many turns of how many prompts it has."""
    turns, prompts = len({sample.place for sample in run.samples}), prompts_of(run.samples)
    return f"{turns} {'turn' if turns == 1 else 'turns'} of {prompts} {'prompt' if prompts == 1 else 'prompts'}"


def _where(run: Run) -> str:
    machine, settings, sampling = run.machine, run.settings, run.settings.get("sampling")
    sampling = sampling if isinstance(sampling, dict) else {}
    numbers = ", ".join(f"{name} {version}" for name, version in run.versions.items())
    kind = str(settings.get("dtype", "unknown numbers")).removeprefix("torch.")
    kind += f", {settings['quantization']}" if settings.get("quantization") else ""
    most, temperature = (sampling.get(name, "unknown") for name in ("max_tokens", "temperature"))
    lines = [
        f"{run.started[:10]}, commit {run.commit or 'unknown'}",
        f"{machine.get('processor')}, {machine.get('cores')} cores, {machine.get('threads')} threads, "
        f"{machine.get('device')}; {numbers}",
        f"{kind}, at most {most} tokens, temperature {temperature}",
        f"{_extent(run)}, methods interleaved on each",
    ]
    if run.memory_mb:
        lines.append(f"at most {run.memory_mb:.0f} MB resident, all methods in one process")
    return "\n".join([*(f"- {plain(line)}" for line in lines), "", block(run.command)])


@dataclass(frozen=True)
class _Compared:
    """A method beside the others.

    Args:
        row: its figures.
        name: as the table has it; that of the fastest is bold.
        first, chain: its gain over the first method, and over the best chain.
    """

    row: Row
    name: str
    first: Gain | None
    chain: Gain | None

    @property
    def rate(self) -> str:
        return number(self.row.tokens_per_second if self.row.samples else None, 1)


def _compared(run: Run, chain: str | None) -> list[_Compared]:
    """All methods, in the order of the run."""
    rows, names = summarise(run), short_names(methods_of(run))
    best = max(row.tokens_per_second for row in rows)
    found = list[_Compared]()
    for row in rows:
        name = code(names[row.method])
        name = f"**{name}**" if row.tokens_per_second == best > 0 else name
        against = None if chain is None else gain(run.samples, row.method, chain)
        found.append(_Compared(row, name, gain(run.samples, row.method, rows[0].method), against))
    return found


def _overall(run: Run, chain: str | None) -> str:
    names = short_names(methods_of(run))
    first = plain(names[methods_of(run)[0]])
    heads = ["method", "tokens", "accepted", "tokens a forward", "tokens/s", f"x {first}", "x best chain",
             f"end to end, x {first}", f"ids as {first}"]  # fmt: skip
    lines = list[list[str]]()
    for one in _compared(run, chain):
        row, mine = one.row, [s for s in run.samples if s.method == one.row.method and s.error is None]
        mean = sum(len(s.token_ids) for s in mine) / len(mine) if mine else None
        ids = ", ".join(part for part in (row.ids, f"{row.failures} failed" if row.failures else "") if part)
        lines.append([
            one.name, number(mean, 0), _share(row.acceptance_rate), number(row.mean_accepted_length),
            one.rate, _gain(one.first), _gain(one.chain), number(row.end_to_end), ids,
        ])  # fmt: skip
    prompts = prompts_of(run.samples)
    failed = len({sample.place for sample in run.samples if sample.error is not None})
    notes = ["1 prompt, no interval." if prompts == 1 else f"In brackets: 95% intervals over {prompts} prompts."]
    notes += [explained(first)]
    if failed:
        told = f"Turns that a method failed on ({failed}) count for none, but x {first} counts all that a method and"
        notes.append(f"{told} {first} both finished.")
    notes += [] if chain is None else [f"The best chain is {code(names[chain])}."]
    return "\n\n".join([table(heads, lines), *notes])


def _heads(groups: dict[str, list[Sample]]) -> list[str]:
    return ["method", *(f"{plain(name)} ({prompts_of(samples)})" for name, samples in groups.items())]


def _gains(groups: dict[str, list[Sample]], methods: Sequence[str]) -> str:
    names = short_names(methods)
    lines = [
        [code(names[name]), *(_gain(gain(samples, name, methods[0])) for samples in groups.values())]
        for name in methods[1:]
    ]
    alone = any(prompts_of(samples) == 1 for samples in groups.values())
    note = "In brackets beside a name: how many prompts." + (" Of 1 prompt there is no interval." if alone else "")
    return f"{table(_heads(groups), lines)}\n\n{note}" if lines else ""


def _lengths(groups: dict[str, list[Sample]], methods: Sequence[str]) -> str:
    lines, names = list[list[str]](), short_names(methods)
    for name in methods:
        cells = []
        for samples in groups.values():
            mine = [s.metrics for s in samples if s.method == name and s.error is None and "new_tokens" in s.metrics]
            forwards = sum(m.get("target_forwards", 0) for m in mine)
            cells.append(f"{sum(m['new_tokens'] for m in mine) / forwards:.2f}" if forwards else "")
        if any(cells):
            lines.append([code(names[name]), *cells])
    return f"Tokens per forward:\n\n{table(_heads(groups), lines)}" if lines else ""


def _depths(run: Run) -> str:
    """How often candidates were accepted, by depth."""
    found, names = acceptance(run), short_names(methods_of(run))
    if not found:
        return ""
    deepest = max(depth for points in found.values() for depth, _ in points)
    lines = [
        [code(names[name]), *(_share(dict(points).get(depth)) for depth in range(1, deepest + 1))]
        for name, points in found.items()
    ]
    note = (
        "Of the steps whose tree was so deep, the share in which a node at that depth was accepted. So a row falls "
        "even where each guess is as good as the one before: 'accepted' above is the share of single guesses, and "
        f"counts a step that ends at a leaf as no refusal. Depths with fewer than {FEW} steps are left out."
    )
    heads = ["method", *(f"depth {depth}" for depth in range(1, deepest + 1))]
    return "\n\n".join(["## Acceptance by depth", table(heads, lines), note])


def _shares(run: Run, methods: Sequence[str]) -> str:
    lines, names = list[list[str]](), short_names(methods)
    parts = ("draft_seconds", "verify_seconds", "accept_seconds")
    for name in methods:
        known = {*parts, "target_forwards"}
        mine = [s.metrics for s in run.samples if s.method == name and known <= set(s.metrics)]
        spent = [sum(m[part] for m in mine) for part in parts]
        forwards = sum(m["target_forwards"] for m in mine)
        if forwards and sum(spent):
            each = [f"{1e3 * seconds / forwards:.2f} ({seconds / sum(spent):.0%})" for seconds in spent]
            lines.append([code(names[name]), *each])
    if not lines:
        return ""
    heads = ["method", "draft, ms a forward", "verify, ms a forward", "accept, ms a forward"]
    return f"## Where the time goes\n\n{table(heads, lines)}"


def _gain(found: Gain | None) -> str:
    return "" if found is None else str(found)


def _value(found: Gain | None) -> str:
    return number(None if found is None else found.value)


def _share(value: float | None) -> str:
    return "" if value is None else f"{value:.0%}"
