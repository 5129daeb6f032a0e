"""Drafts that were recorded are proposed again, and are right where they were."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from tests.conftest import make_sequence
from tests.serve.serving import tiny_llm
from tests.tiny_models import some_tokens
from tokentree.draft import Draft
from tokentree.errors import OptionError
from tokentree.planning.clock import Clock
from tokentree.planning.counting import Counting
from tokentree.planning.engine import RIGHT
from tokentree.planning.load import Clients, Lengths
from tokentree.planning.recorded import Recorded
from tokentree.planning.replica import Setup
from tokentree.planning.runs import MOST_DRAFTS, NEAR, Replayed, Runs, Seen
from tokentree.planning.simulation import Simulation, Window
from tokentree.planning.timing import Beside, Timing
from tokentree.sampling import SamplingParams
from tokentree.shapes import CostCurve, Dynamic
from tokentree.shapes.rates import CONFIDENCE

CURVE: dict[str, Any] = {"rows": [1, 64], "seconds": [1.0, 2.0]}
WIDE = Dynamic(nodes=64, depth=16)


def _draft() -> Draft:
    """Two children of the end of the text, and a chain of two behind the second."""
    draft = Draft(5)
    draft.add(0, 6, np.log(0.3), 0, 1)
    second = draft.add(0, 7, np.log(0.25), 1, 3)
    third = draft.add(second, 8, np.log(0.97), 0, 2)
    draft.add(third, 9, np.log(0.005), 0, 2)
    return draft


def _runs(texts: list[list[Seen]]) -> Runs:
    runs = Runs.of(texts, ["a", "b"])
    return Runs.model_validate_json(runs.model_dump_json())


def _replayed(runs: Runs, seconds: Beside = Beside()) -> Replayed:  # noqa: B008 - it doesn't change
    return Replayed(runs, seconds, Clock(), np.random.default_rng(0))


def test_a_draft_comes_again_with_what_was_right_of_it() -> None:
    (text,) = (runs := _runs([[Seen(_draft(), [7, 8, 1], 1), Seen(None, [2], 2)]])).texts
    assert (text.tokens, text.texts, text.at, text.right) == (4, 1.5, [0], [[2, 3]])
    (again,) = _replayed(runs).propose([make_sequence([9], max_tokens=40)], WIDE, False)
    assert (again.root, again.parents, again.ranks) == (9, [-1, 0, 0, 2, 3], [0, 0, 1, 0, 0])
    assert again.depths == [0, 1, 1, 2, 3]
    assert [token == RIGHT for token in again.tokens[1:]] == [False, True, True, False]
    assert len(again) == len(again.tree)  # siblings carry different tokens
    assert again.sources[1:] == [1, 3, 2, 2]
    claims = [np.searchsorted(CONFIDENCE, one.log_probs[1:]).tolist() for one in (again, _draft())]
    assert claims[0] == claims[1]
    assert again.log_scores[4] == pytest.approx(sum(again.log_probs[node] for node in (2, 3, 4)))


def test_what_came_later_tells_what_is_right_of_a_draft() -> None:
    """A draft that was cut before it was verified is right as far as the text went on with it."""
    (text,) = _runs([[Seen(_draft(), [7], 1), Seen(_draft(), [8], 1), Seen(None, [9, 4], 1)]]).texts
    assert (text.at, text.right) == ([0, 1], [[2, 3, 4], []])


def test_a_draft_is_cut_to_what_is_asked_for() -> None:
    drafter = _replayed(_runs([[Seen(_draft(), [7, 8], 1)]]))
    (shallow,) = drafter.propose([make_sequence([9], max_tokens=40)], Dynamic(nodes=64, depth=2), False)
    (few,) = drafter.propose([make_sequence([9], max_tokens=40)], Dynamic(nodes=3, depth=9), False)
    (none,) = drafter.propose([make_sequence([9], max_tokens=1)], WIDE, False)
    assert (shallow.parents, few.parents, none.parents) == ([-1, 0, 0, 2], [-1, 0, 0], [-1])


def test_a_text_plays_one_that_was_recorded_and_then_another() -> None:
    def single(right: bool) -> Draft:
        draft = Draft(5)
        draft.add(0, 6 if right else 7, -1.0, 0, 1)
        return draft

    easy, hard = ([Seen(single(right), [6], 1) for _ in range(8)] for right in (True, False))
    drafter, found = _replayed(_runs([easy, hard])), set[tuple[bool, ...]]()
    for _ in range(40):
        seq = make_sequence([9], max_tokens=40)
        hits = []
        for _ in range(16):
            (draft,) = drafter.propose([seq], WIDE, False)
            hits.append(draft.tokens[1] == RIGHT)
            seq.tokens.append(RIGHT)
        found.add(tuple(hits))
        drafter.release([seq])
    assert found == {(*[one] * 8, *[other] * 8) for one in (True, False) for other in (True, False)}
    assert not drafter._playing


def test_where_no_draft_was_made_the_next_one_comes() -> None:
    other = Draft(5)
    other.add(0, 6, -1.0, 0, 2)
    drafter = _replayed(_runs([[Seen(_draft(), [1], 1), *[Seen(None, [1], 1)] * 3, Seen(other, [1], 1)]]))
    seq, sizes = make_sequence([9], max_tokens=40), []
    for _ in range(6):
        sizes.append(len(drafter.propose([seq], WIDE, False)[0]))
        seq.tokens.append(RIGHT)
    assert sizes == [5, 2, 2, 2, 2, 5]


def test_texts_are_those_that_had_about_as_many_beside_them() -> None:
    def steps(texts: int) -> list[Seen]:
        draft = Draft(5)
        for rank in range(texts):
            draft.add(0, rank, -1.0, rank, 1)
        return [Seen(draft, [99], texts)]

    drafter = _replayed(_runs([steps(count) for count in (1, 4, 16) for _ in range(NEAR)]))
    for count in (1, 4, 5, 16, 30):
        seqs = [make_sequence([9], max_tokens=40) for _ in range(count)]
        sizes = {len(draft) - 1 for draft in drafter.propose(seqs, WIDE, False)}
        assert sizes == {min((1, 4, 16), key=lambda known: abs(np.log(known / count)))}


def test_drafting_takes_its_time_once_for_all_texts() -> None:
    drafter = _replayed(_runs([[Seen(_draft(), [7], 1)]]), Beside(1.0, 0.25))
    drafter.propose([make_sequence([9], max_tokens=9) for _ in range(3)], WIDE, False)
    assert drafter._clock.now == 1.5
    assert drafter.names == ["a", "b"]


def test_of_many_drafts_some_texts_are_taken() -> None:
    texts = [[Seen(_draft(), [7], 1)] * 10 for _ in range(MOST_DRAFTS // 4)]
    taken = _runs(texts).texts
    assert MOST_DRAFTS / 2 < sum(len(text.at) for text in taken) <= MOST_DRAFTS
    assert {len(text.at) for text in taken} == {10}


def test_what_a_decoding_accepted_was_right_of_its_drafts() -> None:
    llm, form = tiny_llm(), Counting(CostCurve([1, 64], [0.01, 0.0101]))
    tree, params = llm.using(shape=form), SamplingParams(max_tokens=40)
    outs = [tree.generate([some_tokens(9)], params)[0] for _ in range(3)]  # what was written before is looked up
    runs = form.runs(llm.decoder.drafter.names)
    assert [text.tokens for text in runs.texts] == [out.metrics.new_tokens for out in outs]
    for text, out in zip(runs.texts, outs, strict=True):
        assert out.metrics.accepted_tokens <= sum(map(len, text.right))
    assert outs[2].metrics.accepted_tokens > 20


def test_a_plan_has_the_tokens_a_forward_of_texts_of_which_some_are_easy() -> None:
    """Half of the texts have five tokens right in each draft, and half none. Drawn one by one, no candidate would have
    a chance that pays for its row."""

    def chain(right: bool) -> Draft:
        draft = Draft(5)
        for depth in range(5):
            draft.add(depth, 6 if right else 7, np.log(0.5), 0, 1)
        return draft

    easy = [Seen(chain(True), [6] * 6, 1) for _ in range(8)]
    hard = [Seen(chain(False), [6], 1) for _ in range(48)]
    timing = Timing(CostCurve([1, 64], [1.0, 20.0]))
    known = Recorded(rows=[1, 64], seconds=[1.0, 20.0], runs=_runs([easy, hard]))
    load = Clients(1, Lengths.of([1], [48]), np.random.default_rng(0))
    setup = Setup(timing, known.acceptance(), "chain:5")
    found = Simulation(setup, 1, load, Window(2, 40), np.random.default_rng(0)).run()
    assert found.all_tokens / found.forwards == pytest.approx(96 / 56, rel=0.15)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda text: text.update(at=[4]), "ascending"),
        (lambda text: text.update(at=[]), "some drafts"),
        (lambda text: text.update(parents=[[0, 2, 2, 3]]), "a parent before it"),
        (lambda text: text.update(kinds=[[0, 0]]), "has a kind"),
        (lambda text: text.update(kinds=[[0, 0, 0, 9]]), "no such kind"),
        (lambda text: text.update(right=[[3]]), "one path"),
        (lambda text: text.update(right=[[2, 3, 4, 5]]), "one path"),
        (lambda text: text.update(texts=0), "texts"),
        (lambda text: text.update(parents=[[-1, 0, 2, 3]]), "greater than or equal to 0"),
    ],
)
def test_what_are_no_runs_is_refused(change: Callable[[dict[str, Any]], None], says: str) -> None:
    told = CURVE | {"runs": _runs([[Seen(_draft(), [7, 8, 1, 2], 1)]]).model_dump()}
    assert isinstance(Recorded.read(json.dumps(told), "the curve").acceptance(), Runs)
    change(told["runs"]["texts"][0])
    with pytest.raises(OptionError, match=says):
        Recorded.read(json.dumps(told), "the curve")
