"""The rules that judge drafts as a whole, `block` and `traversal`: exact, by the enumeration of `test_lossless`, and no
shorter than `rejection`. Variants that are known to be wrong must fail the same proof."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch

from tests.conftest import all_pairs, by_night, decode, make_sequence, random_table
from tests.test_lossless import (
    PROMPT,
    S3,
    SMALLER,
    T3,
    TARGET,
    VOCAB,
    WIDE,
    DropsTheLeastLikelyDraw,
    MergesDraws,
    Numbers,
    SortsDraws,
    _merged,
    _outcomes,
    _wide_drafter,
    _wide_requests,
    _without,
    decoder_maker,
    distance,
    target_law,
    text_law,
)
from tokentree.acceptance import Acceptance, Block, Match, NodeLogits, Rejection, Traversal, acceptance, base, traversal
from tokentree.decoder import Decoder
from tokentree.draft import Draft
from tokentree.drafters.base import Drafter
from tokentree.drafters.draft_model import DraftModel
from tokentree.drafters.drawing import draw
from tokentree.drafters.lookup.ngram import NGram
from tokentree.engines.output import TargetOutput
from tokentree.engines.table import TableEngine
from tokentree.errors import PairingError, RequestError
from tokentree.sampling import to_probs
from tokentree.sequence import ACCEPT, DRAFT, Accepted, Sequence
from tokentree.shapes import Shape, shape

WRONG_SHOWS = random_table(3, 2, seed=11), random_table(3, 2, seed=21)  # on a chain too, as on few random tables

# -- exact ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("rule", "form", "params"),
    [
        (Block, "chain:1", {"max_tokens": 2}),
        (Block, "chain:2", {"max_tokens": 4}),
        (Block, "chain:3", {"max_tokens": 4, "top_k": 3}),
        (Block, "chain:2", {"max_tokens": 3, "top_p": 0.8}),
        (Block, "chain:2", {"max_tokens": 3, "min_p": 0.3, "temperature": 1.4}),
        (Block, "chain:2", {"max_tokens": 3, "repetition_penalty": 1.5, "frequency_penalty": 0.4, "top_k": 3}),
        (Traversal, "4", {"max_tokens": 2}),
        (Traversal, "chain:3", {"max_tokens": 4, "top_k": 3}),
        (Traversal, "1x2", {"max_tokens": 3}),
        (Traversal, "2x1", {"max_tokens": 4, "temperature": 0.7, "top_k": 3}),
        (Traversal, "paths:[[0],[0,1],[2],[2,0]]", {"max_tokens": 3, "top_k": 3}),
        (Traversal, "dynamic:nodes=4,depth=2,top_k=2", {"max_tokens": 3, "top_k": 3}),
        (Traversal, "dynamic:nodes=4,depth=2,top_k=2,min_reach=0.6", {"max_tokens": 3, "top_k": 3}),
        (Traversal, "2x1", {"max_tokens": 3, "top_p": 0.8}),
        (Traversal, "2x1", {"max_tokens": 3, "repetition_penalty": 1.5, "frequency_penalty": 0.4, "top_k": 3}),
    ],
)
def test_texts_have_the_target_s_distribution(rule: Any, form: str, params: dict[str, Any]) -> None:
    params = {"temperature": 1.0} | params
    law = text_law(decoder_maker(form, rule()), **params)
    assert sum(law.values()) == pytest.approx(1, abs=1e-9)
    assert distance(law, target_law(**params)) < 1e-9


@pytest.mark.parametrize(("form", "rule"), all_pairs(["2x1x1", "2x2", "3x1"], [Rejection, Traversal]))
def test_texts_of_wider_trees_have_it_too(form: str, rule: Any) -> None:
    params: dict[str, Any] = {"max_tokens": 3, "temperature": 1.0}
    make = decoder_maker(form, rule(), lambda: DraftModel(TableEngine(S3), 3), T3)
    assert distance(text_law(make, **params), target_law(T3, **params)) < 1e-9


SUPPORTS = [
    (T3, _without(S3, 0)),
    (T3, _without(S3, 0, 1)),  # only one token is drafted
    (_without(T3, 0), S3),  # what the target can't write is drafted
    (_without(T3, 0, 1), _without(S3, 2)),  # nothing in common
    (T3, T3),  # the drafter is the target
    (T3, 5 * S3),
    (_without(random_table(4, 2, seed=6), 3), random_table(3, 2, seed=3)),  # a smaller vocabulary
]


@pytest.mark.parametrize(("rule", "form"), [(Block, "chain:2"), (Traversal, "2x1")])
@pytest.mark.parametrize(("table", "smaller"), SUPPORTS)
def test_any_support_will_do(rule: Any, form: str, table: torch.Tensor, smaller: torch.Tensor) -> None:
    make = decoder_maker(form, rule(), lambda: DraftModel(TableEngine(smaller), table.shape[-1]), table)
    params: dict[str, Any] = {"max_tokens": 3, "temperature": 1.0}
    assert distance(text_law(make, **params), target_law(table, **params)) < 1e-9


class Picks(DraftModel):
    """Picks the most probable children."""

    draws_children = False

    def propose(self, seqs: list[Sequence], shape: Shape, sampled: bool) -> list[Draft]:
        return super().propose(seqs, shape, sampled=False)


DRAFTERS: dict[str, Callable[[], Drafter]] = {
    "picks": lambda: Picks(TableEngine(S3), 3),
    "ngram": lambda: NGram(2),
    "merged": _merged,
}


@pytest.mark.parametrize("drafter", DRAFTERS)
@pytest.mark.parametrize(
    ("rule", "form"), [(Block, "chain:3"), (Traversal, "2x2"), (Traversal, "dynamic:nodes=6,depth=3,top_k=2")]
)
def test_drafts_without_a_distribution_will_do(drafter: str, rule: Any, form: str) -> None:
    params: dict[str, Any] = {"max_tokens": 4, "temperature": 1.0, "presence_penalty": 0.3}
    make = decoder_maker(form, rule(), DRAFTERS[drafter], T3)
    assert distance(text_law(make, **params), target_law(T3, **params)) < 1e-9


class Refuses:
    """A request's rule that fails behind some token."""

    def __init__(self, token: int) -> None:
        self.token = token

    def __call__(self, ids: list[int], logits: torch.Tensor) -> torch.Tensor:
        if ids[-1] == self.token:
            raise RequestError("no more")
        return logits


