"""The cost shape: as many nodes as pay, for whom they pay, and what it learns."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.conftest import decode, make_sequence, random_table
from tests.strategies import drafts, numbers
from tokentree.draft import Draft
from tokentree.drafters.draft_model import DraftModel
from tokentree.engines.table import TableEngine
from tokentree.errors import OptionError
from tokentree.sequence import Accepted, Sequence
from tokentree.shapes import Cost, CostCurve, shape
from tokentree.shapes.pause import Pause
from tokentree.shapes.rates import Rates
from tokentree.tree import TokenTree

SEQ, OTHER = make_sequence([0]), make_sequence([0])
FLAT = CostCurve([1, 64], [1.0, 1.0])
MILD = CostCurve([1, 11], [1.0, 2.0])  # a row costs a tenth of a forward
STEEP = CostCurve([1, 64], [1.0, 64.0])  # a row costs a forward of its own
BENT = CostCurve([1, 4, 64], [1.0, 1.0, 7.0])  # three candidates are free, the others cost a tenth each
DEAR = CostCurve([1, 6], [1.0, 2.0])

curves = st.lists(st.floats(0, 1), min_size=4, max_size=4).map(
    lambda steps: CostCurve([1, 2, 4, 7, 12], np.cumsum([1.0, *steps]).tolist())
)


def _draft(*nodes: tuple[int, float], level_seconds: float = 0.0, levels: int = 0) -> Draft:
    """A draft of nodes given as (parent, the drafter's conditional probability); node i carries token i."""
    draft, ranks = Draft(0, None, level_seconds, levels), [0] * (len(nodes) + 1)
    for token, (parent, prob) in enumerate(nodes, start=1):
        draft.add(parent, token, math.log(prob), ranks[parent])
        ranks[parent] += 1
    return draft


def _chain(*probs: float) -> Draft:
    return _draft(*enumerate(probs))


def _claims(draft: Draft) -> list[float]:
    """The joint probabilities that a shape believes in before it has learnt, worked out anew."""
    probs, joint = np.exp(draft.log_probs), [1.0]
    for node in range(1, len(draft)):
        family = sum(probs[i] for i in range(1, len(draft)) if draft.parents[i] == draft.parents[node])
        joint.append(joint[draft.parents[node]] * probs[node] / max(1.0, family))
    return joint


def _parts(draft: Draft) -> list[tuple[int, ...]]:
    """Every set of candidates that holds the parent of each."""
    inner = range(1, len(draft))
    subsets = itertools.chain.from_iterable(itertools.combinations(inner, size) for size in range(len(draft)))
    return [part for part in subsets if all(draft.parents[node] in (0, *part) for node in part)]


def _step(form: Cost, draft: Draft, text: list[int], drafting: float = 0.0, seq: Sequence = SEQ) -> Draft:
    """One step of the loop in which the target goes on with ``text`` and then with 99; returns what was verified."""
    text = [*text, 99]
    (cut,) = form.cut([seq], [draft])
    path = [0]
    while (child := cut.tree.child(path[-1], text[len(path) - 1])) is not None:
        path.append(child)
    step = Accepted(path, text[: len(path)])
    form.observe([seq], [cut], [step], drafting, form.curve.seconds(len(cut)))
    return cut


# -- what it takes --------------------------------------------------------------------------------------------------


@given(drafts(), st.integers(2, 16))
def test_where_rows_are_free_it_takes_all_or_the_most_probable(draft: Draft, nodes: int) -> None:
    cut = Cost(nodes, curve=FLAT).prune(SEQ, draft)
    joint = _claims(draft)
    assert len(cut) == min(nodes, len(draft))
    kept = {tuple(cut.path_tokens(node)) for node in range(len(cut))}
    out = [joint[node] for node in range(len(draft)) if tuple(draft.path_tokens(node)) not in kept]
    least = min(joint[node] for node in range(len(draft)) if tuple(draft.path_tokens(node)) in kept)
    assert least >= max(out, default=0) - 1e-12


@given(drafts())
def test_where_a_row_costs_a_forward_it_takes_nothing(draft: Draft) -> None:
    assert len(Cost(curve=STEEP).prune(SEQ, draft)) == 1


def test_a_sure_chain_is_long_and_an_unsure_one_short() -> None:
    assert len(Cost(curve=MILD).prune(SEQ, _chain(*[0.99] * 30))) == 31
    assert 2 <= len(Cost(curve=MILD).prune(SEQ, _chain(*[0.5] * 30))) <= 4


def test_two_likely_siblings_are_both_taken_and_an_unlikely_one_is_not() -> None:
    assert Cost(curve=MILD).prune(SEQ, _draft((0, 0.45), (0, 0.45), (0, 0.05))).tokens == [0, 1, 2]


@given(drafts(max_nodes=9), curves, st.floats(0, 2))
def test_no_other_part_of_a_draft_has_more_tokens_per_second(draft: Draft, curve: CostCurve, spent: float) -> None:
    draft.level_seconds, draft.levels = spent, 1
    joint = _claims(draft)
    rates = [(1 + sum(joint[node] for node in part)) / (curve.seconds(1 + len(part)) + spent) for part in _parts(draft)]
    cut = Cost(curve=curve).prune(SEQ, draft)
    kept = [tuple(cut.path_tokens(node)) for node in range(len(cut))]
    tokens = sum(joint[node] for node in range(len(draft)) if tuple(draft.path_tokens(node)) in kept)
    assert tokens / (curve.seconds(len(cut)) + spent) == pytest.approx(max(rates))


@given(drafts(max_nodes=5), drafts(max_nodes=5), curves, st.floats(0, 0.5))
def test_a_batch_shares_one_budget_in_the_best_way(one: Draft, two: Draft, curve: CostCurve, per_seq: float) -> None:
    curve = CostCurve(curve.rows, curve.points, per_seq)
    joints = _claims(one), _claims(two)
    cuts = Cost(curve=curve).cut([SEQ, OTHER], [one, two])

    def rate(*parts: tuple[int, ...]) -> float:
        tokens = 2 + sum(joint[node] for joint, part in zip(joints, parts) for node in part)
        return tokens / curve.seconds(2 + sum(map(len, parts)), 2)

    chosen = []
    for draft, cut in zip((one, two), cuts):
        kept = {tuple(cut.path_tokens(node)) for node in range(1, len(cut))}
        chosen.append(tuple(node for node in range(1, len(draft)) if tuple(draft.path_tokens(node)) in kept))
    assert rate(*chosen) == pytest.approx(max(rate(a, b) for a in _parts(one) for b in _parts(two)))


def test_in_a_batch_the_sure_sequence_gets_the_rows() -> None:
    sure, unsure = _chain(0.9, 0.9, 0.9), _chain(0.15, 0.9, 0.9)
    alone = Cost(curve=MILD)
    assert [len(alone.prune(SEQ, draft)) for draft in (sure, unsure)] == [4, 4]
    assert [len(cut) for cut in Cost(curve=MILD).cut([SEQ, OTHER], [sure, unsure])] == [4, 1]


def test_a_fixed_cost_of_a_step_makes_bigger_trees_pay() -> None:
    draft, form = _chain(*[0.6] * 12), Cost(curve=MILD)
    before = len(form.prune(SEQ, draft))
    for _ in range(60):
        _step(form, Draft(0), [9], drafting=5.0)
    assert len(form.prune(SEQ, draft)) > before + 2


# -- children that were drawn ----------------------------------------------------------------------------------------


@given(drafts(), drafts())
def test_drawn_children_are_never_dropped(drawn: Draft, picked: Draft) -> None:
    drawn.sampled = {}
    assert Cost(curve=STEEP).prune(SEQ, drawn) is drawn
    cuts = Cost(curve=STEEP).cut([SEQ, OTHER], [drawn, picked])
    assert cuts[0] is drawn


@given(drafts(), curves, numbers, st.floats(0, 0.3))
def test_how_many_are_drawn_does_not_depend_on_what_was_drawn(
    draft: Draft, curve: CostCurve, seed: int, pace: float
) -> None:
    rng = np.random.default_rng(seed)
    one, two = Draft(0, {}, pace, 1), Draft(0, {}, pace, 1)
    for node in range(1, len(draft)):
        one.add(draft.parents[node], draft.tokens[node], draft.log_probs[node], draft.ranks[node])
        two.add(draft.parents[node], 50 - draft.tokens[node], -float(rng.exponential()), draft.ranks[node])
    form = Cost(nodes=20, curve=curve)
    for depth in range(max(draft.depths) + 1):
        level = [node for node in range(len(draft)) if draft.depths[node] == depth]
        counts = form.counts(SEQ, one, level)
        assert counts == form.counts(SEQ, two, level)
        assert len(one) + sum(counts) <= 20
        if depth:
            assert form.select(SEQ, one, level) == form.select(SEQ, two, level)


def test_places_whose_draws_are_always_refused_are_not_drawn_any_more() -> None:
    form = Cost(curve=MILD)
    wide = form.counts(SEQ, Draft(0, {}), [0])[0]
    assert wide > 1
    for _ in range(40):
        draft = Draft(0, {})
        for rank in range(form.counts(SEQ, draft, [0])[0]):
            draft.add(0, 1 + rank, -1.0, rank)
        _step(form, draft, [99])
    assert form.counts(SEQ, Draft(0, {}), [0]) == [1]


def test_a_drawn_tree_is_decoded_to_its_end() -> None:
    table = random_table(5, seed=1, sharpness=2.0)
    seq = make_sequence([0, 1], max_tokens=60, temperature=1.0, seed=4)
    form = Cost(nodes=12, curve=MILD)
    assert len(decode(TableEngine(table), [seq], DraftModel(TableEngine(table), 5), form, "rejection")[0]) == 60
    assert seq.metrics.mean_accepted_length > 1.5


# -- what it learns -------------------------------------------------------------------------------------------------


def test_a_candidate_that_was_not_taken_teaches_too() -> None:
    form = Cost(curve=MILD)
    rows = [len(_step(form, _draft((0, 0.03)), [1])) for _ in range(40)]
    assert rows[0] == 1
    assert rows[-1] == 2
    steep = Cost(curve=STEEP)
    assert {len(_step(steep, _draft((0, 0.7), (0, 0.2)), [1])) for _ in range(40)} == {1}
    assert steep.rates.by_rank()[:2] == [1, 0]


def test_what_follows_a_wrong_candidate_teaches_nothing() -> None:
    form = Cost(curve=FLAT)
    _step(form, _draft((0, 0.5), (1, 0.5), (0, 0.5), (3, 0.5)), [3, 7])
    assert [entry[1:] for entry in form.rates.table(["x"])] == [
        ("1", "0", 0, 1),
        ("1", "1", 1, 1),
        ("2", "0", 0, 1),
    ]


def test_a_drafter_that_is_always_wrong_gets_the_free_rows_and_no_more() -> None:
    form, chain = Cost(curve=BENT), _chain(*[0.95] * 20)
    rows = [len(_step(form, chain, [99])) for _ in range(100)]
    assert rows[0] > 4
    assert max(rows[-50:]) <= 4
    mild = Cost(curve=MILD)
    assert [len(_step(mild, chain, [99])) for _ in range(100)][-50:] == [1] * 50


def test_a_text_on_which_a_drafter_fails_does_not_spoil_the_next() -> None:
    form = Cost(curve=DEAR)
    for _ in range(300):
        _step(form, _chain(0.8, 0.8), [1, 2, 3])
    odd = make_sequence([0])
    assert [len(_step(form, _chain(0.8, 0.8), [99], seq=odd)) for _ in range(60)][-1] == 1
    assert len(form.prune(make_sequence([0]), _chain(0.8, 0.8))) == 3


def test_it_asks_for_fewer_candidates_where_few_pay() -> None:
    form = Cost(nodes=40, curve=STEEP)
    assert form.max_nodes == 40
    for _ in range(60):
        _step(form, _chain(0.5, 0.5), [99])
    assert form.max_nodes == 8
    free = Cost(nodes=40, curve=FLAT)
    for _ in range(60):
        _step(free, _chain(*[0.9] * 30), list(range(1, 31)))
    assert free.max_nodes == 40


def test_the_curve_learns_the_same_from_a_step_with_a_draft_and_from_one_without() -> None:
    form, alone = Cost(curve=MILD), MILD.copy()
    for took in (1.5, 1.6, 0.9):
        cut = form.cut([SEQ], [_chain(0.9)])[0]
        form.observe([SEQ], [cut], [Accepted([0], [5])], 0.0, took)
        alone.observe(len(cut), 1, took)
    assert form.curve.points == alone.points


@given(drafts())
def test_the_tree_of_a_cut_draft_is_the_one_that_its_tokens_and_parents_make(draft: Draft) -> None:
    for cut in (Cost(curve=MILD).cut([SEQ], [draft])[0], Cost(curve=FLAT).cut([SEQ], [draft])[0]):
        made = TokenTree(np.array(cut.tokens), np.array(cut.parents))
        assert cut.tree.tokens.tolist() == made.tokens.tolist()
        assert cut.tree.parents.tolist() == made.parents.tolist()
        assert cut.tree.depths.tolist() == made.depths.tolist()
        assert cut.tree.is_chain == made.is_chain
        assert not cut.tree.tokens.flags.writeable


def test_a_curve_that_was_measured_goes_on_learning_and_one_that_was_not_takes_its_scale() -> None:
    form = Cost(curve=MILD)
    for _ in range(100):
        form.observe([SEQ], [_chain(0.9)], [Accepted([0], [5])], 0.0, 3.0)
    assert form.curve.seconds(2) == pytest.approx(3.0, rel=0.02)
    form.use_curve(MILD)
    form.observe([SEQ], [_chain(0.9)], [Accepted([0], [5])], 0.0, 3.0)
    assert MILD.seconds(2) == pytest.approx(1.1)  # others may use it too
    guess = Cost()
    guess.observe([SEQ], [Draft(0)], [Accepted([0], [5])], 0.0, 0.04)
    assert guess.curve.seconds(16) == pytest.approx(0.064)


def test_an_engine_without_a_clock_does_no_harm() -> None:
    table = random_table(5, seed=2, sharpness=3.0)
    seqs = [make_sequence([0, i], max_tokens=40) for i in range(3)]
    texts = decode(TableEngine(table), seqs, DraftModel(TableEngine(table), 5), Cost())
    assert texts == decode(TableEngine(table), [make_sequence([0, i], max_tokens=40) for i in range(3)])


def test_what_is_known_of_a_request_goes_with_it() -> None:
    form, table = Cost(curve=MILD), random_table(5, seed=2, sharpness=3.0)
    drafter = DraftModel(TableEngine(table), 5)
    decode(TableEngine(table), [make_sequence([0, i], max_tokens=9) for i in range(4)], drafter, form, max_batch=2)
    assert not form._requests
    assert form.rates.table(["draft_model"])


# -- what it doubts, and when it rests ---------------------------------------------------------------------------


def test_promises_that_are_not_kept_count_less(monkeypatch: pytest.MonkeyPatch) -> None:
    form = Cost(curve=MILD)
    monkeypatch.setattr(
        form.rates, "told", lambda request: Rates().told(Rates().new_request())
    )  # what it learns is lost
    sizes = [len(_step(form, _chain(*[0.5] * 9), [7])) for _ in range(99)]
    assert sizes[0] == 3
    assert np.mean(sizes[30:]) <= 2
    sizes = [len(_step(form, _chain(*[0.5] * 9), [1, 2, 3, 4, 5, 6])) for i in range(199)]
    assert sizes[-1] == 3  # and it never hopes for more than was promised


def _rests(form: Cost, drafting: float, right: bool, steps: int = 200, prob: float = 0.5) -> list[int]:
    """The steps without drafts, where making one takes ``drafting`` and its one candidate is always right or wrong."""
    rested = []
    for i in range(steps):
        if form.rests([SEQ]):
            rested.append(i)
            form.observe([SEQ], [Draft(0)], [Accepted([0], [5])], 0.0, form.curve.seconds(1))
        else:
            _step(form, _chain(prob), [1 if right else 7], drafting)
    return rested


def test_where_drafting_does_not_pay_for_itself_it_rests_most_of_the_time() -> None:
    form = Cost(curve=STEEP)
    assert 130 < len(_rests(form, 0.1, right=False)) < 195
    assert _rests(Cost(curve=MILD), 0.1, right=True) == []
    assert _rests(Cost(curve=STEEP), 0.0, right=False) == []  # what costs nothing need not rest


def test_it_stops_resting_when_it_pays_again_or_when_the_batch_changes() -> None:
    form = Cost(curve=MILD)
    assert form.rests([SEQ]) is False
    _rests(form, 0.1, right=False, steps=400)
    back = _rests(form, 0.1, right=True, prob=0.97)
    assert back
    assert back[-1] < 100
    _rests(form, 0.1, right=False, steps=400)
    assert form.rests([SEQ, OTHER]) is False
    assert form.rests([make_sequence([0])]) is False


def test_while_it_rests_it_does_not_forget_what_drafting_takes() -> None:
    form = Cost(curve=STEEP)
    _rests(form, 0.1, right=False, steps=1000)
    assert form._overhead == pytest.approx(0.1, rel=0.01)


def test_it_rests_while_a_prompt_is_read_and_forgets_nothing_by_that() -> None:
    form = Cost(curve=MILD)
    assert [form.rests([SEQ], reading) for reading in (0, 1, 64, 0)] == [False, True, True, False]
    form = Cost(curve=STEEP)
    _rests(form, 0.1, right=False, steps=1000)
    form.rests([SEQ], 64)
    form.observe([SEQ], [Draft(0)], [Accepted([0], [5])], 0.0, 0.0)
    assert form._overhead == pytest.approx(0.1, rel=0.01)


def test_a_pause_that_ends_in_vain_is_followed_by_one_twice_as_long() -> None:
    pause = Pause(2, 16)
    assert [step for step in range(1, 64) if pause.count()] == [2, 6, 14, 30, 46, 62]
    pause.stop()
    assert [step for step in range(1, 10) if pause.count(0.5)] == [4]


# -- levels that cost a forward --------------------------------------------------------------------------------------


@pytest.mark.parametrize(("pace", "starts"), [(0.01, True), (0.3, True), (1.0, False), (9.0, False)])
def test_a_draft_is_begun_where_a_level_pays(pace: float, starts: bool) -> None:
    assert bool(Cost(curve=MILD).select(SEQ, Draft(0, None, pace), [0])) is starts


def test_a_draft_goes_deeper_where_the_next_level_pays() -> None:
    def deeper(prob: float, pace: float) -> list[int]:
        return Cost(curve=MILD).select(SEQ, _draft((0, prob), level_seconds=pace, levels=1), [1])

    assert deeper(0.95, 0.1) == [1]
    assert deeper(0.95, 3.0) == []
    assert deeper(0.1, 0.1) == []
    both = _draft((0, 0.6), (0, 0.3), (0, 0.02), level_seconds=0.05, levels=1)
    assert Cost(curve=MILD).select(SEQ, both, [1, 2, 3]) == [1, 2]
    assert Cost(curve=MILD, top_k=1).select(SEQ, both, [1, 2, 3]) == [1]


@pytest.mark.parametrize(("curve", "pace"), [(MILD, 5.0), (STEEP, 0.01)])
def test_a_drafter_that_does_not_pay_rests_and_is_tried_again_ever_later(curve: CostCurve, pace: float) -> None:
    form, dear, cheap = Cost(curve=curve), Draft(0, None, pace), Draft(0, None, 0.01)
    tried = [step for step in range(1, 800) if form.select(SEQ, dear, [0])]
    assert tried == [16, 48, 112, 240, 496, 752]
    form.use_curve(MILD)
    assert form.select(SEQ, cheap, [0]) == [0]
    form.use_curve(curve)
    assert [step for step in range(1, 60) if form.select(SEQ, dear, [0])] == [16, 48]


def test_in_a_batch_it_is_tried_as_seldom() -> None:
    form, seqs = Cost(curve=MILD), [make_sequence([0]) for _ in range(4)]
    form.cut(seqs, [Draft(0)] * 4)
    tried = [step for step in range(1, 60) for seq in seqs if form.select(seq, Draft(0, None, 5.0), [0])]
    assert tried == [16, 48]


@pytest.mark.parametrize(("text", "starts"), [((1, 1, 1, 1), True), ((1, 2, 3, 4), False)])
def test_a_level_is_worth_the_rows_that_its_tokens_take(text: tuple[int, ...], starts: bool) -> None:
    form = Cost(curve=DEAR)
    for i in range(400):  # the text is always among the four children: always the first, or each in turn
        _step(form, _draft(*[(0, 0.25)] * 4), [text[i % 4]])
    assert bool(form.select(SEQ, Draft(0, None, 0.25), [0])) is starts


def test_a_level_is_worth_what_it_adds_to_what_others_propose() -> None:
    level = Draft(0, None, 0.3)
    assert Cost(curve=MILD).select(SEQ, level, [0]) == [0]
    for others, starts in ((_chain(0.98, 0.98, 0.98), False), (_chain(0.05), True)):
        form = Cost(curve=MILD)
        form.beside(SEQ, others)
        assert bool(form.select(SEQ, level, [0])) is starts
        assert form.select(OTHER, level, [0]) == [0]  # of another sequence nothing was told
    form.beside(SEQ, _chain(0.98, 0.98, 0.98))
    form.cut([SEQ], [_chain(0.5)])
    assert form.select(SEQ, level, [0]) == [0]  # it holds for one step


def test_a_deeper_level_is_worth_less_where_others_go_on_from_its_nodes() -> None:
    grown = _draft((0, 0.95), level_seconds=0.3, levels=1)
    for token, goes_on in ((1, False), (7, True)):  # theirs goes on from the same node, or from another one
        form, others = Cost(curve=MILD), Draft(0)
        others.add(others.add(0, token, math.log(0.95 if token == 1 else 0.03), 0), 8, math.log(0.97), 0)
        form.beside(SEQ, others)
        assert bool(form.select(SEQ, grown, [1])) is goes_on


def test_what_levels_bring_is_learnt_of_those_who_pay_for_them() -> None:
    ahead = list[float]()
    for sources in (1, 2):
        form = Cost(curve=FLAT)
        for _ in range(40):
            draft = Draft(0, None, 0.1, 1, paid=1)
            draft.add(0, 5, math.log(0.5), 0, sources)
            _step(form, draft, [5])
        ahead.append(float(form._picked.at(1)[0]))
    assert ahead[0] > 0.9
    assert ahead[1] == pytest.approx(0.7)


def test_as_long_as_nobody_knows_what_a_level_costs_only_one_is_drafted() -> None:
    form = Cost(curve=FLAT)
    assert form.select(SEQ, Draft(0), [0]) == [0]
    assert form.select(SEQ, _draft((0, 0.9), levels=1), [1]) == []
    assert form.select(SEQ, _draft((0, 0.9), levels=1, level_seconds=0.01), [1]) == [1]


def test_growth_ends_at_the_depth_and_without_candidates() -> None:
    form = Cost(depth=2, curve=FLAT)
    assert form.select(SEQ, _chain(0.9), [1]) == [1]
    assert form.select(SEQ, _chain(0.9, 0.9), [2]) == []
    assert form.select(SEQ, Draft(0), []) == []


def test_a_sure_draft_model_drafts_to_the_full_depth() -> None:
    table = torch.full((5, 5), -9.0) + 18 * torch.eye(5).roll(1, 1)  # after each token the next one
    form, seq = Cost(depth=18, curve=MILD), make_sequence([0, 1], max_tokens=200)
    decode(TableEngine(table), [seq], DraftModel(TableEngine(table), 5), form)
    assert len(seq.metrics.offered_by_depth) == 18


# -- names ----------------------------------------------------------------------------------------------------------


def test_a_cost_shape_is_written_with_its_options() -> None:
    form = shape("cost:nodes=9,depth=4,top_k=3")
    assert isinstance(form, Cost)
    assert (form.max_nodes, form.max_depth, form.top_k) == (9, 4, 3)
    assert repr(shape(repr(form))) == repr(form) == "cost:nodes=9,depth=4,top_k=3"
    assert not form.measured


@pytest.mark.parametrize("text", ["cost:nodes=1", "cost:depth=0", "cost:top_k=0", "cost:curve=1", "cost:nodes=x"])
def test_what_is_no_cost_shape_raises(text: str) -> None:
    with pytest.raises(OptionError, match=r"a cost shape needs|is not an option of this shape: it takes nodes, depth"):
        shape(text)
