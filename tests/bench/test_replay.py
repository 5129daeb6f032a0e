"""A run under another cost of a forward."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from tests.bench.test_report import sample
from tokentree.bench.replay import replay
from tokentree.bench.results import Run, new_run
from tokentree.cli.main import app
from tokentree.errors import OptionError
from tokentree.shapes.curve import CostCurve

HERE = CostCurve([1, 8, 16], [0.1, 0.12, 0.2])


def recorded() -> Run:
    """Steps that took exactly what a forward costs under `HERE`, and 10 ms of drafting and accepting each."""
    run = new_run({"model": "some"})
    for place in range(3):
        plain = [(1, 1, 0.1)] * 60
        tree = [(8, 2, 0.13), (16, 4, 0.21), (8, 3, 0.13), (1, 1, 0.11)] * 6
        for method, steps, host in (("plain", plain, 0.0), ("merged:dynamic", tree, 0.01)):
            tokens, seconds = sum(step[1] for step in steps), sum(step[2] for step in steps)
            timed: dict[str, Any] = {
                "draft_seconds": 0.7 * host * len(steps),
                "accept_seconds": 0.3 * host * len(steps),
            }
            run.samples.append(sample(method, place, tokens, seconds, steps=steps, **timed))
    return run


def test_under_its_own_cost_a_run_takes_what_it_took() -> None:
    plain, tree = replay(recorded(), HERE)
    assert plain.predicted == pytest.approx(1)
    assert tree.tokens_per_forward == pytest.approx(2.5)
    assert tree.rows == pytest.approx(33 / 4)
    assert tree.measured == pytest.approx(10 * 0.1 / 0.58)
    assert tree.predicted == pytest.approx(tree.measured)


def test_where_rows_are_free_only_forwards_count() -> None:
    flat = CostCurve([1, 64], [0.02, 0.02])
    assert replay(recorded(), flat, drafting=0)[1].predicted == pytest.approx(2.5)
    assert replay(recorded(), flat)[1].predicted == pytest.approx(2.5 * 0.02 / 0.03)


def test_the_command_tells_it(tmp_path: Path) -> None:
    recorded().save(tmp_path / "run")
    (tmp_path / "curve.json").write_text(json.dumps({"rows": HERE.rows, "seconds": HERE.points}))
    args = ["simulate", str(tmp_path / "run"), "--curve", str(tmp_path / "curve.json")]
    told = json.loads(CliRunner().invoke(app, [*args, "--json"]).output)
    assert told[1]["predicted"] == pytest.approx(told[1]["measured"])
    assert "1.72" in CliRunner().invoke(app, args).output


def test_plain_is_what_speeds_are_compared_with_wherever_it_stands() -> None:
    run, again = recorded(), recorded()
    run.samples.reverse()
    tree, plain = replay(run, HERE)
    assert (tree.method, plain.method) == ("merged:dynamic", "plain")
    assert [plain, tree] == replay(again, HERE)


def test_without_plain_nothing_measured_is_compared_with_it(tmp_path: Path) -> None:
    run = recorded()
    for one in run.samples:
        one.method = {"plain": "default"}.get(one.method, one.method)
    found = replay(run, HERE)
    assert [one.measured for one in found] == [None, None]
    assert [one.predicted for one in found] == [one.predicted for one in replay(recorded(), HERE)]
    run.save(tmp_path / "run")
    (tmp_path / "curve.json").write_text(json.dumps({"rows": HERE.rows, "seconds": HERE.points}))
    args = ["simulate", str(tmp_path / "run"), "--curve", str(tmp_path / "curve.json")]
    assert json.loads(CliRunner().invoke(app, [*args, "--json"]).output)[0]["measured"] is None
    assert "no speed of the method plain" in CliRunner().invoke(app, args).output


def test_what_makes_no_sense_is_refused() -> None:
    with pytest.raises(OptionError, match="at least 0"):
        replay(recorded(), HERE, -1)
    with pytest.raises(OptionError, match="no steps"):
        replay(new_run({}), HERE)
