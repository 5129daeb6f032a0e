"""The formulas, against enumeration and simulation."""

from __future__ import annotations

import json
import math
from itertools import product
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from typer.testing import CliRunner

from tokentree.cli import main as cli
from tokentree.cli.main import app
from tokentree.errors import OptionError
from tokentree.theory import (
    expected,
    full_tree,
    rates_of,
    read_curve,
    simulated_tokens,
    taught_success,
    tokens_of_chain,
    tokens_of_tree,
    whole_path,
)

TREES = [full_tree(1, 4), full_tree(2, 3), full_tree(3, 2), [(0,), (1,), (0, 0), (0, 2), (0, 0, 1)]]


def enumerated(rates: list[float], paths: list[tuple[int, ...]]) -> tuple[float, float]:
    """Expected tokens, and the chance of reaching the deepest level, over all that the target may take."""
    nodes, deepest = set(paths), max(map(len, paths))
    chances = [*rates, 1 - sum(rates)]
    tokens = whole = 0.0
    for taken in product(range(len(chances)), repeat=deepest):
        chance, accepted = math.prod(chances[rank] for rank in taken), 0
        while accepted < deepest and taken[accepted] < len(rates) and taken[: accepted + 1] in nodes:
            accepted += 1
        tokens += chance * (1 + accepted)
        whole += chance * (accepted == deepest)
    return tokens, whole


@pytest.mark.parametrize("paths", TREES)
@pytest.mark.parametrize("rates", [[0.8], [0.8, 0.2], [0.5, 0.2, 0.1], [0.0, 0.4]])
def test_expected_tokens_are_those_of_all_cases(rates: list[float], paths: list[tuple[int, ...]]) -> None:
    assert tokens_of_tree(rates, paths) == pytest.approx(enumerated(rates, paths)[0])


@given(st.floats(0, 1), st.integers(1, 6))
def test_a_chain_is_a_tree_without_branches(alpha: float, length: int) -> None:
    chain = full_tree(1, length)
    assert tokens_of_chain(alpha, length) == pytest.approx(tokens_of_tree([alpha], chain))
    assert whole_path([alpha], 1, length) == pytest.approx(alpha**length)
    if alpha < 1:
        assert tokens_of_chain(alpha, length) == pytest.approx((1 - alpha ** (length + 1)) / (1 - alpha), rel=1e-6)


@pytest.mark.parametrize(("branching", "depth"), [(1, 3), (2, 2), (3, 2), (2, 4)])
def test_a_whole_path_is_as_probable_as_in_all_cases(branching: int, depth: int) -> None:
    rates = [0.5, 0.2, 0.1]
    assert whole_path(rates, branching, depth) == pytest.approx(enumerated(rates, full_tree(branching, depth))[1])


def test_what_is_taught_is_no_bound_in_either_direction() -> None:
    assert taught_success(0.8, 2, 1) == pytest.approx(0.96)
    assert whole_path([0.8, 0.2], 2, 1) == 1  # one of two candidates that exclude each other: above what is taught
    assert whole_path([0.8, 0.0], 2, 3) < taught_success(0.8, 2, 3)  # and below it
    assert taught_success(0.8, 1, 4) == pytest.approx(whole_path([0.8], 1, 4))


def test_the_documentation_s_figures_are_those_of_the_formulas() -> None:
    full, rates = full_tree(2, 3), rates_of(0.8, 2)
    assert len(full) == 14
    assert whole_path([0.8], 1, 4) == pytest.approx(0.410, abs=5e-4)
    assert tokens_of_chain(0.8, 4) == pytest.approx(3.36, abs=5e-3)
    assert whole_path(rates, 2, 3) == pytest.approx(0.885, abs=5e-4)
    assert whole_path([0.8, 0.05], 2, 3) == pytest.approx(0.614, abs=5e-4)
    assert tokens_of_tree(rates, full) == pytest.approx(3.77, abs=5e-3)
    assert taught_success(0.8, 2, 3) == pytest.approx(0.997, abs=5e-4)
    assert whole_path([0.8, 0.0], 2, 3) == pytest.approx(0.512)


