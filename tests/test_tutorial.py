"""The functions by which the method is taught: exact on small trees, lossless on tiny models."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from tests.conftest import all_pairs, shown
from tests.tiny_models import CONTEXT, VOCAB, full_logits, some_tokens, tiny
from tokentree.errors import OptionError, PromptError, TreeError
from tokentree.tree import TokenTree
from tokentree.tutorial import (
    build_tree,
    create_tree_mask,
    extract_all_paths,
    find_best_path,
    path_probability,
    tree_speculative_decode,
)

A, B, C, D, E = 10, 11, 12, 13, 14
TAUGHT = [(A, -1), (B, 0), (C, 0), (D, 1), (E, 2)]
TAUGHT_MASK = [[1, 0, 0, 0, 0], [1, 1, 0, 0, 0], [1, 0, 1, 0, 0], [1, 1, 0, 1, 0], [1, 0, 1, 0, 1]]
FOREST = [(A, -1), (B, -1), (C, 0), (D, 1), (A, 1)]


def greedy(model: Any, context: list[int], length: int) -> list[int]:
    """What transformers' own greedy decoding makes of ``context``, up to ``length`` tokens in total."""
    ids: torch.Tensor = model.generate(torch.tensor([context]), do_sample=False, max_length=length)
    return [int(token) for token in ids[0]]


# -- reading trees ---------------------------------------------------------------------------------------------------


def test_mask_of_the_taught_example() -> None:
    mask = create_tree_mask(TAUGHT)
    assert mask.dtype == torch.int64
    assert mask.tolist() == TAUGHT_MASK


def test_mask_of_a_token_tree_has_its_root() -> None:
    tree = TokenTree(np.array([A, B, C, D, E]), np.array([-1, 0, 0, 1, 2]))
    assert create_tree_mask(tree).tolist() == TAUGHT_MASK
    assert extract_all_paths(tree) == [[0, 1, 3], [0, 2, 4]]


def test_mask_of_several_first_tokens() -> None:
    expected = [[1, 0, 0, 0, 0], [0, 1, 0, 0, 0], [1, 0, 1, 0, 0], [0, 1, 0, 1, 0], [0, 1, 0, 0, 1]]
    assert create_tree_mask(FOREST).tolist() == expected


def test_paths_and_their_probabilities() -> None:
    probs = [0.9, 0.7, 0.2, 0.1, 0.8]
    assert extract_all_paths(TAUGHT) == [[0, 1, 3], [0, 2, 4]]
    assert extract_all_paths(FOREST) == [[0, 2], [1, 3], [1, 4]]
    assert path_probability([0, 1, 3], probs) == pytest.approx(0.9 * 0.7 * 0.1)
    assert path_probability([], probs) == 1
    assert find_best_path(TAUGHT, probs) == [0, 2, 4]
    assert find_best_path(TAUGHT, torch.tensor(probs)) == [0, 2, 4]
    assert find_best_path(TAUGHT, [0.5] * 5) == [0, 1, 3]  # the first of equals


def test_an_empty_tree_has_an_empty_mask_and_no_path() -> None:
    assert create_tree_mask([]).shape == (0, 0)
    assert extract_all_paths([]) == []
    with pytest.raises(TreeError, match="empty"):
        find_best_path([], [])


@pytest.mark.parametrize(
    "pairs",
    [
        pytest.param([(A, 0)], id="its own parent"),
        pytest.param([(A, -1), (B, 2), (C, 0)], id="a parent behind"),
        pytest.param([(A, -2)], id="no such parent"),
        pytest.param([(A, -1, 0)], id="not a pair"),
        pytest.param([(A, -1), (B, 0), (B, 0)], id="equal siblings"),
        pytest.param([(A, -1), (A, -1)], id="equal first tokens"),
    ],
)
def test_pairs_that_are_no_tree(pairs: Any) -> None:
    for function in (create_tree_mask, extract_all_paths):
        with pytest.raises(TreeError):
            function(pairs)


@pytest.mark.parametrize("path", [[0, 5], [-1]])
def test_a_path_without_probabilities(path: list[int]) -> None:
    with pytest.raises(TreeError, match="without a probability"):
        path_probability(path, [0.5] * 5)


