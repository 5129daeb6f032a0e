"""What a run leaves behind: written whole, read with care, and never a figure out of what makes no sense."""

from __future__ import annotations

import copy
import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.bench.test_report import some_run
from tokentree.bench.figures import acceptance
from tokentree.bench.page import main_table, page
from tokentree.bench.replay import replay
from tokentree.bench.report import summarise, table
from tokentree.bench.results import Run, Sample
from tokentree.errors import OptionError
from tokentree.shapes.curve import CostCurve

CURVE = CostCurve([1, 8], [0.1, 0.2])
ODD = [None, -1, 0, float("nan"), float("inf"), 10**400, 1e300, 2**62, "x", "\u2028", [], [-1], {}, {"a": 1}, True]


def with_steps() -> Run:
    run = some_run()
    for one in run.samples:
        one.metrics["steps"] = [(4, 2, 0.1)] * 5
    return run


def use(run: Run) -> None:
    """Everything that is made of a run."""
    table(run)
    acceptance(run)
    if run.samples:
        for row in summarise(run, cut_loops=True):
            assert row.speed_up is None or row.speed_up >= 0
        page(run)
        main_table(run)
    replay(run, CURVE)


def test_a_run_comes_back_as_it_was_written(tmp_path: Path) -> None:
    run = with_steps()
    assert run.save(tmp_path / "new" / "folder") == tmp_path / "new" / "folder" / "results.json"
    assert Run.load(tmp_path / "new" / "folder") == run
    use(run)
    run.save(tmp_path / "new" / "folder")
    assert [file.name for file in (tmp_path / "new" / "folder").iterdir()] == ["results.json"]


def damaged(text: str, generator: random.Random) -> bytes:
    """``text`` cut short, with bytes changed, or with something else in one place of what it says."""
    kind, content = generator.randrange(3), bytearray(text.encode())
    if kind == 0:
        return bytes(content[: generator.randrange(len(content))])
    if kind == 1:
        for _ in range(generator.randint(1, 4)):
            content[generator.randrange(len(content))] = generator.randrange(256)
        return bytes(content)
    said = json.loads(text)
    where = said
    while True:
        key = generator.choice(list(where) if isinstance(where, dict) else range(len(where)))
        if not (isinstance(where[key], dict | list) and where[key]) or generator.random() < 0.1:
            break
        where = where[key]
    if isinstance(where, dict) and generator.random() < 0.3:
        del where[key]
    else:
        where[key] = copy.deepcopy(generator.choice(ODD))
    return json.dumps(said).encode()


def test_a_damaged_file_is_refused_or_read_without_a_crash(tmp_path: Path) -> None:
    generator, read, refused = random.Random(0), 0, list[str]()
    run = with_steps()
    run.samples = run.samples[:6]
    for one in run.samples:
        one.token_ids = one.token_ids[:5]
        one.metrics["steps"] = one.metrics["steps"][:2]
    text = run.save(tmp_path).read_text()
    for _ in range(400):
        (tmp_path / "results.json").write_bytes(damaged(text, generator))
        try:
            use(Run.load(tmp_path))
            read += 1
        except OptionError as error:
            refused.append(str(error))
    assert min(read, len(refused)) > 20  # both happen
    assert not any("\n" in told for told in refused)


def set_to(*path: Any) -> Callable[[dict[str, Any]], None]:
    def change(said: dict[str, Any]) -> None:
        *way, last, value = path
        where: Any = said
        for key in way:
            where = where[key]
        where[last] = value

    return change


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (set_to("samples", 0, "decode_seconds", float("nan")), "samples.0.decode_seconds"),
        (set_to("samples", 0, "decode_seconds", float("inf")), "samples.0.decode_seconds"),
        (set_to("samples", 0, "decode_seconds", -1.0), "samples.0.decode_seconds"),
        (set_to("samples", 0, "decoded_tokens", -1), "samples.0.decoded_tokens"),
        (set_to("samples", 0, "token_ids", [-1]), "samples.0.token_ids.0"),
        (set_to("samples", 0, "metrics", "target_forwards", 1.5), "samples.0.metrics.target_forwards"),
        (set_to("samples", 0, "metrics", "verify_seconds", float("nan")), "samples.0.metrics.verify_seconds"),
        (set_to("samples", 0, "metrics", "steps", [[2**40, 1, 0.1]]), "samples.0.metrics.steps.0.0"),
        (set_to("samples", 0, "metrics", "steps", [[1, 0, 0.1]]), "samples.0.metrics.steps.0.1"),
        (set_to("samples", 2, "metrics", "accepted_by_depth", [60, 10]), "doesn't fit offered_by_depth"),
        (set_to("samples", 2, "metrics", "offered_by_depth", [50]), "doesn't fit offered_by_depth"),
        (set_to("memory_mb", float("nan")), "memory_mb"),
    ],
)
def test_what_makes_no_sense_is_named(tmp_path: Path, change: Callable[[dict[str, Any]], None], named: str) -> None:
    said = json.loads(with_steps().save(tmp_path).read_text())
    change(said)
    (tmp_path / "results.json").write_text(json.dumps(said))
    with pytest.raises(OptionError, match=r"there is no run in .*results\.json'") as told:
        Run.load(tmp_path)
    assert named in str(told.value)


def test_fields_that_are_not_read_are_kept(tmp_path: Path) -> None:
    run = some_run()
    run.samples[0].metrics["mean_accepted_length"] = 2.5
    run.samples[0].metrics["own"] = {"a": [1]}
    run.save(tmp_path)
    assert Run.load(tmp_path) == run


def test_arguments_that_are_no_utf8_leave_a_run_that_can_be_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from tokentree.bench.results import new_run

    monkeypatch.setattr("sys.argv", ["tokentree", "bench", "a b", "\udcff.jsonl"])
    run = new_run({"prompts": ["\udcff.jsonl"], "model": "m"})
    run.save(tmp_path)
    assert Run.load(tmp_path) == run
    assert run.command == r"tokentree bench 'a b' '\udcff.jsonl'"
    assert run.settings["prompts"] == [r"\udcff.jsonl"]


def test_a_speed_is_compared_with_one_that_was_measured() -> None:
    run = with_steps()
    for one in run.samples:
        if one.method == "plain":
            one.decoded_tokens = 0
    assert {one.measured for one in replay(run, CURVE)} == {None}
    for drafting in (float("nan"), float("inf"), -1.0):
        with pytest.raises(OptionError, match="at least 0"):
            replay(with_steps(), CURVE, drafting)


def test_metrics_that_lack_a_part_give_no_figure() -> None:
    run = some_run()
    for one in run.samples:
        one.metrics = Sample.model_validate(one.model_dump() | {"metrics": {"drafted_tokens": 4}}).metrics
    row = summarise(run)[1]
    assert (row.rows, row.acceptance_rate, row.mean_accepted_length) == (None, None, None)
    assert "Where the time goes" not in page(run)
    assert "Tokens per forward" not in page(run)