@pytest.mark.parametrize(("rule", "form"), [(Block, "chain:3"), (Traversal, "2x1"), (Traversal, "chain:3")])
@pytest.mark.parametrize("token", [0, 2, 3])
def test_a_request_that_fails_gives_what_plain_decoding_would_have_given(rule: Any, form: str, token: int) -> None:
    params: dict[str, Any] = {"max_tokens": 3, "temperature": 1.0, "logits_processors": [Refuses(token)]}
    plain = text_law(decoder_maker("1", Match()), **params)
    assert min(map(len, plain)) < 3
    assert distance(text_law(decoder_maker(form, rule()), **params), plain) < 1e-9


@pytest.mark.parametrize("smaller", [SMALLER, TARGET])
def test_on_a_chain_the_two_give_the_same_ids(smaller: torch.Tensor) -> None:
    def ids(accept: str) -> list[list[int]]:
        seqs = [make_sequence(PROMPT, temperature=1.0, max_tokens=40, seed=seed) for seed in range(20)]
        return decode(TableEngine(TARGET), seqs, DraftModel(TableEngine(smaller), VOCAB), "chain:4", accept)

    assert ids("block") == ids("traversal")


def test_a_drafter_that_is_the_target_is_never_refused() -> None:
    for form, accept in (("chain:3", "block"), ("2x1x1", "traversal")):
        seqs = [make_sequence(PROMPT, temperature=1.0, max_tokens=41, seed=seed) for seed in range(5)]
        decode(TableEngine(TARGET), seqs, DraftModel(TableEngine(TARGET), VOCAB), form, accept)
        assert [seq.metrics.refused_steps for seq in seqs] == [0] * 5


@pytest.mark.parametrize(("form", "accept"), [("chain:3", "block"), ("2x2x1", "traversal")])
def test_neither_batch_nor_greedy_requests_matter(form: str, accept: str) -> None:
    def run(max_batch: int) -> list[list[int]]:
        return decode(TableEngine(WIDE), _wide_requests(3), _wide_drafter("model", 3), form, accept, max_batch)

    assert run(1) == run(2) == run(5)
    plain = decode(TableEngine(WIDE), _wide_requests(3, temperature=0.0))
    assert (
        decode(TableEngine(WIDE), _wide_requests(3, temperature=0.0), _wide_drafter("model", 3), form, accept) == plain
    )


