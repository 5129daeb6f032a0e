"""Shapes: how many children, which are expanded, what is cut; and how they are written."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.conftest import make_sequence, random_table
from tests.strategies import drafts, numbers
from tokentree.draft import Draft
from tokentree.drafters.draft_model import DraftModel
from tokentree.engines.table import TableEngine
from tokentree.errors import OptionError
from tokentree.shapes import Dynamic, Shape, Static, shape

VOCAB = 6
SEQ = make_sequence([0], temperature=1.0)
HOLES = ((0, 0), (0, 2), (2,), (2, 1, 3), (4,))


def _grown(form: Shape, sampled: bool = False, seed: int = 0) -> Draft:
    """What a draft model grows under ``form``."""
    drafter = DraftModel(TableEngine(random_table(VOCAB, 2, seed, 2.0)), VOCAB)
    seq = make_sequence([0, 1], temperature=1.0, seed=seed)
    drafter.prefill([seq])
    return form.cut([seq], drafter.propose([seq], form, sampled))[0]


def _rank_paths(draft: Draft) -> set[tuple[int, ...]]:
    return {draft.rank_path(node) for node in range(1, len(draft))}


def _outline(draft: Draft) -> list[list[int]]:
    """How many children the nodes of each depth have."""
    rows: list[list[int]] = [[] for _ in range(max(draft.depths) + 1)]
    for node, below in enumerate(draft.tree.children):
        rows[draft.depths[node]].append(len(below))
    return rows


# -- static ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sampled", [False, True])
@given(branching=st.lists(st.integers(1, 3), min_size=1, max_size=3), seed=numbers)
def test_branching_gives_every_node_of_a_depth_as_many_children(sampled: bool, branching: list[int], seed: int) -> None:
    form = Static(branching)
    draft = _grown(form, sampled, seed)
    widths = [math.prod(branching[:depth]) for depth in range(len(branching) + 1)]
    assert _outline(draft) == [[b] * w for b, w in zip([*branching, 0], widths, strict=True)]
    assert (form.max_nodes, form.max_depth) == (len(draft), max(draft.depths))


@given(numbers)
def test_explicit_paths_pick_exactly_these_ranks(seed: int) -> None:
    form = Static(paths=HOLES)
    draft = _grown(form, seed=seed)
    assert _rank_paths(draft) == {*HOLES, (0,), (2, 1)}
    assert (form.max_nodes, form.max_depth) == (len(draft), max(draft.depths))
    engine = TableEngine(random_table(VOCAB, 2, seed, 2.0))
    for node in range(1, len(draft)):  # a rank is the place in the draft model's own order
        before = [0, 1, *draft.path_tokens(node)[:-1]]
        order = engine.logits_after(before).argsort(descending=True)
        assert draft.tokens[node] == order[draft.ranks[node]]


@given(numbers)
def test_drawn_children_take_the_places_of_the_ranks_that_are_there(seed: int) -> None:
    form = Static(paths=HOLES)
    draft = _grown(form, sampled=True, seed=seed)
    # the ranks 0, 2, 4 of the root are its draws 0, 1, 2; below, each node's ranks are counted in the same way
    assert _rank_paths(draft) == {(0,), (0, 0), (0, 1), (1,), (1, 0), (1, 0, 0), (2,)}
    assert len(draft) == form.max_nodes


def test_counts_of_picked_children_reach_the_highest_rank() -> None:
    draft = Draft(0)
    best, _, third = (draft.add(0, token, -1.0 - token, token) for token in range(3))
    form = Static(paths=HOLES)
    assert form.counts(SEQ, draft, [0]) == [5]
    assert form.select(SEQ, draft, [1, 2, 3]) == [best, third]
    assert form.counts(SEQ, draft, [best, third]) == [3, 2]


@pytest.mark.parametrize("form", [Static([2, 1, 2]), Static(paths=HOLES), Static(paths=[(1,), (0, 1)])])
@given(draft=drafts())
def test_pruning_a_bigger_draft_keeps_the_best_of_each_family(form: Static, draft: Draft) -> None:
    kept = form.prune(SEQ, draft)
    places: dict[int, tuple[int, ...]] = {0: ()}  # each node's ranks by score; a draft adds siblings best first
    for node, below in enumerate(draft.tree.children):
        places |= {child: (*places[node], rank) for rank, child in enumerate(below)}

    def wanted(place: tuple[int, ...]) -> bool:
        if form.branching:
            return len(place) <= 3 and all(rank < width for rank, width in zip(place, form.branching))
        return all(place[:end] in form.choices for end in range(1, len(place) + 1))

    expected = [node for node, place in sorted(places.items()) if wanted(place)]
    assert kept.tree.paths() == draft.tree.take(expected).paths()  # type: ignore[arg-type]
    assert kept.log_scores == [draft.log_scores[node] for node in expected]
    assert len(kept) <= form.max_nodes


def test_pruning_counts_ranks_by_score_and_not_by_order() -> None:
    draft = Draft(0)
    for token, score in enumerate([-3.0, -1.0, -2.0]):
        draft.add(0, token, score, token)
    assert Static([2]).prune(SEQ, draft).tokens == [0, 1, 2]
    assert Static(paths=[(2,)]).prune(SEQ, draft).tokens == [0, 0]


# -- dynamic --------------------------------------------------------------------------------------------------------


@given(numbers, st.integers(2, VOCAB), st.integers(1, 3))
def test_dynamic_keeps_the_most_probable_nodes_of_all(seed: int, nodes: int, depth: int) -> None:
    draft = _grown(Dynamic(nodes, depth, VOCAB, 0, 0), seed=seed)
    engine = TableEngine(random_table(VOCAB, 2, seed, 2.0))
    scores = {}
    for length in range(1, depth + 1):
        for path in itertools.product(range(VOCAB), repeat=length):
            scores[path] = sum(
                float(engine.logits_after([0, 1, *path[:end]]).log_softmax(-1)[path[end]]) for end in range(length)
            )
    best = sorted(scores, key=scores.__getitem__, reverse=True)[: nodes - 1]
    assert {tuple(draft.path_tokens(node)) for node in range(1, len(draft))} == set(best)


@pytest.mark.parametrize("sampled", [False, True])
@given(nodes=st.integers(2, 20), depth=st.integers(1, 4), top_k=st.integers(1, 4), seed=numbers)
def test_dynamic_stays_within_nodes_depth_and_width(
    sampled: bool, nodes: int, depth: int, top_k: int, seed: int
) -> None:
    draft = _grown(Dynamic(nodes, depth, top_k, 0, 0), sampled, seed)
    outline = _outline(draft)
    assert 2 <= len(draft) <= nodes
    assert len(outline) - 1 <= depth
    assert max(map(max, outline)) <= top_k
    assert all(sum(count > 0 for count in row) <= top_k for row in outline)


@given(drafts(), st.integers(2, 8), st.integers(1, 3))
def test_reranking_keeps_the_most_probable_nodes_and_their_parents(draft: Draft, nodes: int, depth: int) -> None:
    kept = Dynamic(nodes, depth, 8, 0, 0).prune(SEQ, draft)  # a draft that is not a tree any more would raise in here
    shallow = sorted((s for s, d in zip(draft.log_scores, draft.depths) if d <= depth), reverse=True)
    assert sorted(kept.log_scores, reverse=True) == shallow[:nodes]
    assert set(map(tuple, kept.tree.paths())) <= {
        tuple(draft.path_tokens(node)) for node in range(len(draft)) if draft.depths[node] <= depth
    }


@given(st.integers(2, 20), st.integers(1, 4), st.integers(1, 4), st.lists(st.floats(-9, 0), min_size=1, max_size=6))
def test_counts_of_drawn_children_never_exceed_the_budget(
    nodes: int, depth: int, top_k: int, scores: list[float]
) -> None:
    form = Dynamic(nodes, depth, top_k, 0, 0)
    draft = Draft(0, {})
    first = form.counts(SEQ, draft, [0])
    assert 1 <= first[0] <= min(top_k, nodes - 1)
    for rank, score in enumerate(sorted(scores, reverse=True)[: first[0]]):
        draft.add(0, rank, score, rank)
    frontier = form.select(SEQ, draft, list(range(1, len(draft))))
    if frontier:
        counts = form.counts(SEQ, draft, frontier)
        assert len(draft) + sum(counts) <= nodes
        assert max(counts) <= top_k
        assert counts == sorted(counts, reverse=True)  # the more probable node first


@pytest.mark.parametrize("form", [Static([1]), Static(paths=[(0,)]), Dynamic(2, 1, 1)])
def test_drawn_children_are_never_dropped(form: Shape) -> None:
    probs = torch.full((VOCAB,), 1 / VOCAB, dtype=torch.float64)
    draft = Draft(0, {0: probs})
    for rank in range(3):
        draft.add(0, rank, -1.0, rank)
    assert form.prune(SEQ, draft) is draft


def test_dynamic_expands_no_drawn_node_when_the_budget_is_spent() -> None:
    draft = Draft(0, {})
    draft.add(0, 1, -0.1, 0)
    assert Dynamic(2, 3, 2).select(SEQ, draft, [1]) == []
    assert Dynamic(3, 3, 2).select(SEQ, draft, [1]) == [1]


@given(numbers, st.floats(0.01, 0.5))
def test_min_prob_leaves_out_picked_nodes_that_are_less_probable(seed: int, least: float) -> None:
    everything = _grown(Dynamic(30, 3, VOCAB, 0, 0), seed=seed)
    draft = _grown(Dynamic(30, 3, VOCAB, min_prob=least, min_reach=0), seed=seed)
    paths = {tuple(everything.path_tokens(i)) for i, s in enumerate(everything.log_scores) if math.exp(s) >= least}
    assert {tuple(draft.path_tokens(node)) for node in range(len(draft))} == paths


@pytest.mark.parametrize("sampled", [False, True])
@given(seed=numbers, least=st.floats(0.01, 0.9))
def test_min_reach_stops_the_growth_where_the_frontier_is_hardly_reached(
    sampled: bool, seed: int, least: float
) -> None:
    draft = _grown(Dynamic(40, 4, 2, min_prob=0, min_reach=least), sampled, seed)
    for depth in range(1, max(draft.depths)):
        reach = sum(math.exp(s) for s, d in zip(draft.log_scores, draft.depths) if d == depth)
        assert reach >= least - 1e-9


# -- names ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "max_nodes", "max_depth"),
    [
        ("2x2x2", 15, 3),
        (" 3 ", 4, 1),
        ("1x3", 5, 2),
        ("chain:4", 5, 4),
        ("paths:[[0],[0,0],[1]]", 4, 2),
        ("paths:[[2, 1]]", 3, 2),
        ("dynamic", 16, 6),
        ("dynamic:", 16, 6),
        ("dynamic:nodes=8,depth=4,top_k=3", 8, 4),
        ("dynamic:depth=2", 16, 2),
        ("dynamic:nodes=9,min_prob=0.25,min_reach=0.5", 9, 6),
    ],
)
def test_a_name_makes_its_shape_and_a_shape_writes_its_name(text: str, max_nodes: int, max_depth: int) -> None:
    for form in (shape(text), shape(repr(shape(text)))):
        assert (form.max_nodes, form.max_depth) == (max_nodes, max_depth)


def test_a_shape_is_its_own_name() -> None:
    form = Static([2])
    assert shape(form) is form


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "is not a shape: write cost, 2x2x2, chain:4"),
        ("tree", "'tree' is not a shape"),
        ("2x", "is not a shape"),
        ("2x-1", "is not a shape"),
        ("2.5x2", "is not a shape"),
        ("2x0", "a branching factor must be at least 1"),
        ("0", "a branching factor must be at least 1"),
        ("chain", "is not a shape"),
        ("chain:", "is not a shape"),
        ("chain:-2", "is not a shape"),
        ("chain:0", "a chain needs a length of at least 1"),
        ("paths:", "is not a list of rank paths: write paths:"),
        ("paths:[[0],", "is not a list of rank paths"),
        ("paths:[0]", "is not a list of rank paths"),
        ('paths:{"0": 1}', "is not a list of rank paths"),
        ("paths:[[true]]", "is not a list of rank paths"),
        ("paths:[[0.5]]", "is not a list of rank paths"),
        ("paths:[]", "at least one rank path"),
        ("paths:[[]]", "at least one rank path"),
        ("paths:[[-1]]", "ranks count from 0"),
        ("dynamic:size=3", "'size=3' is not an option of this shape: it takes nodes, depth, top_k"),
        ("dynamic:nodes", "'nodes' is not an option of this shape"),
        ("dynamic:nodes=many", "'nodes=many' is not an option of this shape"),
        ("dynamic:nodes=2.5", "'nodes=2.5' is not an option of this shape"),
        ("dynamic:nodes=1", "nodes of at least 2"),
        ("dynamic:depth=0", "depth of at least 1"),
        ("dynamic:top_k=0", "top_k of at least 1"),
        ("dynamic:min_prob=1.5", "are probabilities below 1"),
        ("dynamic:min_reach=nan", "are probabilities below 1"),
    ],
)
def test_a_text_that_names_no_shape_says_what_would(text: str, says: str) -> None:
    with pytest.raises(OptionError, match=says.replace("[", r"\[")):
        shape(text)


def test_a_static_shape_takes_either_branching_or_paths() -> None:
    for options in ({}, {"branching": (2,), "paths": [(0,)]}):
        with pytest.raises(OptionError, match="a branching factor for at least one depth, or at least one rank path"):
            Static(**options)  # type: ignore[arg-type]
