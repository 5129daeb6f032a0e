"""Block heads in one compiled call: what their modules give, for each form that a call serves."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from tests.heads.block_heads import FORMS, some_block
from tests.tiny_models import VOCAB, request, some_tokens, tiny
from tokentree.engines.block import Blocks, TorchBlocks
from tokentree.engines.block_call import CompiledBlocks, blocks_of
from tokentree.engines.drafting import CANDIDATES, Slots
from tokentree.engines.kv_engine import KVEngine
from tokentree.engines.torch import TorchEngine
from tokentree.sequence import Sequence

WIDE = {"hidden_size": 64, "intermediate_size": 96}
SERVED = [form for form in FORMS if form not in ("gated", "rnn", "dflash2")]


def engine_of(dtype: torch.dtype = torch.bfloat16) -> KVEngine:
    return TorchEngine(tiny("llama", dtype, **WIDE))


def compiled(form: str, **sizes: Any) -> CompiledBlocks:
    return CompiledBlocks(some_block(form, **(WIDE | sizes)), engine_of())


def by_modules(form: str, **sizes: Any) -> TorchBlocks:
    return TorchBlocks(some_block(form, **(WIDE | sizes)), engine_of())


def texts(blocks: Blocks, lengths: tuple[int, ...], **options: Any) -> list[Sequence]:
    """Texts of these lengths, that the target has read but for their last token."""
    seqs = [request(some_tokens(length, seed=length), **options) for length in lengths]
    for seq in seqs:
        blocks._target.prefill(seq)
    return seqs


def off(found: torch.Tensor, expected: torch.Tensor) -> float:
    """The error, where what is expected spreads by 1."""
    assert found.shape == expected.shape
    return float((found.float() - expected.float()).std() / expected.float().std())


def pairs(slots: Slots) -> dict[tuple[int, int, int], float]:
    """The probability of each candidate, by its place and the token before; -1 where that doesn't matter."""
    found = dict[tuple[int, int, int], float]()
    befores = [-1]
    for place, (tokens, probs, ranks) in enumerate(zip(*slots, strict=True)):
        assert ranks[0].tolist() == (sorted(ranks[0]) if len(tokens) > 1 else [0] * len(ranks[0]))
        for before, own, shares in zip(befores, tokens.tolist(), probs.tolist(), strict=False):
            assert shares == sorted(shares, reverse=True)
            found |= {(place, before, token): prob for token, prob in zip(own, shares, strict=True)}
        befores = tokens[0].tolist() if len(tokens) > 1 else [-1]
    return found


@pytest.mark.parametrize("lengths", [(21,), (2,), (70, 6, 33)])
@pytest.mark.parametrize("form", SERVED)
def test_one_call_gives_what_the_modules_give(form: str, lengths: tuple[int, ...]) -> None:
    given = [blocks.guess(texts(blocks, lengths)) for blocks in (compiled(form), by_modules(form))]
    for found, expected in zip(*given, strict=True):
        assert off(found, expected) < 0.04  # both round to bfloat16 at each step


@pytest.mark.parametrize("temperature", [0.0, 0.7])
@pytest.mark.parametrize("form", SERVED)
def test_it_picks_what_its_own_logits_say(form: str, temperature: float, monkeypatch: pytest.MonkeyPatch) -> None:
    blocks, modules = compiled(form), by_modules(form)
    seqs = texts(blocks, (70, 6, 33), temperature=temperature)
    states, logits = (part.clone() for part in blocks.guess(seqs))
    monkeypatch.setattr(modules, "guess", lambda _: (states, logits))
    for found, expected in zip(blocks.slots(seqs), modules.slots(seqs), strict=True):
        assert [part.shape for part in found] == [part.shape for part in expected]
        assert [part.dtype for part in found] == [part.dtype for part in expected]
        here, there = pairs(found), pairs(expected)
        both = here.keys() & there.keys()
        if blocks.markov is None:
            assert (found.tokens == expected.tokens).all()
            assert found.probs == pytest.approx(expected.probs, abs=1e-5)
        else:  # whose weights have 8 bits here
            assert len(both) > 0.8 * len(there)
            errors = [abs(here[one] - there[one]) for one in both]
            assert max(errors) < 0.06
            assert np.mean(errors) < 0.005


@pytest.mark.parametrize("form", ["dflash", "window", "dspark"])
def test_a_text_has_the_same_bits_in_any_batch_however_it_was_read(form: str) -> None:
    blocks = compiled(form)
    together = blocks.slots(texts(blocks, (70, 6, 33)))
    for number, length in enumerate((70, 6, 33)):
        seq = texts(blocks, (length,))[0]
        for upto in range(0, length, 5):
            blocks.prefill(seq, upto)
        alone = blocks.slots([seq])[0]
        again = blocks.slots([seq])[0]
        for parts in zip(together[number], alone, again, strict=True):
            assert all((part == parts[0]).all() for part in parts)


def test_a_row_is_read_once() -> None:
    blocks = compiled("dflash")
    seq = texts(blocks, (70,))[0]
    blocks.prefill(seq, 40)
    assert blocks.committed(seq) == 40
    blocks.guess([seq])
    assert blocks.committed(seq) == 69
    kept = blocks._kv(seq).layer(0)[1][:, :69].clone()
    blocks.guess([seq])
    assert (blocks._kv(seq).layer(0)[1][:, :69] == kept).all()


def test_a_long_text_takes_no_more_memory_at_a_time_than_a_short_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tokentree.engines.block.ROWS", 32)
    blocks, modules = compiled("dflash"), by_modules("dflash")
    found, expected = (one.guess(texts(one, (125,)))[1] for one in (blocks, modules))
    assert off(found, expected) < 0.04
    assert blocks._program._capacity == 64


def test_more_rows_than_there_was_room_for() -> None:
    blocks, modules = compiled("dspark", block_size=30), by_modules("dspark", block_size=30)
    for lengths in ((5,), (9, 8, 7, 6, 5, 4, 3)):
        found, expected = (one.guess(texts(one, lengths))[1] for one in (blocks, modules))
        assert off(found, expected) < 0.06


@pytest.mark.parametrize(
    ("form", "sizes", "dtype", "one_call"),
    [
        *((form, WIDE, torch.bfloat16, form in SERVED) for form in FORMS),
        ("dflash", WIDE | {"window": 9}, torch.bfloat16, False),  # to both sides
        ("dflash2", WIDE | {"window": None}, torch.bfloat16, False),
        ("dflash", WIDE | {"conv_taps": 2}, torch.bfloat16, False),
        ("dflash", WIDE | {"softcap": 30.0}, torch.bfloat16, False),
        ("dflash", WIDE | {"intermediate_size": 100}, torch.bfloat16, False),
        ("dflash", WIDE, torch.float32, False),
    ],
)
def test_which_heads_run_in_one_call(form: str, sizes: dict[str, Any], dtype: torch.dtype, one_call: bool) -> None:
    blocks = blocks_of(some_block(form, **sizes), engine_of(dtype))
    assert type(blocks) is (CompiledBlocks if one_call else TorchBlocks)


def test_a_few_known_tokens_are_all_that_is_picked() -> None:
    blocks = compiled("shared output", draft_vocab_size=CANDIDATES - 3)
    slots = blocks.slots(texts(blocks, (12,)))[0]
    assert slots.tokens.shape == (4, CANDIDATES - 3, CANDIDATES - 3)
    assert np.allclose(slots.probs[1:].sum(-1), 1, atol=1e-4)
    assert slots.tokens.max() < VOCAB
