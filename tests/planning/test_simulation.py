"""Loads on replicas, against schedules that were worked out by hand, and against what must hold."""

from __future__ import annotations

from collections.abc import Sequence as SequenceOf
from dataclasses import replace

import numpy as np
import pytest

from tokentree.errors import OptionError
from tokentree.planning.figures import Figures
from tokentree.planning.load import Asked, Clients, Lengths, Line, Load, Random, Trace
from tokentree.planning.recorded import Recorded
from tokentree.planning.replica import AHEAD, ROUTERS, Replica, Setup, by_prefix
from tokentree.planning.simulation import Outcome, Simulation, Window
from tokentree.planning.timing import Beside, Timing
from tokentree.shapes import CostCurve

FLAT = CostCurve([1, 64], [1.0, 1.0])
LINEAR = CostCurve([1, 64], [0.001, 0.064])  # a millisecond a row
PLAIN = Setup(Timing(FLAT))


def _speculating(by_rank: list[float], curve: CostCurve, shape: str = "chain:3", drafting: float = 0.0) -> Setup:
    known = Recorded(rows=[1, 2], seconds=[1, 1], by_rank=by_rank)
    return Setup(Timing(curve, Beside(drafting)), known.acceptance(), shape)


def _run(
    setup: Setup, load: Load, measured: int, replicas: int = 1, warm: int = 0, routing: str = "least-busy",
    seed: int = 0,
) -> Outcome:  # fmt: skip
    generator = np.random.default_rng(seed)
    return Simulation(setup, replicas, load, Window(warm, measured), generator, ROUTERS[routing]).run()


def _trace(*asked: tuple[float, int, int]) -> Trace:
    return Trace([Line(seconds=s, prompt_tokens=prompt, output_tokens=output) for s, prompt, output in asked])


def _clients(count: int, prompt: int, output: int) -> Clients:
    return Clients(count, Lengths.of([prompt], [output]), np.random.default_rng(0))


def _rounded(values: SequenceOf[float]) -> list[float]:
    return [round(value, 6) for value in values]


def test_a_client_without_speculation_waits_for_its_forwards_alone() -> None:
    found = _run(replace(PLAIN, timing=Timing(LINEAR, step=Beside(0.5, 9.0))), _clients(1, 101, 3), 2)
    read, step = 0.100, 0.001  # a step that decodes nobody else reads 100 tokens at once
    assert _rounded(found.first) == [read + step + 2 * 0.5] * 2
    assert _rounded(found.gaps) == [step + 0.5] * 4
    assert _rounded(found.whole) == [read + 3 * step + 4 * 0.5] * 2


def test_clients_that_share_a_round_take_its_requests_in_their_order_and_wait_for_the_last() -> None:
    lengths = Lengths([Line(prompt_tokens=1, output_tokens=count) for count in (1, 5, 2, 3)])
    load = Clients(2, lengths, np.random.default_rng(0), in_round=3)
    found = _run(PLAIN, load, 6, warm=3)
    # rounds of 1, 5, 2; 3, 1, 5; 2, 3, 1: two begin, and the first to end goes on with the third
    assert found.end - found.begin == 6 + 3


def test_texts_share_forwards_and_each_further_one_adds_its_time() -> None:
    timing = Timing(CostCurve([1, 64], [1.0, 1.0], per_sequence=0.25), step=Beside(0.5, 0.125))
    found = _run(Setup(timing), _clients(3, 1, 4), 3)
    assert _rounded(found.gaps) == [1.0 + 2 * 0.25 + 0.5 + 2 * 0.125] * 9


def test_requests_that_are_served_one_by_one_wait_as_worked_out_by_hand() -> None:
    one_by_one = replace(PLAIN, max_batch=1)
    found = _run(one_by_one, _trace((5.0, 1, 1), (5.25, 1, 1), (5.5, 1, 2), (9.0, 1, 1), (11.5, 1, 1)), 5)
    #              runs from   0 to 1      1 to 2        2 to 4        4 to 5       6.5 to 7.5
    assert _rounded(found.first) == [1.0, 1.75, 2.5, 1.0, 1.0]
    assert _rounded(found.whole) == [1.0, 1.75, 3.5, 1.0, 1.0]


