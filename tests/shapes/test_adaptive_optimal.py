"""Adaptive trees, and the best static trees for known rates."""

from __future__ import annotations

import math
from collections.abc import Iterator
from functools import cache

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
from tokentree.shapes import Adaptive, Static, optimal_paths, shape

VOCAB = 6
SEQ = make_sequence([0])
Path = tuple[int, ...]


def _fan(*probs: float, sampled: bool = False) -> Draft:
    draft = Draft(0, {} if sampled else None)
    for rank, prob in enumerate(probs):
        draft.add(0, rank, math.log(prob), rank)
    return draft


def _successors(prob: float) -> torch.Tensor:
    """[vocab, vocab] logits: each token is followed by the next one, with probability ``prob``."""
    probs = torch.full((VOCAB, VOCAB), (1 - prob) / (VOCAB - 1))
    return probs.masked_fill(torch.eye(VOCAB).roll(1, 1).bool(), prob).log()


def _grown(form: Adaptive, table: torch.Tensor, sampled: bool = False, seed: int = 0) -> Draft:
    drafter = DraftModel(TableEngine(table), VOCAB)
    seq = make_sequence([0, 1], temperature=1.0, seed=seed)
    drafter.prefill([seq])
    return form.prune(seq, drafter.propose([seq], form, sampled)[0])


# -- adaptive -------------------------------------------------------------------------------------------------------


def test_a_sure_token_gets_one_branch_and_an_open_choice_several() -> None:
    assert len(Adaptive().prune(SEQ, _fan(0.97, 0.01, 0.01, 0.01))) == 2
    assert len(Adaptive().prune(SEQ, _fan(0.5, 0.2, 0.15, 0.1))) == 4  # until they hold 0.8
    assert len(Adaptive(width=4).prune(SEQ, _fan(*[0.15] * 6))) == 5
    assert len(Adaptive(width=2).prune(SEQ, _fan(*[0.15] * 6))) == 3


def test_children_are_counted_by_score_and_not_by_order() -> None:
    assert Adaptive(mass=0.7).prune(SEQ, _fan(0.12, 0.75, 0.13)).tokens == [0, 1]


def test_a_probable_path_goes_to_the_full_depth_and_an_improbable_one_ends_early() -> None:
    sure = _grown(Adaptive(), _successors(0.97))
    assert sure.depths == list(range(9))
    assert max(_grown(Adaptive(depth=5), _successors(0.97)).depths) == 5
    assert max(_grown(Adaptive(), _successors(0.5)).depths) == 3  # 0.5 ** 4 is less than 0.1
    assert max(_grown(Adaptive(min_prob=0.2), _successors(0.5)).depths) == 2
    assert max(_grown(Adaptive(), _successors(1 / VOCAB)).depths) == 1


@given(drafts(), st.floats(0.05, 1), st.integers(1, 4), st.integers(1, 4), st.floats(0, 0.5), st.integers(2, 12))
def test_what_is_kept_is_the_most_probable_of_what_the_rules_allow(
    draft: Draft, mass: float, width: int, depth: int, least: float, nodes: int
) -> None:
    form = Adaptive(mass, width, depth, least, nodes)
    kept = form.prune(SEQ, draft)
    assert len(kept) <= nodes
    assert max(kept.depths) <= depth
    assert all(math.exp(score) >= least for score in kept.log_scores)
    for below in kept.tree.children:
        assert len(below) <= width
        probs = sorted((math.exp(kept.log_probs[child]) for child in below), reverse=True)
        assert sum(probs[:-1]) < mass
    if len(kept) < nodes:  # then nothing that the rules allow is missing
        more = Adaptive(mass, width, depth, least, 100).prune(SEQ, draft)
        assert len(more) == len(kept)


@given(numbers, st.integers(1, 4), st.integers(2, 16))
def test_drawn_children_are_fixed_in_number_and_never_dropped(seed: int, width: int, nodes: int) -> None:
    form = Adaptive(width=width, nodes=nodes, min_prob=0.01)
    draft = _grown(form, random_table(VOCAB, 2, seed, 3.0), sampled=True, seed=seed)
    assert 2 <= len(draft) <= nodes
    assert form.prune(SEQ, draft) is draft
    wanted = [1 if node and draft.log_probs[node] >= math.log(0.8) else width for node in range(len(draft))]
    full = [len(below) == want for below, want in zip(draft.tree.children, wanted) if below]
    assert sum(not whole for whole in full) <= 1  # where the last nodes went


def test_a_sure_draw_gets_one_child_and_any_other_the_full_width() -> None:
    draft = _fan(0.9, 0.05, sampled=True)
    assert Adaptive(width=3).counts(SEQ, draft, [1, 2]) == [1, 3]
    assert Adaptive(width=3).counts(SEQ, Draft(0, {}), [0]) == [3]
    assert Adaptive(width=3, nodes=5).counts(SEQ, draft, [2, 1]) == [2, 0]


@pytest.mark.parametrize("accept", ["match", "rejection"])
def test_an_adaptive_tree_is_decoded_to_its_end(accept: str) -> None:
    table = random_table(VOCAB, 2, 3, 3.0)
    seq = make_sequence([0, 1], max_tokens=50, temperature=1.0, seed=2)
    texts = decode(TableEngine(table), [seq], DraftModel(TableEngine(table), VOCAB), "adaptive", accept)
    assert len(texts[0]) == 50
    assert seq.metrics.mean_accepted_length > 1.5
    if accept == "match":
        plain = decode(TableEngine(table), [make_sequence([0, 1], max_tokens=50, temperature=1.0, seed=2)])
        assert texts == plain