# -- accepted length ------------------------------------------------------------------------------------------------


def tokens_a_step(make: Callable[[], Decoder], **params: Any) -> float:
    """The mean number of tokens that the first step adds, by enumeration."""

    def run(numbers: Numbers) -> Sequence:
        seq = make_sequence(PROMPT, noise=numbers.noise, max_tokens=9, **params)
        decoder = make()
        decoder.prefill(seq)
        numbers.position = len(seq.tokens)
        decoder.step([seq])
        return seq

    return sum(math.prod(numbers.shares) * len(seq.output_ids) for numbers, seq in _outcomes(run, []))


@pytest.mark.parametrize("seed", by_night(range(2), but=[0]))
@pytest.mark.parametrize(
    ("rule", "form", "gain"),
    [
        (Block, "chain:1", 0.0),  # of one token there is nothing to gain
        (Block, "chain:3", 0.01),
        (Traversal, "chain:3", 0.01),
        (Traversal, "2x1", 0.001),
        pytest.param(Traversal, "2x2", 0.001, marks=pytest.mark.nightly),
        (Traversal, "1x2", 0.001),
    ],
)
def test_more_is_accepted_than_under_rejection(rule: Any, form: str, gain: float, seed: int) -> None:
    table, smaller = random_table(3, 2, seed=10 + seed, sharpness=1.5), random_table(3, 2, seed=20 + seed)

    def length(accept: Acceptance) -> float:
        make = decoder_maker(form, accept, lambda: DraftModel(TableEngine(smaller), 3), table)
        return tokens_a_step(make, temperature=1.0)

    assert length(rule()) >= length(Rejection()) + gain - 1e-9


@pytest.mark.parametrize(("rule", "form"), [(Block, "chain:3"), (Traversal, "2x2")])
def test_of_picked_children_as_many_are_accepted_as_under_match(rule: Any, form: str) -> None:
    lengths = [
        tokens_a_step(decoder_maker(form, accept, DRAFTERS["picks"], T3), temperature=1.0)
        for accept in (rule(), Match())
    ]
    assert lengths[0] == pytest.approx(lengths[1], abs=1e-9)


# -- the proof fails where it must ------------------------------------------------------------------------------------


class PositionsOwnNumbers(Traversal):
    """Judges each node with the numbers of the position behind it, which the next step uses again."""

    def __call__(self, seq: Sequence, draft: Draft, logits: NodeLogits) -> Accepted:
        node = draft.tree.path(len(draft) - 1)  # a chain
        tokens = draft.path_tokens(node[-1])
        masses, laws, mass = [], [], 1.0
        for place, token in enumerate(tokens):
            probs = to_probs(seq.processed(logits(node[place]), tokens[:place]), seq.params)
            assert draft.sampled is not None
            law = draft.sampled[node[place]]
            masses.append(base.left_over(mass, probs, law))
            mass = min(1.0, mass * float(probs[token] / law[token]))
        laws.append((mass, to_probs(seq.processed(logits(node[-1]), tokens), seq.params)))
        for place, (chance, probs) in reversed([*enumerate([*masses, *laws])]):
            noise = seq.noise_after(tokens[:place], ACCEPT)
            if noise.accepts(chance):
                return Accepted(node[: place + 1], [*tokens[:place], noise.choose(probs)])
        raise AssertionError


class DrawsByPosition(DraftModel):
    """Draws children with the numbers of the position that they stand at, which the next draft uses again."""

    def _draw(self, seq: Sequence, draft: Draft, node: int, count: int, logits: torch.Tensor) -> list[int]:
        return draw(seq, draft, node, count, logits, seq.noise_after(draft.path_tokens(node), DRAFT))


class DrawsByDepth(DraftModel):
    """Draws the children of all nodes of a depth with the same numbers."""

    def _draw(self, seq: Sequence, draft: Draft, node: int, count: int, logits: torch.Tensor) -> list[int]:
        return draw(seq, draft, node, count, logits, seq.noise(len(seq.tokens), DRAFT + draft.depths[node]))