# -- growing one -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_a_tree_holds_the_most_probable_tokens_of_each_level(family: str) -> None:
    model, context = tiny(family), some_tokens(9)
    tree = build_tree(context, model, depth=3, branching=2)
    assert [parent for _, parent in tree] == [-1, -1, 0, 0, 1, 1, 2, 2, 3, 3, 4, 4, 5, 5]
    for node in range(-1, 6):
        path = [] if node < 0 else next(p[: p.index(node) + 1] for p in extract_all_paths(tree) if node in p)
        logits = full_logits(model, [*context, *(tree[i][0] for i in path)])[-1]
        assert [token for token, parent in tree if parent == node] == logits.topk(2).indices.tolist()


def test_a_context_may_be_a_list_or_a_tensor() -> None:
    model, context = tiny("llama"), some_tokens(5)
    expected = build_tree(context, model, 2, 3)
    assert build_tree(torch.tensor(context), model, 2, 3) == expected
    assert build_tree(torch.tensor([context]), model, 2, 3) == expected
    with pytest.raises(PromptError, match="one text"):
        build_tree(torch.tensor([context, context]), model, 2, 3)


def test_sizes_that_make_no_tree() -> None:
    model = tiny("llama")
    for depth, branching in [(0, 2), (2, 0), (-1, 1)]:
        with pytest.raises(OptionError, match="at least 1"):
            build_tree([5], model, depth, branching)
        with pytest.raises(OptionError, match="at least 1"):
            tree_speculative_decode([5], model, model, depth, branching)


@pytest.mark.parametrize("context", [[], [VOCAB], [-1], some_tokens(CONTEXT), some_tokens(CONTEXT - 2)])
def test_contexts_that_leave_no_tree(context: list[int]) -> None:
    with pytest.raises(PromptError):
        build_tree(context, tiny("llama"), depth=2, branching=2)


# -- decoding --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("size", "family"), all_pairs([(1, 1), (3, 2), (2, 4)], ["llama", "gpt2"]), ids=shown)
def test_decoding_gives_the_target_s_own_text(size: tuple[int, int], family: str) -> None:
    depth, branching = size
    target, draft = tiny(family), tiny("llama", seed=1)
    for context in (some_tokens(1), some_tokens(12, seed=1)):
        expected = greedy(target, context, 40)
        assert tree_speculative_decode(context, target, draft, depth, branching, max_tokens=40) == expected
        # a perfect draft model, whose paths are accepted as a whole
        assert tree_speculative_decode(torch.tensor([context]), target, target, depth, branching, 40) == expected


def test_max_tokens_counts_the_context() -> None:
    model, context = tiny("llama"), some_tokens(12)
    for length in (13, 14, 17):
        assert len(tree_speculative_decode(context, model, model, max_tokens=length)) == length
    assert tree_speculative_decode(context, model, model, max_tokens=12) == context
    assert tree_speculative_decode(context, model, model, max_tokens=5) == context


def test_decoding_ends_after_an_end_of_sequence_token() -> None:
    model, context = tiny("llama"), some_tokens(12)
    plain = greedy(model, context, 40)
    end = next(token for token in plain[15:] if token not in plain[12:15])
    assert model.generation_config is not None
    model.generation_config.eos_token_id = end
    ids = tree_speculative_decode(context, model, model, max_tokens=40)
    assert ids == plain[: plain.index(end, 12) + 1]
    assert ids == greedy(model, context, 40)


def test_best_path_is_lossy_and_takes_a_path_of_the_tree() -> None:
    target, draft, context = tiny("llama"), tiny("llama", seed=1), some_tokens(12)
    ids = tree_speculative_decode(context, target, draft, depth=2, branching=2, max_tokens=15, accept="best_path")
    tree = build_tree(context, draft, depth=2, branching=2)
    probs = [0.0] * len(tree)
    for path in extract_all_paths(tree):
        for place, node in enumerate(path):
            before = [*context, *(tree[i][0] for i in path[:place])]
            probs[node] = float(full_logits(target, before)[-1].softmax(-1)[tree[node][0]])
    best = [tree[node][0] for node in find_best_path(tree, probs)]
    assert ids[:14] == [*context, *best]
    assert ids != greedy(target, context, 15)


def test_an_unknown_rule() -> None:
    with pytest.raises(OptionError, match="unknown acceptance rule"):
        tree_speculative_decode([5], tiny("llama"), tiny("llama"), accept="best")