@pytest.mark.parametrize("text", ["adaptive", "adaptive:mass=0.7,width=3,depth=5,min_prob=0.05,nodes=9"])
def test_an_adaptive_shape_is_written_with_its_options(text: str) -> None:
    form = shape(text)
    assert isinstance(form, Adaptive)
    assert repr(shape(repr(form))) == repr(form)
    assert repr(form).startswith(text)
    assert (form.max_nodes, form.max_depth) == ((9, 5) if "nodes" in text else (16, 8))


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("adaptive:width=0", "width and depth of at least 1"),
        ("adaptive:depth=0", "width and depth of at least 1"),
        ("adaptive:nodes=1", "nodes of at least 2"),
        ("adaptive:mass=0", "are probabilities"),
        ("adaptive:mass=1.1", "are probabilities"),
        ("adaptive:mass=nan", "are probabilities"),
        ("adaptive:min_prob=1", "are probabilities"),
        ("adaptive:min_prob=-0.1", "are probabilities"),
        ("adaptive:branches=2", "it takes mass, width, depth, min_prob, nodes"),
        ("optimal:nodes=1", "nodes of at least 2"),
        ("optimal:depth=0", "depth of at least 1"),
        ("optimal:width=2", "it takes nodes, depth, as numbers"),
        ("optimal:nodes=many", "'nodes=many' is not an option of this shape"),
    ],
)
def test_what_is_no_such_shape_raises(text: str, says: str) -> None:
    with pytest.raises(OptionError, match=says):
        shape(text)


# -- optimal --------------------------------------------------------------------------------------------------------


@cache
def _trees(most: int, depth: int, ranks: int) -> frozenset[frozenset[Path]]:
    """Every tree of at most ``most`` candidates, as a set of rank paths."""
    known, new = set[frozenset[Path]](), {frozenset[Path]()}
    while new:
        known |= new
        new = {tree | {path} for tree in new if len(tree) < most for path in _leaves(tree, depth, ranks)}
    return frozenset(known)


def _leaves(tree: frozenset[Path], depth: int, ranks: int) -> Iterator[Path]:
    """What could be added to ``tree``."""
    for above in ((), *tree):
        if len(above) < depth:
            yield from ((*above, rank) for rank in range(ranks) if (*above, rank) not in tree)


def _expected(paths: frozenset[Path] | list[Path], rates: list[float]) -> float:
    return 1 + sum(math.prod(rates[rank] for rank in path) for path in paths)


@given(st.lists(st.floats(0, 1), min_size=1, max_size=3), st.integers(2, 6), st.integers(1, 3))
def test_no_other_tree_of_that_size_has_more_expected_tokens(rates: list[float], nodes: int, depth: int) -> None:
    expected, paths = optimal_paths(rates, nodes, depth)
    assert expected == pytest.approx(_expected(paths, rates))
    assert expected == pytest.approx(max(_expected(tree, rates) for tree in _trees(nodes - 1, depth, len(rates))))
    assert len(set(paths)) == len(paths) < nodes


@given(st.lists(st.floats(0.01, 1), min_size=1, max_size=6), st.integers(2, 24), st.integers(1, 8))
def test_an_optimal_tree_lists_prefixes_first_and_stays_within_its_depth(
    rates: list[float], nodes: int, depth: int
) -> None:
    expected, paths = optimal_paths(rates, nodes, depth)
    for place, path in enumerate(paths):
        assert len(path) <= depth
        assert path[:-1] in ((), *paths[:place])
    assert expected == pytest.approx(_expected(paths, rates))


def test_extreme_rates_give_chains_and_fans() -> None:
    assert optimal_paths([1.0], 5, 9) == (5, [(0,) * n for n in range(1, 5)])
    assert optimal_paths([0.3, 0.3, 0.3], 4, 9)[1] == [(0,), (1,), (2,)]
    assert optimal_paths([0.9, 0.1], 4, 2)[1] == [(0,), (1,), (0, 0)]
    assert optimal_paths([0.0, 0.0], 4, 2) == (1, [])
    assert optimal_paths([0.0, 0.5], 3, 3)[1] == [(1,), (1, 1)]


@pytest.mark.parametrize(
    ("rates", "nodes", "depth", "says"),
    [
        ([0.5], 1, 3, "nodes of at least 2"),
        ([0.5], 3, 0, "depth of at least 1"),
        ([], 3, 3, "probabilities, at least one"),
        ([0.5, 1.1], 3, 3, "probabilities, at least one"),
        ([-0.1], 3, 3, "probabilities, at least one"),
        ([math.nan], 3, 3, "probabilities, at least one"),
    ],
)
def test_what_is_no_tree_or_no_rate_raises(rates: list[float], nodes: int, depth: int, says: str) -> None:
    with pytest.raises(OptionError, match=says):
        optimal_paths(rates, nodes, depth)


def test_an_optimal_shape_is_a_static_one() -> None:
    form = shape("optimal:nodes=16,depth=6")
    assert isinstance(form, Static)
    assert (form.max_nodes, form.max_depth) == (16, 6)
    assert repr(shape("optimal")) == repr(form) == repr(shape(repr(form)))
    assert shape("optimal:nodes=5,depth=2").max_depth == 2
