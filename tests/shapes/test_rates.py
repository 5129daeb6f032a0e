"""Acceptance rates, learnt while decoding."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.strategies import drafts, numbers
from tokentree.draft import Draft
from tokentree.growing import SOURCES
from tokentree.shapes.rates import Ahead, Cells, Rates, learn_nodes, tried

probs = st.floats(0.01, 0.99)


def _draft(*nodes: tuple[int, float], source: int = 1) -> Draft:
    """A draft of nodes given as (parent, the drafter's conditional probability)."""
    draft, ranks = Draft(0), [0] * (len(nodes) + 1)
    for token, (parent, prob) in enumerate(nodes):
        draft.add(parent, token, math.log(prob), ranks[parent], source)
        ranks[parent] += 1
    return draft


def _joint(rates: Rates, draft: Draft, request: Cells | None = None) -> list[float]:
    found: list[float] = rates.estimate(draft, request or rates.new_request()).tolist()
    return found


def _teach(rates: Rates, draft: Draft, hits: list[bool], times: int = 1, request: Cells | None = None) -> None:
    """``hits`` says of each node below the root whether it was right."""
    request = request or rates.new_request()
    for _ in range(times):
        nodes = np.arange(1, len(draft))
        learn_nodes(draft.ints, draft.floats, len(draft), nodes, np.array(hits), *rates.told(request))


@given(probs)
def test_before_anything_was_tried_the_drafter_is_believed(prob: float) -> None:
    assert _joint(Rates(), _draft((0, prob))) == pytest.approx([1, prob])


def test_a_node_is_as_probable_as_all_of_its_path() -> None:
    draft = _draft((0, 0.9), (1, 0.8), (2, 0.5), (1, 0.1))
    assert _joint(Rates(), draft) == pytest.approx([1, 0.9, 0.72, 0.36, 0.09])
    assert _joint(Rates(), Draft(3)) == [1]


@given(drafts(), numbers, st.lists(st.booleans(), min_size=14, max_size=14))
def test_siblings_exclude_each_other(draft: Draft, times: int, hits: list[bool]) -> None:
    rates = Rates()
    _teach(rates, draft, hits[: len(draft) - 1], times % 40)
    joint = _joint(rates, draft)
    for node, children in enumerate(draft.tree.children):
        assert sum(joint[child] for child in children) <= joint[node] + 1e-9
    assert all(joint[node] <= joint[draft.parents[node]] for node in range(1, len(draft)))


@pytest.mark.parametrize(("claim", "truth"), [(0.9, 0.3), (0.05, 0.6), (0.5, 0.5)])
def test_a_claim_gives_way_to_what_happens(claim: float, truth: float) -> None:
    rates, draft = Rates(), _draft((0, claim))
    for i in range(400):
        _teach(rates, draft, [i % 10 < 10 * truth])
    assert _joint(rates, draft)[1] == pytest.approx(truth, abs=0.03)


def test_one_outcome_says_little_and_twenty_say_much() -> None:
    rates, draft = Rates(), _draft((0, 0.8))
    _teach(rates, draft, [False])
    assert 0.3 < _joint(rates, draft)[1] < 0.8
    _teach(rates, draft, [False], 19)
    assert _joint(rates, draft)[1] < 0.1


def test_what_was_true_long_ago_is_forgotten() -> None:
    rates, draft = Rates(), _draft((0, 0.9))
    _teach(rates, draft, [True], 3000)
    assert _joint(rates, draft)[1] > 0.95
    _teach(rates, draft, [False], 1000)
    assert _joint(rates, draft)[1] < 0.1


def test_claims_of_another_size_are_learnt_apart() -> None:
    rates = Rates()
    _teach(rates, _draft((0, 0.95)), [False], 100)
    assert _joint(rates, _draft((0, 0.55)))[1] == pytest.approx(0.55)


def test_depths_and_ranks_are_learnt_apart() -> None:
    rates, draft = Rates(), _draft((0, 0.45), (1, 0.45), (0, 0.45), (3, 0.45))
    _teach(rates, draft, [True, False, False, True], 200)
    joint = _joint(rates, draft)
    first, below, second = joint[1], joint[2] / joint[1], joint[3]
    assert first > 0.9
    assert second < 0.1
    assert below == pytest.approx(0.5, abs=0.05)  # rank 0 of depth 2: once right, once wrong


def test_the_same_claim_of_other_drafters_is_learnt_apart() -> None:
    rates = Rates()
    good, bad, both = (_draft((0, 0.65), source=bits) for bits in (1, 2, 3))
    _teach(rates, good, [True], 100)
    _teach(rates, bad, [False], 100)
    assert _joint(rates, good)[1] > 0.9
    assert _joint(rates, bad)[1] < 0.1
    assert _joint(rates, both)[1] == pytest.approx(0.5, abs=0.01)  # what such a claim was worth on the whole


def test_more_combinations_of_drafters_than_there_is_room_for_share_the_last() -> None:
    rates = Rates()
    for bits in range(1, 200):
        _teach(rates, _draft((0, 0.5), source=bits), [True])
    assert _joint(rates, _draft((0, 0.5), source=199))[1] > 0.9


def test_a_request_knows_itself_best() -> None:
    rates, draft = Rates(), _draft((0, 0.65))
    _teach(rates, draft, [True], 400)
    odd = rates.new_request()
    _teach(rates, draft, [False], 15, odd)
    assert _joint(rates, draft, odd)[1] < 0.4
    assert _joint(rates, draft)[1] > 0.8


def test_what_one_request_taught_helps_the_next() -> None:
    rates, draft = Rates(), _draft((0, 0.2))
    _teach(rates, draft, [True], 50)
    assert _joint(rates, draft)[1] > 0.8
    assert _joint(Rates(), draft)[1] == pytest.approx(0.2)


def test_the_table_names_drafters_depths_and_ranks() -> None:
    rates = Rates()
    _teach(rates, _draft((0, 0.6), (1, 0.6), (0, 0.2)), [True, True, False], 3)
    _teach(rates, _draft((0, 0.6)), [False])
    _teach(rates, _draft((0, 0.3), source=3), [True], 2)
    assert rates.table(["a", "b"]) == [
        (["a"], "1", "0", 3, 4),
        (["a"], "1", "1", 0, 3),
        (["a"], "2", "0", 3, 3),
        (["a", "b"], "1", "0", 2, 2),
    ]
    assert rates.by_rank() == [8 / 9, 0, 0, 0]
    assert Rates().by_rank() == [0, 0, 0, 0]
    assert Rates().table(["a"]) == []


def test_deep_nodes_and_late_ranks_share_a_line() -> None:
    rates = Rates()
    chain = _draft(*((node, 0.9) for node in range(7)))
    fan = _draft(*((0, 0.1) for _ in range(6)), source=2)
    _teach(rates, chain, [True] * 7)
    _teach(rates, fan, [False] * 6)
    lines = {(*names, depth, rank): trials for names, depth, rank, _, trials in rates.table(["chain", "fan"])}
    assert {depth: lines["chain", depth, "0"] for depth in ("1", "2", "3-4", "5-")} == {
        "1": 1,
        "2": 1,
        "3-4": 2,
        "5-": 3,
    }
    assert [lines["fan", "1", rank] for rank in ("0", "1", "2", "3-")] == [1, 1, 1, 3]


@given(st.integers(1, 700))
def test_a_rate_is_never_above_1(times: int) -> None:
    rates, draft = Rates(), _draft((0, 0.95), (1, 0.9), (2, 0.5))
    _teach(rates, draft, [True] * 3, times)
    assert rates.by_rank()[0] <= 1
    assert max(_joint(rates, draft)) <= 1


# -- children that aren't there yet ----------------------------------------------------------------------------------


def test_what_is_ahead_starts_at_its_prior_and_is_learnt_by_depth_and_rank() -> None:
    ahead = Ahead([0.6, 0.1])
    assert [ahead.at(depth).tolist() for depth in (1, 2, 500)] == [[0.6, 0.1]] * 3
    for _ in range(100):
        ahead.learn(np.array([1, 1, 2, 90]), np.array([0, 1, 0, 1]), np.array([False, True, True, True]))
    assert ahead.at(1) == pytest.approx([0, 1], abs=0.05)
    assert ahead.at(2) == pytest.approx([1, 0.1], abs=0.05)
    assert ahead.at(3).tolist() == [0.6, 0.1]
    assert ahead.at(500) == pytest.approx([0.6, 1], abs=0.05)  # all great depths are one
    for _ in range(1000):
        ahead.learn(np.array([1]), np.array([1]), np.array([False]))
    assert ahead.at(1)[1] < 0.05


def test_ranks_that_are_not_told_apart_are_left_out() -> None:
    ahead = Ahead([0.5])
    for _ in range(100):
        ahead.learn(np.array([1, 1]), np.array([0, 3]), np.array([True, True]))
    assert ahead.at(1)[0] > 0.9
    assert ahead.at(2)[0] == 0.5


@given(drafts(), st.lists(st.integers(0, 5), min_size=1, max_size=4), st.integers(1, 3))
def test_of_a_draft_it_learns_what_those_who_paid_had_proposed(draft: Draft, accepted: list[int], who: int) -> None:
    draft.ints[SOURCES, : len(draft)] = 1 + np.arange(len(draft)) % 2
    at_once, one_by_one = Ahead([0.5, 0.2]), Ahead([0.5, 0.2])
    at_once.learn_proposed(draft, np.array(accepted), who)
    nodes, hits = tried(draft, np.array(accepted))
    for node, hit in zip(nodes.tolist(), hits.tolist(), strict=True):
        if draft.sources[node] & who:
            depth, rank = draft.depths[node], draft.ranks[node]
            one_by_one.learn(np.array([depth]), np.array([rank]), np.array([hit]))
    for depth in range(16):
        assert at_once.at(depth) == pytest.approx(one_by_one.at(depth))
