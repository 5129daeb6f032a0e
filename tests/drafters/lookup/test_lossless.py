"""The contract of every lookup: whatever it proposes or remembers, the text is plain's own, token by token."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import cache
from typing import Any

import numpy as np
import pytest

from tests.conftest import all_pairs, decode, make_sequence, random_table, shown
from tests.test_lossless import PROMPT, TARGET, VOCAB, decoder_maker, distance, target_law, text_law
from tests.tiny_models import VOCAB as TINY_VOCAB
from tests.tiny_models import request, some_tokens, tiny_pair
from tokentree.acceptance import Match, NodeLogits
from tokentree.draft import Draft
from tokentree.drafters.base import Drafter
from tokentree.drafters.draft_model import DraftModel
from tokentree.drafters.lookup.ngram import NGram
from tokentree.drafters.lookup.recycling import Recycling
from tokentree.drafters.lookup.suffix import Suffix
from tokentree.drafters.merged import Merged
from tokentree.engines.base import Engine
from tokentree.engines.kv_engine import KVEngine
from tokentree.engines.table import TableEngine
from tokentree.engines.torch import TorchEngine
from tokentree.sequence import Accepted, Sequence

FORMS = ["chain:4", "2x2x1", "dynamic:nodes=12", "adaptive:mass=0.8", "cost"]
KINDS = ["ngram", "suffix", "recycling", "merged", "merged with a model"]


def make_drafter(kind: str, vocab: int, smaller: Engine, k: int = 8) -> Drafter:
    lookups: list[Drafter] = [Recycling(vocab, k), Suffix(), NGram()]
    if kind == "merged with a model":
        return Merged([DraftModel(smaller, vocab), *lookups])
    return Merged(lookups) if kind == "merged" else next(drafter for drafter in lookups if drafter.name == kind)


def num_accepted(seqs: list[Sequence]) -> int:
    return sum(seq.metrics.accepted_tokens for seq in seqs)


# -- a table --------------------------------------------------------------------------------------------------------

WIDE = 20
TABLE = random_table(WIDE, 2, seed=7, sharpness=4.0)  # few tokens and sure ones: texts run into loops
SMALLER = TABLE + random_table(WIDE, 2, seed=8, sharpness=2.0)
SETTINGS: list[dict[str, Any]] = [
    {"temperature": 0.0},
    {"temperature": 1.0},
    {"temperature": 1.0, "top_p": 0.9, "presence_penalty": 0.5, "repetition_penalty": 1.1},
]


def table_requests(settings: dict[str, Any], seed: int = 0) -> list[Sequence]:
    """Ragged prompts and lengths; half of them may copy from a reference."""
    random = np.random.default_rng(seed)
    seqs = []
    for number in range(5):
        prompt = random.integers(0, WIDE, int(random.integers(1, 14))).tolist()
        length = int(random.integers(25, 45)) if number else 1
        seqs.append(make_sequence(prompt, seed=seed + number, max_tokens=length, **settings))
        seqs[-1].references = [random.integers(0, WIDE, 30).tolist()] if number % 2 else []
    return seqs


@cache
def plain_of_table(setting: int, seed: int = 0) -> list[list[int]]:
    return [decode(TableEngine(TABLE), [seq])[0] for seq in table_requests(SETTINGS[setting], seed)]


@pytest.mark.parametrize(("kind", "form"), all_pairs(KINDS, FORMS), ids=shown)
def test_a_table_s_text_is_plain_s_alone_and_in_a_batch(kind: str, form: str) -> None:
    accepted = 0
    for setting, max_batch in ((0, 1), (1, 3), (2, 8)):
        seqs = table_requests(SETTINGS[setting])
        drafter = make_drafter(kind, WIDE, TableEngine(SMALLER))
        assert decode(TableEngine(TABLE), seqs, drafter, form, max_batch=max_batch) == plain_of_table(setting)
        accepted += num_accepted(seqs)
    assert accepted > 10  # or nothing was tried


@pytest.mark.parametrize(("kind", "form"), all_pairs(KINDS, FORMS), ids=shown)
def test_what_a_drafter_remembers_of_other_requests_changes_no_text(kind: str, form: str) -> None:
    drafter = make_drafter(kind, WIDE, TableEngine(SMALLER))
    gained = dict[str, int]()
    for turn, seed in (("cold", 0), ("others", 1), ("again", 0)):
        for setting in (0, 1):
            seqs = table_requests(SETTINGS[setting], seed)
            text = decode(TableEngine(TABLE), seqs, drafter, form, max_batch=3)
            assert text == plain_of_table(setting, seed)
            gained[turn] = gained.get(turn, 0) + num_accepted(seqs)
    # `cost` goes by the clock, and n-grams remember nothing
    assert kind == "ngram" or form == "cost" or gained["again"] > gained["cold"]


@pytest.mark.parametrize("kind", KINDS)
def test_a_memory_of_another_target_changes_no_text(kind: str) -> None:
    """What it has learnt is wrong throughout, and the same token is often drafted where it is refused."""
    drafter = make_drafter(kind, WIDE, TableEngine(-TABLE))
    decode(TableEngine(-TABLE), table_requests(SETTINGS[1], 1), drafter)
    for form in FORMS:
        seqs = table_requests(SETTINGS[1])
        assert decode(TableEngine(TABLE), seqs, copy.deepcopy(drafter), form) == plain_of_table(1)
        assert kind == "ngram" or sum(seq.metrics.refused_steps for seq in seqs) > 0


# -- a transformers model -------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def engines() -> tuple[KVEngine, KVEngine]:
    target, smaller = tiny_pair()
    return TorchEngine(target, "tree"), TorchEngine(smaller, "tree")


def tiny_requests(temperature: float) -> list[Sequence]:
    prompts = [some_tokens(length, seed=length) for length in (1, 9, 23)]
    prompts[1] *= 2  # something to look up from the start
    return [
        request(prompt, max_tokens=26 - number, seed=number, temperature=temperature)
        for number, prompt in enumerate(prompts)
    ]


@pytest.fixture(scope="module")
def plain_of_tiny(engines: tuple[KVEngine, KVEngine]) -> Callable[[float], list[list[int]]]:
    return cache(lambda temperature: [decode(engines[0], [seq])[0] for seq in tiny_requests(temperature)])


@pytest.mark.parametrize(("kind", "form"), all_pairs(KINDS, FORMS), ids=shown)
def test_a_model_s_text_is_plain_s_in_ragged_batches_and_from_memory(
    kind: str, form: str, engines: tuple[KVEngine, KVEngine], plain_of_tiny: Callable[[float], list[list[int]]]
) -> None:
    target, smaller = engines
    drafter, accepted = make_drafter(kind, TINY_VOCAB, smaller), 0
    for temperature, max_batch in ((0.0, 3), (0.8, 2), (0.0, 1)):  # the last one from memory
        seqs = tiny_requests(temperature)
        assert decode(target, seqs, drafter, form, max_batch=max_batch) == plain_of_tiny(temperature)
        accepted += num_accepted(seqs)
    assert accepted > 10


# -- the exact distribution -----------------------------------------------------------------------------------------


@cache
def drafter_with_memory(kind: str) -> Drafter:
    """On the vocabulary of four; it has answered two requests."""
    drafter = make_drafter(kind, VOCAB, TableEngine(-TARGET), k=3)
    seqs = [make_sequence(PROMPT, seed=seed, temperature=1.0, max_tokens=6) for seed in range(2)]
    decode(TableEngine(TARGET), seqs, drafter)
    return drafter


@pytest.mark.parametrize(("kind", "form"), [(kind, "2x2") for kind in KINDS] + [("merged", "adaptive:min_prob=0")])
def test_match_writes_the_target_s_distribution_with_any_memory(kind: str, form: str) -> None:
    params: dict[str, Any] = {"max_tokens": 4, "temperature": 1.0, "presence_penalty": 0.3}
    make = decoder_maker(form, Match(), lambda: copy.deepcopy(drafter_with_memory(kind)))
    law = text_law(make, **params)
    assert sum(law.values()) == pytest.approx(1, abs=1e-9)
    assert distance(law, target_law(**params)) < 1e-9


def test_a_rule_that_trusts_a_lookup_is_not_lossless() -> None:
    class Trusting(Match):
        def __call__(self, seq: Sequence, draft: Draft, logits: NodeLogits) -> Accepted:
            step = super().__call__(seq, draft, logits)
            if not step.refused or len(step.tokens) > 1:
                return step
            child = draft.tree.children[0][0]  # refused, and taken all the same
            token = int(draft.tree.tokens[child])
            return Accepted([0, child], [token, seq.draw(logits(child), [token])])

    params: dict[str, Any] = {"max_tokens": 2, "temperature": 1.0}
    make = decoder_maker("2x2", Trusting(), lambda: copy.deepcopy(drafter_with_memory("recycling")))
    assert distance(text_law(make, **params), target_law(**params)) > 1e-3
