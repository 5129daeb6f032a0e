"""Drafts as arrays: each compiled loop does what a few lines of Python do with lists."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.strategies import drafts, numbers
from tests.strategies import tokens as tokens_
from tokentree.draft import Draft
from tokentree.engines.output import TargetOutput
from tokentree.errors import RequestError, TreeError
from tokentree.shapes import worth

Node = tuple[int, int, int, int, int, float, float]  # token, parent, depth, rank, sources, log-probability and score
chances = st.floats(0.001, 1.0)


def nodes(draft: Draft) -> list[Node]:
    columns = (
        draft.tokens, draft.parents, draft.depths, draft.ranks, draft.sources, draft.log_probs, draft.log_scores
    )  # fmt: skip
    return list(zip(*columns, strict=True))


class Lists:
    """A draft as lists."""

    def __init__(self, root: int) -> None:
        self.nodes: list[list[Any]] = [[root, -1, 0, 0, 0, 0.0, 0.0]]

    def add(self, parent: int, token: int, log_prob: float, rank: int, source: int = 1) -> int:
        _, _, depth, *_, score = self.nodes[parent]
        self.nodes.append([token, parent, depth + 1, rank, source, log_prob, score + log_prob])
        return len(self.nodes) - 1

    def child(self, parent: int, token: int) -> int | None:
        return next((i for i, node in enumerate(self.nodes) if node[:2] == [token, parent]), None)

    def join(self, draft: Draft, source: int) -> None:
        where = [0]
        for token, parent, _, rank, _, log_prob, _ in nodes(draft)[1:]:
            known = self.child(where[parent], token)
            if known is None:
                known = self.add(where[parent], token, log_prob, rank, source)
            else:
                node = self.nodes[known]
                node[3:6] = min(node[3], rank), node[4] | source, max(node[5], log_prob)
            where.append(known)
        for node in self.nodes[1:]:
            node[6] = self.nodes[node[1]][6] + node[5]

    def add_paths(self, paths: list[list[int]], firsts: list[float], others: float) -> None:
        for path, first in zip(paths, firsts, strict=True):
            parent, log_prob = 0, first
            for token in path:
                known = self.child(parent, token)
                if known is None:
                    rank = sum(node[1] == parent for node in self.nodes)
                    known = self.add(parent, token, log_prob, rank)
                parent, log_prob = known, others

    @property
    def all(self) -> list[Node]:
        return [tuple(node) for node in self.nodes]


@given(st.lists(drafts(), max_size=4), tokens_)
def test_drafts_are_joined(parts: list[Draft], root: int) -> None:
    joined, expected = Draft(root), Lists(root)
    for bit, part in enumerate(parts):
        joined.join(part, 1 << bit)
        expected.join(part, 1 << bit)
    assert nodes(joined) == expected.all


@given(st.lists(st.tuples(st.lists(tokens_, max_size=7), chances), max_size=5), tokens_, chances)
def test_paths_are_added(paths: list[tuple[list[int], float]], root: int, others: float) -> None:
    draft, expected = Draft(root), Lists(root)
    for one in draft, expected:
        one.add_paths([path for path, _ in paths], [math.log(prob) for _, prob in paths], others)
    assert nodes(draft) == expected.all


@given(numbers, st.integers(0, 200))
def test_a_draft_is_made_of_arrays(seed: int, count: int) -> None:
    rng = np.random.default_rng(seed)
    tokens, parents, probs = rng.integers(0, 9, count), rng.integers(0, np.arange(count) + 1), rng.random(count)
    expected, ranks = Lists(3), [0] * (count + 1)
    for token, parent, score in zip(tokens.tolist(), parents.tolist(), map(math.log, probs.tolist()), strict=True):
        expected.add(parent, token, score, ranks[parent])
        ranks[parent] += 1
    assert nodes(Draft.grown(3, tokens, parents, probs)) == expected.all


@given(drafts(), numbers)
def test_a_level_is_added(draft: Draft, seed: int) -> None:
    rng = np.random.default_rng(seed)
    frontier = rng.permutation(len(draft))[: int(rng.integers(0, 5))].tolist()
    counts = rng.integers(0, 6, len(frontier)).tolist()
    tokens = rng.integers(0, 99, (len(frontier), 4))
    log_probs = -rng.random((len(frontier), 4)).astype(np.float32)
    log_probs[rng.random(log_probs.shape) < 0.2] = -np.inf  # a rule forbids it
    expected = Lists(0)
    expected.nodes = [list(node) for node in nodes(draft)]
    level = [
        expected.add(node, int(tokens[i, rank]), float(log_probs[i, rank]), rank)
        for i, (node, count) in enumerate(zip(frontier, counts, strict=True))
        for rank in range(min(count, 4))
        if log_probs[i, rank] > -np.inf
    ]
    assert draft.add_level(frontier, counts, tokens, log_probs) == level
    assert nodes(draft) == expected.all


@given(drafts(), numbers)
def test_a_part_is_taken(draft: Draft, seed: int) -> None:
    rng, kept = np.random.default_rng(seed), [0]
    for node, parent in enumerate(draft.parents[1:], start=1):
        if parent in kept and rng.random() < 0.7:
            kept.append(node)
    expected = [(t, kept.index(p) if i else -1, *rest) for i, (t, p, *rest) in enumerate(nodes(draft)) if i in kept]
    assert nodes(draft.take(kept)) == expected
    deepest = int(rng.integers(0, draft.depth + 2))
    shallow = [node for node, depth in enumerate(draft.depths) if depth <= deepest]
    assert nodes(draft.cut(deepest)) == nodes(draft.take(shallow))


def test_a_draft_grows_beyond_its_first_room() -> None:
    draft, expected = Draft(0), Lists(0)
    for token in range(200):
        assert draft.add(token // 2, token, -0.5, token % 2) == expected.add(token // 2, token, -0.5, token % 2)
    assert nodes(draft) == expected.all
    assert draft.tree.tokens.tolist() == draft.tokens


@pytest.mark.parametrize("wrong", [{"token": 1.5}, {"token": 2**63}, {"rank": "a"}, {"token": None}])
def test_a_node_that_can_not_be_held_is_refused(wrong: dict[str, Any]) -> None:
    draft = Draft(0)
    with pytest.raises(TreeError, match="whole numbers"):
        draft.add(**{"parent": 0, "token": 1, "log_prob": 0.0, "rank": 0, **wrong})
    assert len(draft) == 1


@given(drafts(), numbers, st.booleans())
def test_the_walk_follows_the_most_probable_tokens(draft: Draft, seed: int, broken: bool) -> None:
    rng, tree = np.random.default_rng(seed), draft.tree
    first = int(rng.integers(0, 3))  # rows of another tree come before
    ids, logits = rng.integers(0, 4, (first + len(tree), 8)), rng.random((first + len(tree), 8)).astype(np.float32)
    if broken:
        logits[rng.integers(0, len(logits)), 0] = np.nan
    path, tokens, node = [0], list[int](), 0
    while not (nan := bool(np.isnan(logits[first + node, 0]))):
        tokens.append(int(ids[first + node, 0]))
        child = tree.child(node, tokens[-1])
        if child is None:
            break
        path.append(child)
        node = child
    step = TargetOutput(torch.zeros(len(ids), 8), [0, first], [0, 0], 0.0, (logits, ids)).after(1).follow(tree)
    assert (step.path, step.tokens) == (path[: len(tokens)], tokens)
    assert isinstance(step.error, RequestError) is nan
    assert step.refused is (not nan and not tree.is_leaf(node))


@given(drafts(), drafts(), numbers)
def test_what_a_draft_has_beside_others(draft: Draft, theirs: Draft, seed: int) -> None:
    rng = np.random.default_rng(seed)
    joint, their_joint = (rng.random(len(one)) * (rng.random(len(one)) < 0.9) for one in (draft, theirs))
    where, together, covered = [0], their_joint.tolist(), list[float]()
    for node, (token, parent) in enumerate(zip(draft.tokens, draft.parents, strict=True)):
        if node:
            known = theirs.tree.child(where[parent], token) if where[parent] >= 0 else None
            where.append(-1 if known is None else known)
        other = where[node]
        if other < 0:
            together.append(joint[node])
        below = [their_joint[child] for child in theirs.tree.children[other]] if other >= 0 else []
        covered.append(min(1.0, sum(below) / their_joint[other]) if other >= 0 and their_joint[other] else 0.0)
    found = worth.beside(draft.ints, joint, theirs.ints, their_joint)
    assert [each.tolist() for each in found] == [together, pytest.approx(covered)]


@given(st.lists(chances, min_size=1, max_size=12), numbers)
def test_the_best_size_has_the_most_tokens_per_second(joint: list[float], seed: int) -> None:
    rng = np.random.default_rng(seed)
    times, spent = np.cumsum(rng.random(len(joint) + 1) + 0.01), float(rng.random())
    ordered = sorted(joint, reverse=True)
    paces = [sum(ordered[:rows]) / (times[rows] + spent) for rows in range(1, len(joint) + 1)]
    rows, tokens = worth.best_size(np.array(joint), times, spent)
    assert paces[rows - 1] == pytest.approx(max(paces))
    assert tokens == pytest.approx(sum(ordered[:rows]))


@given(drafts(), numbers, st.integers(1, 4))
def test_a_level_is_expanded_where_it_pays(draft: Draft, seed: int, top_k: int) -> None:
    rng = np.random.default_rng(seed)
    joint, covered, ahead = rng.random(len(draft)), rng.random(len(draft)) / 2, rng.random(top_k)
    level = np.sort(rng.permutation(len(draft))[:6])
    rows, tokens = int(rng.integers(1, 9)), float(rng.random()) + 1
    times, spent, level_seconds = np.cumsum(rng.random(40) / 5 + 0.01), float(rng.random()), float(rng.random()) / 5
    row = (times[rows + 4] - times[rows]) / 4
    best = sorted(level.tolist(), key=lambda node: -joint[node])[:top_k]
    gains = {node: joint[node] * (1 - covered[node]) * ahead for node in best}
    gains = {node: gain[gain > row * tokens / (times[rows] + spent)] for node, gain in gains.items()}
    more, gained = sum(map(len, gains.values())), sum(float(gain.sum()) for gain in gains.values())
    after = times[rows + more] + spent + level_seconds
    pays, picked = worth.expanded(
        joint, covered, level, ahead, top_k, rows, tokens, times, spent, level_seconds
    )  # fmt: skip
    assert picked.tolist() == sorted(node for node, gain in gains.items() if len(gain))
    assert pays is bool(more and (tokens + gained) / after > tokens / (times[rows] + spent))