def test_random_arrivals_wait_as_queues_with_one_server_and_equal_times_do() -> None:
    """M/D/1: at half of what the server can do, the mean wait is half of the time of service."""
    load = Random(0.5, Lengths.of([1], [1]), np.random.default_rng(1))
    found = _run(replace(PLAIN, max_batch=1), load, 4000, warm=200)
    assert np.mean(found.first) == pytest.approx(1.5, rel=0.06)
    assert found.tokens / (found.end - found.begin) == pytest.approx(0.5, rel=0.05)
    assert not found.overloaded


def test_more_requests_than_a_server_can_do_are_told() -> None:
    load = Random(2.0, Lengths.of([1], [1]), np.random.default_rng(0))
    found = _run(replace(PLAIN, max_batch=1), load, 200)
    assert found.overloaded
    figures = Figures.of(found, load.name, 1, "plain")
    assert figures.first_token_p95 is None
    assert figures.tokens_a_second == pytest.approx(1.0, rel=0.02)


def test_a_request_that_comes_within_a_step_joins_the_next_one() -> None:
    found = _run(PLAIN, _trace((0.0, 1, 3), (0.25, 1, 3)), 2)
    assert _rounded(found.first) == [1.0, 1.75]
    assert _rounded(found.whole) == [3.0, 3.75]


def test_sure_candidates_give_whole_chains() -> None:
    found = _run(_speculating([1.0], FLAT, drafting=0.5), _clients(1, 1, 8), 1)
    assert _rounded(found.whole) == [3.0]  # 4 tokens, and 4 tokens
    assert (found.forwards, found.all_tokens) == (2, 8)


def test_a_chain_has_as_many_tokens_a_forward_as_the_theory_says() -> None:
    found = _run(_speculating([0.7], FLAT), _clients(1, 1, 2000), 1)
    assert found.all_tokens / found.texts == pytest.approx(1 + 0.7 + 0.7**2 + 0.7**3, rel=0.05)


def test_candidates_that_are_never_right_make_it_slower() -> None:
    plain, wrong = (_run(setup, _clients(1, 1, 20), 1) for setup in (
        replace(PLAIN, timing=Timing(LINEAR)), _speculating([0.0, 0.0], LINEAR, drafting=0.001)
    ))  # fmt: skip
    assert wrong.forwards == plain.forwards == 20
    none = replace(_speculating([1e-9], LINEAR, drafting=0.001))
    assert _run(none, _clients(1, 1, 20), 1).whole[0] > 3 * plain.whole[0]


def test_the_cost_shape_learns_from_drawn_drafts() -> None:
    """It is the real one: where a row costs as much as a token brings, it stops asking for drafts."""
    steep, flat = CostCurve([1, 64], [0.001, 0.064]), CostCurve([1, 64], [0.001, 0.00101])
    plain = 300 * 0.001
    assert _run(_speculating([0.6], steep, "cost", 1e-4), _clients(1, 1, 300), 1).whole[0] < 1.06 * plain
    assert _run(_speculating([0.6], flat, "cost", 1e-5), _clients(1, 1, 300), 1).whole[0] < plain / 2


def test_the_same_seed_gives_the_same_and_another_one_another() -> None:
    setup = _speculating([0.5, 0.2], CostCurve([1, 64], [0.010, 0.012]), "cost")
    first, again, other = (_run(setup, _clients(3, 40, 30), 9, seed=seed) for seed in (0, 0, 1))
    assert first == again
    assert first.whole != other.whole


@pytest.mark.parametrize("routing", ROUTERS)
def test_more_replicas_are_never_worse(routing: str) -> None:
    asked = np.random.default_rng(0)
    lines = sorted((float(asked.uniform(0, 60)), 1, int(asked.integers(1, 9))) for _ in range(60))
    means = [
        float(np.mean(_run(replace(PLAIN, max_batch=1), _trace(*lines), 60, count, routing=routing).whole))
        for count in (1, 2, 4, 8, 64)
    ]
    assert means == sorted(means, reverse=True)
    assert means[-1] < means[0] / 3
    if routing != "in-turns":
        assert means[-1] == pytest.approx(sum(line[2] for line in lines) / 60)


