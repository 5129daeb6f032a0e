"""TokenTree against its definition."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.strategies import path_sets, token_trees, tokens
from tokentree.errors import TreeError
from tokentree.tree import TokenTree


def _prefixes(paths: list[list[int]]) -> set[tuple[int, ...]]:
    return {tuple(path[:end]) for path in paths for end in range(1, len(path) + 1)}


def _named(tree: TokenTree) -> list[tuple[int, ...]]:
    """Each node's tokens below the root, found by walking up."""
    names = []
    for start in range(len(tree)):
        node, name = start, list[int]()
        while node != 0:
            name.append(int(tree.tokens[node]))
            node = int(tree.parents[node])
        names.append(tuple(name[::-1]))
    return names


# -- ways to make one -----------------------------------------------------------------------------------------------


@given(tokens, path_sets)
def test_from_paths_holds_each_prefix_once(root: int, paths: list[list[int]]) -> None:
    tree = TokenTree.from_paths(root, paths)
    assert sorted(_named(tree)) == sorted({(), *_prefixes(paths)})
    assert tree.tokens[0] == root


@given(token_trees())
def test_the_paths_of_a_tree_make_the_tree_again(tree: TokenTree) -> None:
    again = TokenTree.from_paths(int(tree.tokens[0]), tree.paths() if len(tree) > 1 else [])
    assert sorted(_named(again)) == sorted(_named(tree))
    assert len(tree.paths()) == len(tree.leaves)


@given(tokens, st.lists(tokens, max_size=8))
def test_a_chain_is_one_path(root: int, path: list[int]) -> None:
    chain = TokenTree.chain(root, path)
    assert chain.is_chain
    assert chain.tokens.tolist() == [root, *path]
    assert chain.paths() == [path]


@given(token_trees())
def test_is_chain_means_one_child_per_node_in_order(tree: TokenTree) -> None:
    assert tree.is_chain == all(len(below) <= 1 for below in tree.children)


def test_a_root_alone_is_plain_decoding() -> None:
    tree = TokenTree.root(7)
    assert (len(tree), tree.paths(), tree.depths.tolist(), tree.mask.tolist()) == (1, [[]], [0], [[True]])


# -- what it looks like ---------------------------------------------------------------------------------------------


@given(token_trees())
def test_depth_is_the_length_of_the_path(tree: TokenTree) -> None:
    assert tree.depths.tolist() == [len(name) for name in _named(tree)]


@given(token_trees())
def test_mask_is_reachability(tree: TokenTree) -> None:
    step = np.zeros((len(tree), len(tree)), dtype=np.int64)  # one step up
    for node in range(1, len(tree)):
        step[node, tree.parents[node]] = 1
    reach = sum(np.linalg.matrix_power(step, times) for times in range(len(tree)))
    assert (tree.mask == (reach > 0)).all()
    assert (tree.mask.sum(1) == tree.depths + 1).all()


@given(token_trees())
def test_path_children_and_child_agree_with_parents(tree: TokenTree) -> None:
    for node, name in enumerate(_named(tree)):
        path = tree.path(node)
        assert path[0] == 0
        assert path[-1] == node
        assert tuple(tree.tokens[path[1:]].tolist()) == name
        assert list(tree.children[node]) == np.flatnonzero(tree.parents == node).tolist()
        by_token = {int(tree.tokens[child]): child for child in tree.children[node]}
        assert [tree.child(node, token) for token in range(7)] == [by_token.get(token) for token in range(7)]


@given(token_trees())
def test_leaves_are_the_nodes_that_are_no_parent(tree: TokenTree) -> None:
    assert tree.leaves.tolist() == sorted(set(range(len(tree))) - set(tree.parents.tolist()))


def test_a_tree_can_not_be_changed() -> None:
    given_tokens = np.array([1, 2])
    tree = TokenTree(given_tokens, np.array([-1, 0]))
    given_tokens[1] = 5
    assert tree.tokens.tolist() == [1, 2]
    with pytest.raises(ValueError, match="read-only"):
        tree.parents[1] = 0


# -- other orders and parts -----------------------------------------------------------------------------------------


@given(token_trees())
def test_taking_all_nodes_in_another_order_keeps_the_tree(tree: TokenTree) -> None:
    def below(node: int) -> list[int]:
        return [node, *itertools.chain.from_iterable(below(child) for child in tree.children[node])]

    for order in (np.array(below(0)), np.argsort(tree.depths, kind="stable")):
        assert _named(tree.take(order)) == [_named(tree)[node] for node in order]


@given(token_trees(), st.data())
def test_take_keeps_the_paths_of_the_nodes_taken(tree: TokenTree, data: st.DataObject) -> None:
    ends = data.draw(st.sets(st.integers(0, len(tree) - 1)))
    kept = sorted({0, *itertools.chain.from_iterable(map(tree.path, ends))})
    assert _named(tree.take(np.array(kept))) == [_named(tree)[node] for node in kept]


# -- what is not a tree ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("node_tokens", "parents", "says"),
    [
        ([], [], "at least a root"),
        ([1, 2], [-1], "as many parents as tokens"),
        ([[1]], [[-1]], "as many parents as tokens"),
        ([1], [0], "only node 0 is without one"),
        ([1, 2], [-1, -1], "only node 0 is without one"),
        ([1, 2], [-1, 1], "before their children"),
        ([1, 2, 3], [-1, 2, 0], "before their children"),
        ([1, 2, 2], [-1, 0, 0], "siblings"),
    ],
)
def test_arrays_that_are_no_tree_raise(node_tokens: list[int], parents: list[int], says: str) -> None:
    with pytest.raises(TreeError, match=says):
        TokenTree(np.array(node_tokens), np.array(parents))


def test_equal_tokens_below_different_parents_are_fine() -> None:
    assert TokenTree(np.array([2, 2, 3, 2]), np.array([-1, 0, 0, 2])).paths() == [[2], [3, 2]]


@pytest.mark.parametrize(
    ("nodes", "says"),
    [
        ([], "starts at the root"),
        ([1, 0], "starts at the root"),
        ([0, 2], "the parent of each"),
        ([0, 2, 1], "before their children"),
        ([0, 1, 1], "siblings"),
    ],
)
def test_taking_a_node_without_its_parent_raises(nodes: list[int], says: str) -> None:
    with pytest.raises(TreeError, match=says):
        TokenTree.chain(0, [1, 2]).take(np.array(nodes, dtype=np.int64))