def test_rates_of_alpha_leave_what_the_ones_before_leave() -> None:
    rates = rates_of(0.8, 3)
    assert rates == pytest.approx([0.8, 0.16, 0.032])
    assert sum(rates) == pytest.approx(1 - 0.2**3)


@pytest.mark.parametrize("paths", TREES)
def test_a_simulation_agrees(paths: list[tuple[int, ...]]) -> None:
    rates = [0.5, 0.2, 0.1]
    mean, error = simulated_tokens(rates, paths, 20_000, np.random.default_rng(0))
    assert 0 < error < 0.02
    assert abs(mean - tokens_of_tree(rates, paths)) < 4 * error
    assert simulated_tokens(rates, paths, 500, np.random.default_rng(1)) == simulated_tokens(
        rates, paths, 500, np.random.default_rng(1)
    )


def test_speed_ups_are_tokens_over_what_a_step_costs() -> None:
    cost = read_curve('{"rows": [1, 8, 16], "seconds": [0.01, 0.012, 0.02], "engine": "some"}')
    assert [cost.seconds(rows) for rows in (1, 8, 12, 16, 24)] == pytest.approx([0.01, 0.012, 0.016, 0.02, 0.028])
    found = expected([0.8, 0.1], 2, 3, cost, draft_cost=0.05)
    assert found.nodes == 14
    assert found.cost == pytest.approx(cost.seconds(15) / 0.01 + 0.15)
    assert found.speed_up == pytest.approx(tokens_of_tree([0.8, 0.1], full_tree(2, 3)) / found.cost)
    assert expected([0.8], 1, 3).cost == 1


def test_what_makes_no_sense_is_refused() -> None:
    for rates in ([], [0.8, 0.4], [-0.1]):
        with pytest.raises(OptionError, match="add up to 1"):
            tokens_of_tree(rates, [(0,)])
    with pytest.raises(OptionError, match="a million leaves"):
        expected([0.5], 10, 7)
    for wrong in (
        "nothing",
        '{"rows": [1]}',
        '{"rows": [4, 2], "seconds": [1, 2]}',
        '{"rows": [1, 2], "seconds": [0, 1]}',
    ):
        with pytest.raises(OptionError, match="cost curve"):
            read_curve(wrong)


def test_the_command_tells_it(tmp_path: Path) -> None:
    run = CliRunner().invoke
    shown = run(app, ["theory", "--alpha", "0.8", "--branching", "2", "--depth", "3", "--trials", "2000"])
    assert shown.exit_code == 0, shown.output
    assert "no bound" in shown.output
    curve = tmp_path / "curve.json"
    curve.write_text(json.dumps({"rows": [1, 16], "seconds": [0.01, 0.02], "engine": "some"}))
    args = ["theory", "--ranks", "0.6,0.2", "--depth", "2", "--curve", str(curve), "--json", "--trials", "2000"]
    told = json.loads(run(app, args).output)
    tree = told["expected"]["tree, 2 children, depth 2"]
    assert tree["tokens"] == pytest.approx(1 + 0.8 + 0.64)
    assert tree["cost"] == pytest.approx(1 + 6 / 15)
    assert tree["speed_up"] == pytest.approx(tree["tokens"] / tree["cost"])
    assert tree["simulated"][0] == pytest.approx(tree["tokens"], abs=0.1)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--alpha", "1.5"], "alpha is a probability"),
        (["--ranks", "much"], "--ranks takes numbers"),
        (["--branching", "0"], "at least 1"),
        (["--trials", "1"], "at least 2 trials"),
        (["--curve", "nowhere.json"], "can't read the cost curve"),
    ],
)
def test_bad_input_gets_a_sentence_and_status_2(
    options: list[str], message: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:  # fmt: skip
    monkeypatch.setattr("sys.argv", ["tokentree", "theory", *options])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert ended.value.code == 2
    told = capsys.readouterr().err
    assert message in told
    assert "Traceback" not in told