def off(form: str, rule: Acceptance, kind: type[DraftModel] = DraftModel) -> float:
    """How far the law of the texts is from the target's."""
    params: dict[str, Any] = {"max_tokens": 3, "temperature": 1.0}
    make = decoder_maker(form, rule, lambda: kind(TableEngine(WRONG_SHOWS[1]), 3), WRONG_SHOWS[0])
    return distance(text_law(make, **params), target_law(WRONG_SHOWS[0], **params))


def test_numbers_that_the_next_step_uses_again_are_not_lossless() -> None:
    assert off("chain:2", PositionsOwnNumbers()) > 1e-3
    for rule in (Block(), Traversal()):
        assert off("chain:2", rule, DrawsByPosition) > 1e-3
    assert off("chain:2", Rejection(), DrawsByPosition) < 1e-9  # it never looks behind a refusal


def test_branches_that_share_numbers_are_not_lossless() -> None:
    assert off("2x1", Traversal(), DrawsByDepth) > 1e-4
    assert off("2x1", Rejection(), DrawsByDepth) < 1e-9  # it visits one node of a depth


def mass_by_draft(mass: float, target_probs: torch.Tensor, draft_probs: torch.Tensor) -> tuple[float, torch.Tensor]:
    """The parent's mass is not divided by the chance of a refusal, but by what the draft leaves."""
    rest = (mass * target_probs - draft_probs).clamp(min=0)
    return float(mass == 1) or float(rest.sum() / (1 - draft_probs.max())), rest / rest.sum()


def mass_stays(mass: float, target_probs: torch.Tensor, draft_probs: torch.Tensor) -> tuple[float, torch.Tensor]:
    return mass, base.left_over(mass, target_probs, draft_probs)[1]


def probs_stay(mass: float, target_probs: torch.Tensor, draft_probs: torch.Tensor) -> tuple[float, torch.Tensor]:
    return base.left_over(mass, target_probs, draft_probs)[0], target_probs


def whole_residual(mass: float, target_probs: torch.Tensor, draft_probs: torch.Tensor) -> tuple[float, torch.Tensor]:
    """The rest is that of a mass of 1, as under `rejection`."""
    return base.left_over(mass, target_probs, draft_probs)[0], base.left_over(1.0, target_probs, draft_probs)[1]


@pytest.mark.parametrize("left_over", [mass_by_draft, mass_stays, probs_stay, whole_residual])
@pytest.mark.parametrize("form", ["chain:2", "2x1"])
def test_a_wrong_rest_is_not_lossless(left_over: Any, form: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(traversal, "left_over", left_over)
    assert off(form, Traversal()) > 1e-4


@pytest.mark.parametrize("form", [DropsTheLeastLikelyDraw([2]), SortsDraws([2])])
def test_a_drawn_tree_pruned_or_sorted_by_score_is_not_lossless(form: Shape) -> None:
    params: dict[str, Any] = {"max_tokens": 2, "temperature": 1.0}
    assert distance(text_law(decoder_maker(form, Traversal()), **params), target_law(**params)) > 1e-3


def test_two_drafters_draws_in_one_tree_are_not_lossless() -> None:
    params: dict[str, Any] = {"max_tokens": 2, "temperature": 1.0}
    assert distance(text_law(decoder_maker("1", Traversal(), MergesDraws), **params), target_law(**params)) > 1e-3


# -- what is refused ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["2", "cost", "dynamic", "adaptive", "paths:[[0],[1]]"])
def test_block_refuses_shapes_that_branch(form: str) -> None:
    with pytest.raises(PairingError, match=r"accept='block' verifies chains, and the shape .* branches"):
        Decoder(TableEngine(TARGET), DraftModel(TableEngine(SMALLER), VOCAB), shape(form), Block())


def test_block_refuses_a_draft_that_branches() -> None:
    draft = Draft(0)
    for rank in range(2):
        draft.add(0, rank, -1.0, rank)
    with pytest.raises(PairingError, match="verifies chains, and this draft branches: use accept='traversal'"):
        Block()(make_sequence(PROMPT, temperature=1.0), draft, TargetOutput(TARGET[0, :1], [0], [0], 0.0).after(0))


def test_both_take_drafters_that_only_pick() -> None:
    for form, accept in (("chain:3", "block"), ("2x2", "traversal")):
        Decoder(TableEngine(TARGET), NGram(), shape(form), acceptance(accept))
    assert (Block.lossy, Traversal.lossy) == (False, False)
