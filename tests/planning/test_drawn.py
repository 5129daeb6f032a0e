"""Drafts that are drawn have the candidates that were recorded, as often right."""

from __future__ import annotations

import numpy as np
import pytest

from tests.conftest import make_sequence
from tokentree.errors import OptionError
from tokentree.growing import DEPTH, RANK, SOURCES
from tokentree.planning.clock import Clock
from tokentree.planning.drawn import Acceptance, Drawn
from tokentree.planning.engine import RIGHT
from tokentree.planning.recorded import Counted, Recorded
from tokentree.planning.timing import Beside
from tokentree.shapes import Dynamic
from tokentree.shapes.rates import CONFIDENCE, DEPTH_NAMES, DEPTHS, RANK_NAMES, RANKS, tried

# drafters, depth, rank, hits, trials; of 1000 steps
COUNTED = [
    ("a", "1", "0", 300, 400), ("b", "1", "0", 100, 400), ("a+b", "1", "0", 90, 100),
    ("a", "1", "1", 60, 600), ("b", "1", "2", 20, 200), ("b", "1", "3-", 30, 300),
    ("a", "2", "0", 240, 360), ("a", "3-4", "0", 150, 300), ("a", "5-", "0", 90, 100),
]  # fmt: skip
NAMES = "drafters", "depth", "rank", "hits", "trials"
CURVE = {"rows": [1, 64], "seconds": [1.0, 2.0]}


def _recorded(**more: object) -> Recorded:
    rates = [dict(zip(NAMES, one, strict=True)) for one in COUNTED]
    return Recorded.model_validate(CURVE | {"rates": rates, "steps": 1000} | more)


def _drawn(recorded: Recorded, steps: int) -> np.ndarray:
    """float64[depths, ranks, kinds, 2]: candidates whose parent was right, and those of them that were right."""
    acceptance = recorded.acceptance()
    assert isinstance(acceptance, Acceptance)
    clock, counted = Clock(), np.zeros((len(DEPTH_NAMES), RANKS, len(acceptance.sources), 2))
    drafter, form = Drawn(acceptance, Beside(), clock, np.random.default_rng(0)), Dynamic(nodes=64, depth=16)
    kinds, all_right = acceptance.sources.tolist(), np.full(17, RIGHT)
    seq = make_sequence([9], max_tokens=40)
    for _ in range(steps):
        (draft,) = drafter.propose([seq], form, False)
        assert len(draft) == len(draft.tree) <= 64  # siblings carry different tokens
        nodes, hits = tried(draft, all_right)
        for node, hit in zip(nodes.tolist(), hits.tolist(), strict=True):
            depth, rank, source = (int(draft.ints[row, node]) for row in (DEPTH, RANK, SOURCES))
            place = DEPTHS[min(depth, len(DEPTHS) - 1)], min(rank, RANKS - 1), kinds.index(source)
            counted[place] += 1, hit
    return counted


def test_candidates_come_and_are_right_as_often_as_they_were() -> None:
    recorded = _recorded()
    counted, steps = _drawn(recorded, 4000), 4000
    kinds = list(dict.fromkeys(one[0] for one in COUNTED))
    for who, depth, rank, hits, trials in COUNTED:
        there, right = counted[DEPTH_NAMES.index(depth), RANK_NAMES.index(rank), kinds.index(who)]
        assert there / steps == pytest.approx(trials / 1000, rel=0.1, abs=0.02)
        assert right / there == pytest.approx(hits / trials, rel=0.12, abs=0.02)


def test_candidates_claim_what_those_like_them_claimed() -> None:
    """So the cost shape tells them apart as it did where they were recorded."""
    cells = [
        {"drafters": "a", "claim": claim, "depth": "1", "rank": "0", "hits": hits, "trials": 100}
        for claim, hits in ((1, 10), (11, 90))
    ]
    acceptance = _recorded(cells=cells, steps=200).acceptance()
    assert isinstance(acceptance, Acceptance)
    drafter = Drawn(acceptance, Beside(), Clock(), np.random.default_rng(0))
    found = dict[int, list[bool]]()
    for _ in range(2000):
        (draft,) = drafter.propose([make_sequence([9], max_tokens=40)], Dynamic(nodes=2, depth=1), False)
        bucket = int((draft.log_probs[1] > CONFIDENCE).sum())
        found.setdefault(bucket, []).append(draft.tokens[1] == RIGHT)
    assert found.keys() == {1, 11}
    assert np.mean(found[1]) == pytest.approx(0.1, abs=0.03)
    assert np.mean(found[11]) == pytest.approx(0.9, abs=0.03)
    assert len(found[1]) == pytest.approx(1000, abs=70)


