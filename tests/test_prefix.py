"""KV that is reused for texts that begin alike: nothing but time changes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from itertools import islice

import numpy as np
import pytest
import torch

from tests.conftest import decode
from tests.tiny_models import VOCAB, request, some_tokens, some_tree, tiny, tiny_pair
from tokentree import LLM, SamplingParams
from tokentree.drafters.draft_model import DraftModel
from tokentree.engines.kv import KVLayout, SequenceKV, Storages
from tokentree.engines.prefix import LEAST, PrefixCache
from tokentree.engines.radix import shared_length
from tokentree.engines.torch import TorchEngine
from tokentree.errors import OptionError
from tokentree.tree import Ints

LAYOUT = KVLayout(((1, 2, 2),), torch.float32, torch.device("cpu"))
NBYTES = LAYOUT.make(30).nbytes  # a text of up to so many rows, in storage of no more room than it needs


def _kv(rows: int) -> SequenceKV:
    kv = LAYOUT.make(64)
    kv.write(0, 0, *(torch.arange(2.0 * rows).reshape(1, rows, 2) + part for part in (0, 1000)))
    kv.commit(range(rows))
    return kv


def _tokens(*parts: tuple[int, int]) -> Ints:
    """So many of each token."""
    return np.concatenate([np.full(count, token) for token, count in parts])


def test_how_far_two_texts_are_the_same() -> None:
    one, other = np.array([1, 2, 3, 4]), np.array([1, 2, 9])
    assert [shared_length(one, other), shared_length(one, one[:2]), shared_length(one, one[1:])] == [2, 2, 0]


def test_the_longest_beginning_is_copied_and_no_more() -> None:
    cache = PrefixCache(9 * NBYTES)
    cache.keep(_tokens((1, 20), (2, 10)), _kv(30))
    cache.keep(_tokens((1, 25), (3, 5)), _kv(30))
    new = LAYOUT.make(64)
    assert cache.fill(new, _tokens((1, 25), (3, 2), (4, 9))) == new.length == 27
    for got, expected in zip(new.layer(0), _kv(27).layer(0), strict=True):
        assert torch.equal(got[:, :27], expected[:, :27])
    assert cache.fill(LAYOUT.make(64), _tokens((1, LEAST - 1), (4, 20))) == 0
    assert cache.fill(LAYOUT.make(64), _tokens((1, LEAST), (4, 20))) == LEAST


def test_what_is_copied_is_a_copy() -> None:
    cache, new = PrefixCache(9 * NBYTES), LAYOUT.make(64)
    cache.keep(_tokens((1, 30)), _kv(30))
    cache.fill(new, _tokens((1, 40)))
    new.write(0, 0, torch.zeros(1, 30, 2), torch.zeros(1, 30, 2))
    again = LAYOUT.make(64)
    cache.fill(again, _tokens((1, 40)))
    assert torch.equal(again.layer(0)[0][:, :30], _kv(30).layer(0)[0][:, :30])


def test_the_least_recently_used_goes_first() -> None:
    cache = PrefixCache(2 * NBYTES)
    for token in (1, 2):
        cache.keep(_tokens((token, 20)), _kv(20))
    cache.fill(LAYOUT.make(64), _tokens((1, 20)))
    cache.keep(_tokens((3, 20)), _kv(20))
    assert (len(cache), cache.nbytes) == (2, 2 * NBYTES)
    assert [cache.fill(LAYOUT.make(64), _tokens((token, 20))) for token in (1, 2, 3)] == [20, 0, 20]


def test_a_text_that_is_part_of_another_is_not_kept_beside_it() -> None:
    cache = PrefixCache(9 * NBYTES)
    cache.keep(_tokens((1, 20)), _kv(20))
    cache.keep(_tokens((1, 30)), _kv(30))
    cache.keep(_tokens((1, 25)), _kv(25))
    assert len(cache) == 1
    assert cache.fill(LAYOUT.make(64), _tokens((1, 40))) == 30


def test_what_is_too_large_or_too_short_is_not_kept() -> None:
    for cache, rows in ((PrefixCache(NBYTES - 1), 30), (PrefixCache(9 * NBYTES), LEAST - 1), (PrefixCache(0), 30)):
        cache.keep(_tokens((1, rows)), _kv(rows))
        assert len(cache) == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_a_reused_beginning_changes_no_bit(family: str, dtype: torch.dtype) -> None:
    _compare(family, "tree", dtype, torch.equal)


@pytest.mark.parametrize("family", ["llama", "falcon"])
def test_a_reused_beginning_gives_the_same_logits_where_the_model_attends_by_itself(family: str) -> None:
    _compare(family, "sdpa", torch.float32, lambda got, expected: torch.allclose(got, expected, atol=1e-4))


def _compare(
    family: str, attention: str, dtype: torch.dtype, alike: Callable[[torch.Tensor, torch.Tensor], bool]
) -> None:
    engine = TorchEngine(tiny(family, dtype), attention, prefix_bytes=10**9)
    fresh = TorchEngine(tiny(family, dtype), attention)
    text = some_tokens(90)
    first, live = request(text[:60]), request(text[:50])
    assert engine.prefill(first) == 0
    assert engine.prefill(live) == 49  # of one that is not finished
    engine.release([first, live])
    for tokens, reused in ((text, 59), ([*text[:70], *some_tokens(9, seed=5)], 70)):
        tree = some_tree(tokens[-1], 20)
        expected = fresh.prefill(known := request(tokens)), fresh.verify([known], [tree]).all_logits
        got = engine.prefill(seq := request(tokens)), engine.verify([seq], [tree]).all_logits
        assert (got[0], expected[0]) == (reused, 0)
        assert alike(got[1], expected[1])
        engine.release([seq])


def test_a_draft_model_reuses_its_own_beginning_and_the_text_stays() -> None:
    target, draft = tiny_pair()
    engines = [TorchEngine(model, prefix_bytes=10**9) for model in (target, draft)]
    text = some_tokens(50)
    expected = decode(TorchEngine(target), [request(text, max_tokens=20)])
    for reused in (0, 49):
        seq = request(text, max_tokens=20)
        assert decode(engines[0], [seq], DraftModel(engines[1], VOCAB), "2x2x1") == expected
        assert seq.metrics.reused_tokens == reused
    assert engines[1].prefill(request(text)) == 49


def test_the_next_turn_reads_only_what_is_new() -> None:
    llm = LLM(tiny("llama"), "ngram")
    params = SamplingParams(max_tokens=10, ignore_eos=True)
    prompt = some_tokens(40)
    first = llm.generate([prompt], params)[0]
    turn = [*prompt, *first.token_ids, *some_tokens(7, seed=3)]
    second = llm.generate([turn], params)[0]
    assert second.metrics.reused_tokens >= 49  # the last token's KV was never needed
    alone = LLM(tiny("llama"), "ngram", prefix_mb=0).generate([turn], params)[0]
    assert alone.token_ids == second.token_ids
    assert alone.metrics.reused_tokens == 0


@pytest.mark.parametrize("fixed", [False, True])
def test_what_was_reserved_and_not_used_doesn_t_count(fixed: bool) -> None:
    layout = replace(LAYOUT, fixed=fixed)
    kv = layout.make(8000)
    kv.write(0, 0, *(torch.arange(60.0).reshape(1, 30, 2) + part for part in (0, 1000)))
    kv.commit(range(30))
    cache = PrefixCache(NBYTES)
    assert cache.keep(_tokens((1, 30)), kv) == [kv]  # nobody needs the large one any more
    assert (len(cache), cache.nbytes) == (1, NBYTES)
    new = layout.make(64)
    assert cache.fill(new, _tokens((1, 25), (2, 9))) == 25
    for got, expected in zip(new.layer(0), kv.layer(0), strict=True):
        assert torch.equal(got[:, :25], expected[:, :25])


@pytest.mark.parametrize("kind", ["tree", "sdpa"])
def test_a_text_that_might_have_become_long_is_reused(kind: str) -> None:
    model = tiny("llama", max_position_embeddings=16000)
    llm = LLM(model, "ngram", attention=kind, prefix_mb=1)
    prompt, params = some_tokens(40), SamplingParams(max_tokens=12000)
    stream = llm.stream(prompt, params)
    for _ in islice(stream, 9):
        pass
    stream.close()
    first = stream.result
    turn = [*prompt, *first.token_ids, *some_tokens(7, seed=3)]
    second = llm.generate([turn], SamplingParams(max_tokens=10))[0]
    assert second.metrics.reused_tokens >= 40
    alone = LLM(model, "ngram", attention=kind, prefix_mb=0).generate([turn], SamplingParams(max_tokens=10))[0]
    assert alone.token_ids == second.token_ids


def test_a_short_text_gets_small_storage_whatever_is_spare() -> None:
    storages = Storages(replace(LAYOUT, fixed=True))
    large, small = storages.take(32000), storages.take(300)
    assert (large.capacity, small.capacity) == (32768, 1024)
    storages.give([large, small])
    assert storages.take(300) is small
    assert storages.take(300).capacity == 1024
    assert storages.take(20000) is large


def test_less_than_nothing_can_t_be_kept() -> None:
    with pytest.raises(OptionError, match="prefix_mb must be at least 0"):
        LLM(tiny("llama"), prefix_mb=-1)
