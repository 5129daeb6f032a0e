"""The command `plan`: what it prints, and what it refuses."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.cli.test_cli import Command, run  # noqa: F401  a fixture
from tokentree.planning.figures import TARGETS, Target
from tokentree.planning.load import rate_name, rate_of

CURVE: dict[str, Any] = {
    "engine": "a model", "rows": [1, 16, 64], "seconds": [0.010, 0.011, 0.040], "prompt_rows": [256],
    "prompt_seconds": [0.160], "drafting_seconds": 0.0002, "step_seconds": 0.0001, "by_rank": [0.6, 0.1],
}  # fmt: skip
SMALL = ("--measured", "20", "--prompt-tokens", "20", "--output-tokens", "12")


@pytest.fixture
def curve(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "200")
    file = tmp_path / "curve.json"
    file.write_text(json.dumps(CURVE))
    return file


def _found(run: Command, *words: str) -> Any:  # noqa: F811
    code, out, err = run("plan", "--curve", "curve.json", *SMALL, *words, "--json")
    assert (code, err) == (0, "")
    return json.loads(out)


def test_loads_have_a_row_each_with_both_methods(run: Command, curve: Path) -> None:  # noqa: F811
    code, out, err = run("plan", "--curve", str(curve), *SMALL, "--requests", "1,120/min", "--replicas", "1,2")
    assert (code, err) == (0, "")
    rows = [line for line in out.splitlines() if line.startswith("│")]
    shown = [(row.split()[1], row.split()[3]) for row in rows]
    assert shown == [("1/s", "1"), ("1/s", "2"), ("120/min", "1"), ("120/min", "2")]
    assert "speculation: first token" in out
    assert "Simulated" in out


def test_without_a_load_the_table_ends_where_more_replicas_help_nobody(run: Command, curve: Path) -> None:  # noqa: F811
    found = [(one["load"], one["replicas"]) for one in _found(run)["loads"] if one["method"] == "plain"]
    assert dict(found).keys() == {"1e3/day", "1e4/day", "1e5/day", "1e6/day"}
    assert found[:2] == [("1e3/day", 1), ("1e3/day", 2)]
    most = dict(found)["1e6/day"]
    assert 4 <= most < 64
    given = _found(run, "--requests", "1e3/day", "--replicas", "1,2,3")["loads"]
    assert [one["replicas"] for one in given if one["method"] == "plain"] == [1, 2, 3]


def test_speculation_gives_a_lone_client_more_tokens(run: Command, curve: Path) -> None:  # noqa: F811
    found = _found(run, "--clients", "1,4")["loads"]
    assert [(one["load"], one["method"]) for one in found] == [
        ("1 client", "plain"), ("1 client", "speculation"), ("4 clients", "plain"), ("4 clients", "speculation"),
    ]  # fmt: skip
    plain, tree, more, _ = found
    assert plain["tokens_a_second"] == pytest.approx(12 / (12 * 0.0101 + 0.012), rel=0.05)
    assert tree["tokens_a_second"] > 1.3 * plain["tokens_a_second"]
    assert more["tokens_a_second"] > 3 * plain["tokens_a_second"]
    assert (plain["gap_p95"], plain["texts"]) == (pytest.approx(0.0101), 1.0)
    assert found == _found(run, "--clients", "1,4")["loads"]
    assert found != _found(run, "--clients", "1,4", "--seed", "1")["loads"]


def test_a_trace_is_a_load_and_a_sample(run: Command, curve: Path) -> None:  # noqa: F811
    lines = [{"seconds": place / 10, "prompt_tokens": 9, "output_tokens": 4 + place} for place in range(5)]
    (curve.parent / "trace.jsonl").write_text("\n".join(json.dumps(line) for line in lines) + "\n\n")
    found = _found(run, "--requests", "trace.jsonl", "--sample", "trace.jsonl")["loads"]
    assert [one["requests"] for one in found] == [5, 5]
    assert found[0]["load"] == "trace.jsonl"
    assert _found(run, "--clients", "2", "--sample", "trace.jsonl")["loads"][0]["requests"] == 20


def test_replicas_are_found_for_targets(run: Command, curve: Path) -> None:  # noqa: F811
    words = ("--requests", "200/s", "--max-batch", "4", "--target")
    needed = _found(run, *words, "p95-first-token=100ms", "--target", "p95-gap=0.03")["needed"]
    assert [one["method"] for one in needed] == ["plain", "speculation"]
    for one in needed:
        figures = one["figures"]
        assert figures["first_token_p95"] <= 0.1
        assert figures["gap_p95"] <= 0.03
        fewer = _found(run, "--requests", "200/s", "--max-batch", "4", "--replicas", str(figures["replicas"] - 1))
        before = next(other for other in fewer["loads"] if other["method"] == one["method"])
        assert before["overloaded"] or before["first_token_p95"] > 0.1 or before["gap_p95"] > 0.03
    (impossible, _) = _found(run, *words, "p95-gap=1ms")["needed"]
    assert impossible["figures"] is None
    assert "can't be met" in run("plan", "--curve", str(curve), *SMALL, *words, "p95-gap=1ms")[1]


def test_the_load_under_which_speculation_stops_paying_is_found(run: Command, curve: Path) -> None:  # noqa: F811
    steep = {"rows": [1, 4, 64], "seconds": [0.010, 0.0101, 0.40]}  # a row costs nothing up to four
    curve.write_text(json.dumps(CURVE | steep))
    found = _found(run, "--break-even", "--max-batch", "16")
    assert found["loads"] == []
    assert [one["load"].split()[0] for one in found["by_texts"][::2]] == ["1", "2", "4", "8", "16"]
    assert found["stops_paying"]["load"] in ("4 clients", "8 clients")
    out = run("plan", "--curve", str(curve), *SMALL, "--break-even", "--max-batch", "16")[1]
    assert f"speculation stops paying at {found['stops_paying']['load']}" in out
    curve.write_text(json.dumps(CURVE))
    assert _found(run, "--break-even", "--max-batch", "2")["stops_paying"] is None


def test_what_wasn_t_recorded_is_told(run: Command, curve: Path) -> None:  # noqa: F811
    curve.write_text(json.dumps({"rows": [1, 64], "seconds": [0.01, 0.02]}))
    out = run("plan", "--curve", str(curve), *SMALL, "--clients", "1")[1]
    assert "No time of prompts was recorded" in out
    assert "decoding is plain" in out
    (curve.parent / "other.json").write_text(json.dumps(CURVE))
    out = run("plan", "--curve", str(curve), *SMALL, "--clients", "1", "--acceptance", "other.json")[1]
    assert "speculation: gap" in out


def test_other_times_beside_forwards_may_be_given(run: Command, curve: Path) -> None:  # noqa: F811
    plain = _found(run, "--clients", "2", "--step-ms", "5", "--text-ms", "2")["loads"][0]
    assert plain["gap_p50"] == pytest.approx(0.01 + 0.001 / 15 + 0.007, rel=0.001)


WRONG = [
    ("--requests none", "or a trace, not 'none'"),
    ("--requests 0", "more than 0 and at most"),
    ("--requests 1/fortnight", "or a trace"),
    ("--requests 1 --clients 1", "give one of them"),
    ("--requests curve.json", "line 1 of 'curve.json' is no request"),
    ("--sample empty", "has no requests"),
    ("--clients x", "--clients takes whole numbers"),
    ("--clients 0", "clients"),
    ("--clients 1 --replicas 0", "replicas"),
    ("--clients 1 --replicas 1,", "--replicas takes whole numbers"),
    ("--clients 1 --prompt-tokens 0", "1 to"),
    ("--clients 1 --turnaround -1", "at least 0 seconds"),
    ("--clients 1 --routing best", "--routing is one of in-turns, least-busy, prefix"),
    ("--clients 1 --shape zz", "is not a shape"),
    ("--clients 1 --target p99-gap=1", "is no target"),
    ("--clients 1 --target p95-gap=0", "more than 0 seconds"),
    ("--target p95-gap=1", "--target is about a load"),
    ("--clients 1 --acceptance plain.json", "has no runs, no rates and no by_rank"),
    ("--break-even --curve plain.json", "no acceptance is known"),
    ("--curve none", "can't read the cost curve 'none'"),
    ("--curve empty", "isn't what 'calibrate --json' prints"),
    ("--step-ms -1", "'--step-ms'"),
    ("--clients 1 --text-ms inf", "at least 0 milliseconds"),
    ("--clients 1 --turnaround nan", "at least 0 seconds"),
    ("--break-even --max-batch 100001", "1 to 100,000 clients"),
]


@pytest.mark.parametrize(("words", "says"), WRONG)
def test_a_mistake_is_one_sentence(run: Command, curve: Path, words: str, says: str) -> None:  # noqa: F811
    (curve.parent / "empty").write_text("")
    (curve.parent / "plain.json").write_text('{"rows": [1, 2], "seconds": [1, 2]}')
    code, out, err = run("plan", "--curve", "curve.json", *words.split())
    assert (code, out) == (2, "")
    assert says in err
    assert err.count("\n") == 1


def test_rates_are_read_and_written_as_people_say_them() -> None:
    assert [rate_of(text) for text in ("2", "1.5/s", "60/min", "7200/hour", "1e6/day", "x", "-1", "1/x")] == [
        2.0, 1.5, 1.0, 2.0, pytest.approx(11.574, rel=1e-3), None, None, None,
    ]  # fmt: skip
    for text in ("2.5/s", "20/min", "10/day"):
        rate = rate_of(text)
        assert rate is not None
        assert rate_name(rate) == text


@pytest.mark.parametrize("name", TARGETS)
def test_targets_are_in_seconds_or_milliseconds(name: str) -> None:
    assert Target.of(f"{name}=0.05") == Target.of(f"{name}=50ms") == Target(name, 0.05)