def test_without_steps_there_was_a_candidate_in_each() -> None:
    first, second = (one.acceptance() for one in (_recorded(), _recorded(steps=None)))
    assert isinstance(first, Acceptance)
    assert isinstance(second, Acceptance)
    assert (first.offered[0, 0], second.offered[0, 0]) == (0.9, 1.0)


def test_rates_by_rank_serve_too() -> None:
    counted = _drawn(Recorded.model_validate(CURVE | {"by_rank": [0.5, 0.25, 0.0]}), 2000)[..., 0, :]
    assert counted[:, 2:].sum() == 0
    for rank, rate in enumerate((0.5, 0.25)):
        assert counted[:2, rank, 1].sum() / counted[:2, rank, 0].sum() == pytest.approx(rate, rel=0.08)


def test_drafting_takes_its_time_once_for_all_texts() -> None:
    acceptance = _recorded().acceptance()
    assert isinstance(acceptance, Acceptance)
    clock = Clock()
    drafter = Drawn(acceptance, Beside(1.0, 0.25), clock, np.random.default_rng(0))
    drafts = drafter.propose([make_sequence([9], max_tokens=2), make_sequence([9], max_tokens=1)], Dynamic(), False)
    assert clock.now == 1.25
    assert drafts[0].depth <= 1
    assert len(drafts[1]) == 1  # no room
    assert drafter.names == ["a", "b"]


def test_nothing_recorded_is_plain_decoding() -> None:
    assert Recorded.model_validate(CURVE).acceptance() is None
    assert Recorded.model_validate(CURVE | {"rates": [], "by_rank": [0.0, 0.0]}).acceptance() is None


def test_prompts_lengthen_the_curve() -> None:
    timing = Recorded.model_validate(CURVE | {"prompt_rows": [64, 256], "prompt_seconds": [9.0, 8.0]}).timing()
    assert (timing.forward(1, 1), timing.forward(64, 1), timing.forward(160, 1)) == (1.0, 2.0, 5.0)
    assert timing.forward(0, 0) == 0.0


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("[]", "isn't what 'calibrate --json' prints"),
        ("", "isn't what 'calibrate --json' prints: it is no JSON object"),
        ('{"rows": [1, 2]}', "seconds: Field required"),
        ('{"rows": [1, 2], "seconds": [1, 0]}', "each with a time above 0"),
        ('{"rows": [1, 2], "seconds": [1, 2], "step_seconds": -1}', "step_seconds"),
        ('{"rows": [1, 2], "seconds": [1, 2], "prompt_rows": [64]}', "as many as each other"),
        ('{"rows": [1, 2], "seconds": [1, 2], "prompt_rows": [64, 64], "prompt_seconds": [3, 3]}', "ascending"),
        ('{"rows": [1, 2], "seconds": [1, 2], "by_rank": [0.9, 0.9]}', "add up to 1"),
        ('{"rows": [1, 2], "seconds": [1, 2], "rates": [{"drafters": "a", "depth": "1", "rank": "0", "hits": 3, '
         '"trials": 2}]}', "more candidates were right than there were"),
        ('{"rows": [1, 2], "seconds": [1, 2], "rates": [{"drafters": "a", "depth": "7", "rank": "0", "hits": 1, '
         '"trials": 2}]}', "rates.0.depth"),
    ],
)  # fmt: skip
def test_what_is_no_record_is_refused(text: str, says: str) -> None:
    with pytest.raises(OptionError, match=says):
        Recorded.read(text, "the cost curve 'x'")


def test_depths_and_ranks_are_those_that_rates_tell_apart() -> None:
    for depth in DEPTH_NAMES:
        for rank in RANK_NAMES:
            Counted.model_validate(dict(zip(NAMES, ("a", depth, rank, 1, 1), strict=True)))