def test_a_request_goes_to_the_replica_with_the_fewest() -> None:
    load = _trace((0.0, 1, 9), (0.1, 1, 2), (2.5, 1, 1), (2.5, 1, 1), (2.5, 1, 1))
    least, turns = (_run(replace(PLAIN, max_batch=1), load, 5, 2, routing=name) for name in ("least-busy", "in-turns"))
    assert sorted(_rounded(least.whole)) == [1.0, 2.0, 2.0, 7.5, 9.0]  # one of the three comes behind the longest
    assert sorted(_rounded(turns.whole)) == [1.0, 2.0, 7.5, 8.5, 9.0]  # in turns, two of them do


def test_texts_wait_for_no_more_rows_of_a_prompt_than_the_scheduler_allows() -> None:
    load = _trace((0.0, 1, 300), (0.05, 2000, 1), (0.06, 900, 1))
    for rows in (16, 64):
        found = _run(Setup(Timing(LINEAR), prefill_rows=rows), load, 3)
        assert max(found.gaps) == pytest.approx(0.001 * (rows + 1), abs=0.0011)


def test_a_prompt_that_comes_again_is_read_once() -> None:
    line = Line(prompt_tokens=1001, output_tokens=1, prompt="a")
    load = Trace(
        [line, line.model_copy(update={"seconds": 5.0}), line.model_copy(update={"seconds": 9, "prompt": "b"})]
    )
    found = _run(Setup(Timing(LINEAR)), load, 3)
    assert _rounded(found.first) == [1.001, 0.001, 1.001]
    forgetful = _run(Setup(Timing(LINEAR), kept_tokens=900), load, 3)
    assert _rounded(forgetful.first) == [1.001] * 3


def test_a_prompt_goes_to_the_replica_that_has_its_kv() -> None:
    """Two prompts come together, now the one first, now the other."""
    lines = [
        Line(seconds=pair + 0.01 * place, prompt_tokens=101, output_tokens=1, prompt="ab"[(pair + place) % 2])
        for pair in range(6)
        for place in range(2)
    ]
    found = {name: _run(Setup(Timing(LINEAR)), Trace(lines), 12, 2, routing=name) for name in ROUTERS}
    read = {name: sum(first > 0.05 for first in one.first) for name, one in found.items()}
    assert read == {"prefix": 2, "least-busy": 4, "in-turns": 4}


def test_a_replica_with_a_prompt_s_kv_is_left_where_it_has_far_more_to_do() -> None:
    knowing, other = (Replica(PLAIN, np.random.default_rng(0)) for _ in range(2))
    asked = Asked(0.0, 40, 4, prompt=7, number=0)
    knowing.add(asked)
    while not knowing.idle:
        knowing.step()
    for count in range(AHEAD + 2):
        knowing.asked = dict.fromkeys(range(count), asked)
        assert by_prefix(asked, [other, knowing]) is (knowing if count <= AHEAD else other)


def test_memory_for_one_text_serves_one_after_another() -> None:
    load = [_trace((0.0, 40, 8), (0.0, 40, 8)) for _ in range(2)]
    much, little = (_run(replace(PLAIN, kv_tokens=kv), one, 2) for kv, one in zip((None, 60), load, strict=True))
    assert _rounded(much.whole) == [9.0, 9.0]
    assert _rounded(little.whole) == [9.0, 18.0]


@pytest.mark.parametrize(
    ("made", "says"),
    [
        (lambda: Setup(Timing(FLAT), max_batch=0), "max_batch=0"),
        (lambda: Setup(Timing(FLAT), kv_tokens=0), "kv_tokens=0"),
        (lambda: Setup(Timing(FLAT), shape="chian:2"), "is not a shape"),
        (lambda: Random(0.0, Lengths.of([1], [1]), np.random.default_rng(0)), "more than 0"),
        (lambda: _clients(0, 1, 1), "clients"),
        (lambda: Clients(3, Lengths.of([1], [1]), np.random.default_rng(0), in_round=2), "a request for each of 3"),
        (lambda: _run(PLAIN, _clients(1, 1, 1), 1, replicas=0), "replicas"),
        (lambda: Lengths.of([0], [1]), "1 to"),
        (lambda: Lengths.of([], [1]), "1 to"),
    ],
)
def test_what_makes_no_sense_is_refused(made: object, says: str) -> None:
    with pytest.raises(OptionError, match=says):
        made()  # type: ignore[operator]
