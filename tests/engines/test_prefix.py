"""KV that is reused for texts that begin alike: nothing but time changes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from itertools import islice

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.conftest import decode
from tests.tiny_models import FAMILIES, VOCAB, request, some_tokens, some_tree, tiny, tiny_pair
from tokentree import LLM, SamplingParams
from tokentree.drafters.draft_model import DraftModel
from tokentree.engines.kv import KVLayout, SequenceKV, Storages
from tokentree.engines.prefix import LEAST, PrefixCache
from tokentree.engines.torch import TorchEngine
from tokentree.errors import OptionError
from tokentree.kernels.tile import BLOCK
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


# -- what texts share is there once ------------------------------------------------------------------------------------

LAYOUTS = {
    "rows": KVLayout(((2, 3, 5), (1, 4, 2)), torch.float32, torch.device("cpu"), states=1, width=3),
    "blocks": KVLayout(((2, 3, 5), (1, 4, 2)), torch.float32, torch.device("cpu"), blocked=True, states=1, width=3),
    "fixed": KVLayout(((2, 3, 5), (1, 4, 2)), torch.float32, torch.device("cpu"), fixed=True, states=1, width=3),
}
each_layout = pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)


def _read(kv: SequenceKV, tokens: Ints) -> SequenceKV:
    """Writes the rows that are not committed yet. A row's numbers depend on all tokens up to it."""
    first, names = kv.length, np.random.default_rng(0).normal(size=(len(tokens), 4)).astype(np.float32)
    seen = torch.from_numpy(np.cumsum((tokens[:, None] + 1) * names, axis=0, dtype=np.float32))
    kv.reserve(len(tokens))
    for layer in range(kv.num_layers):
        heads, key_width, value_width = kv.sizes(layer)
        rows = seen[first:, layer].expand(heads, -1)[..., None]
        kv.write(layer, first, rows + torch.arange(key_width), rows * torch.arange(1, value_width + 1))
    kv.states[:, first : len(tokens)] = seen[first:, 2:3] * torch.arange(1, 4)
    kv.commit(range(len(tokens) - first))
    return kv


def _rows(kv: SequenceKV) -> list[torch.Tensor]:
    """Keys and values of each layer [heads, length, width], and the states."""
    taken = [kv.states[:, : kv.length]]
    for layer in range(kv.num_layers):
        (keys, values), (_, _, width) = kv.layer(layer), kv.sizes(layer)
        if kv.layout.blocked:
            keys = keys.transpose(2, 3).flatten(1, 2)
        taken += [keys[:, : kv.length], values[:, : kv.length, :width]]
    return taken


def _new(layout: KVLayout, cache: PrefixCache, tokens: Ints) -> SequenceKV:
    """A text as an engine reads it: what is known is copied. Compared with reading all of it."""
    kv, whole = layout.make(len(tokens) + 5), _read(layout.make(len(tokens)), tokens)
    known = cache.fill(kv, tokens)
    assert known == kv.length
    for got, expected in zip(_rows(kv), _rows(whole), strict=True):
        assert torch.equal(got, expected[:, :known])
    for got, expected in zip(_rows(_read(kv, tokens)), _rows(whole), strict=True):
        assert torch.equal(got, expected)
    return kv


def _block_nbytes(layout: KVLayout) -> int:
    return layout.make(1).nbytes * BLOCK // layout.make(1).capacity


@each_layout
def test_many_texts_hold_one_copy_of_what_they_share(layout: KVLayout) -> None:
    cache, shared, block = PrefixCache(10**9), _tokens((1, 10 * BLOCK)), _block_nbytes(layout)
    for token in range(20):
        text = np.concatenate([shared, [token + 2] * (BLOCK + 3)])
        cache.keep(text, _new(layout, cache, text))
        cache.check()
    assert len(cache) == 20
    assert cache.nbytes == block * (10 + 20 * 2)
    for token in range(20):
        text = np.concatenate([shared, [token + 2] * (2 * BLOCK)])
        assert cache.fill(layout.make(20 * BLOCK), text) == 11 * BLOCK + 3


@each_layout
def test_a_chat_s_turns_are_kept_as_what_each_adds(layout: KVLayout) -> None:
    cache, block = PrefixCache(10**9), _block_nbytes(layout)
    for turns in range(1, 6):
        text = _tokens(*((turn, 2 * BLOCK) for turn in range(turns)))
        cache.keep(text, _new(layout, cache, text))
        cache.check()
    assert (len(cache), cache.nbytes) == (1, 5 * 2 * block)


@each_layout
@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_copied_rows_are_those_of_reading_anew(layout: KVLayout, data: st.DataObject) -> None:
    """Texts part, end and go on at any place in a block, while the cache drops what it has no memory for."""
    cache = PrefixCache(data.draw(st.sampled_from([6, 20, 10**6])) * _block_nbytes(layout))
    parts = st.tuples(st.integers(1, 2 * BLOCK + 3), st.integers(0, 1))
    for runs in data.draw(st.lists(st.lists(parts, min_size=1, max_size=4), min_size=1, max_size=8)):
        text = _tokens(*((token, count) for count, token in runs))
        kv = _new(layout, cache, text)
        assert len(cache.keep(text, kv)) <= 1
        cache.check()
        assert cache.nbytes <= cache._max_bytes
        _new(layout, cache, text)


@each_layout
def test_rows_before_those_of_a_run_are_left_alone(layout: KVLayout) -> None:
    text = _tokens((1, 3 * BLOCK))
    whole, new = _read(layout.make(len(text)), text), layout.make(len(text))
    part, other = whole.cut(BLOCK + 5, 3 * BLOCK - 2), _read(layout.make(len(text)), text[: BLOCK + 5] + 1)
    new.copy_rows(other, BLOCK + 5)
    new.copy_rows(part, 3 * BLOCK - 2, BLOCK)
    for got, before, after in zip(_rows(new), _rows(other), _rows(whole), strict=True):
        assert torch.equal(got, torch.cat([before, after[:, BLOCK + 5 : 3 * BLOCK - 2]], 1))


def test_a_text_that_is_too_large_drives_nothing_out() -> None:
    cache = PrefixCache(2 * NBYTES)
    cache.keep(_tokens((1, 20)), _kv(20))
    long = _tokens((2, 40 * BLOCK))
    (kv := LAYOUT.make(len(long))).commit(range(len(long)))
    assert cache.keep(long, kv) == [kv]
    assert cache.fill(LAYOUT.make(64), _tokens((1, 20))) == 20


def test_a_storage_that_a_text_fills_is_taken_over_and_not_copied() -> None:
    layout, cache = LAYOUTS["blocks"], PrefixCache(10**9)
    text = _tokens((1, 1), (2, 40 * BLOCK))
    first = _read(layout.make(len(text) + BLOCK), text)
    assert cache.keep(text, first) == []
    assert next(cache._tree.nodes()).rows.kv is first
    other = _tokens((1, 1), (3, 40 * BLOCK))  # one token is known: nothing much is empty in its storage either
    second = _read(layout.make(len(other)), other)
    assert cache.keep(other, second) == []
    kept = {id(node.rows.kv): len(node.rows) for node in cache._tree.nodes()}
    assert sorted(kept.values()) == [1, 40 * BLOCK, 40 * BLOCK]
    assert {id(first), id(second)} < {*kept}  # the first one still, now that a run is split off its beginning
    assert cache.nbytes == first.nbytes + second.nbytes + _block_nbytes(layout)
    long = np.concatenate([text, _tokens((4, BLOCK))])
    third = _read(layout.make(len(long)), long)
    assert cache.keep(long, third) == [third]  # most is known
    cache.check()


def test_a_split_run_lies_in_one_storage_once() -> None:
    layout, cache = LAYOUTS["blocks"], PrefixCache(10**9)
    text = _tokens((1, 20 * BLOCK))
    cache.keep(text, _read(layout.make(len(text)), text))
    for at in (10 * BLOCK + 3, 5 * BLOCK, 15 * BLOCK):
        other = np.concatenate([text[:at], _tokens((at, BLOCK))])
        cache.keep(other, _read(layout.make(len(other)), other))
        cache.check()
    runs = [node.rows for node in cache._tree.nodes()]
    assert len({id(run.kv) for run in runs}) == len(runs)
    assert len({stored.untyped_storage().data_ptr() for run in runs for stored in run.kv.layer(0)}) == 2 * len(runs)
    for run in runs:
        assert 0 <= run.first <= run.first + len(run) <= run.kv.capacity
    assert cache.nbytes <= (20 + 3 * 2 + 3) * _block_nbytes(layout)


def test_a_fixed_storage_is_always_given_back() -> None:
    layout, cache = LAYOUTS["fixed"], PrefixCache(10**9)
    text = _tokens((1, layout.capacity(1)))
    kv = _read(layout.make(len(text)), text)
    assert cache.keep(text, kv) == [kv]
    assert cache.nbytes == kv.nbytes
    kv.length = 0
    _read(kv, text + 1)  # the next text has it
    _new(layout, cache, text)
    assert cache.fill(layout.make(len(text)), text) == len(text)


def test_leaves_go_before_what_they_go_on_from() -> None:
    layout = LAYOUTS["blocks"]
    block, shared = _block_nbytes(layout), _tokens((9, 2 * BLOCK))
    cache = PrefixCache(5 * block)
    texts = [np.concatenate([shared, _tokens((token, BLOCK))]) for token in range(5)]
    for text in texts[:3]:
        cache.keep(text, _new(layout, cache, text))
    assert cache.nbytes == 5 * block
    assert cache.fill(layout.make(len(texts[0])), texts[0]) == 3 * BLOCK
    for text in texts[3:]:
        cache.keep(text, _new(layout, cache, text))
        cache.check()
    assert [cache.fill(layout.make(3 * BLOCK), text) // BLOCK for text in texts] == [3, 2, 2, 3, 3]


def test_a_live_text_is_copied_where_it_knows_more() -> None:
    layout, cache = LAYOUTS["blocks"], PrefixCache(10**9)
    text = _tokens((1, 2 * BLOCK), (2, BLOCK))
    cache.keep(text[: 2 * BLOCK], _read(layout.make(2 * BLOCK), text[: 2 * BLOCK]))
    live = _read(layout.make(len(text)), text)
    shorter = _read(layout.make(BLOCK), text[:BLOCK])
    for known, rows in (([shorter], 2 * BLOCK), ([shorter, live], 3 * BLOCK - 1)):
        kv = layout.make(len(text))
        assert cache.fill(kv, text[:-1], [(text[: one.length], one) for one in known]) == kv.length == rows
        for got, expected in zip(_rows(kv), _rows(live), strict=True):
            assert torch.equal(got, expected[:, :rows])


def test_what_is_being_copied_is_locked() -> None:
    cache, text = PrefixCache(10**9), _tokens((1, 30))
    cache.keep(text, _kv(30))
    node = next(cache._tree.nodes())

    class Looking(SequenceKV):
        def copy_rows(self, other: SequenceKV, rows: int, behind: int = 0) -> None:
            assert node.references == 1
            assert cache._tree.evict(10**9) == []
            if rows:
                raise MemoryError

    with pytest.raises(MemoryError):
        cache.fill(Looking(LAYOUT, 64), text)
    assert node.references == 0
    cache.check()


# -- in engines --------------------------------------------------------------------------------------------------------


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


@pytest.mark.parametrize("family", [*FAMILIES])
def test_texts_that_part_anywhere_are_put_together_again_bit_by_bit(family: str) -> None:
    engine, fresh = (TorchEngine(tiny(family), "tree", prefix_bytes=nbytes) for nbytes in (10**9, 0))
    for each in (engine, fresh):
        each.capture()
    text = some_tokens(150)
    for end, parted in ((40, 9), (90, 5), (61, 30), (140, 33), (149, 0)):  # in blocks and at their ends
        seq = request([*text[:end], *some_tokens(parted, seed=end)])
        engine.prefill(seq)
        engine.release([seq])
        engine._prefixes.check()
    assert len(engine._prefixes) == 5
    tree = some_tree(text[-1], 20)
    known, seq = request(text), request(text)
    assert (fresh.prefill(known), engine.prefill(seq)) == (0, 148)
    assert torch.equal(engine.verify([seq], [tree]).all_logits, fresh.verify([known], [tree]).all_logits)
    assert torch.equal(engine.hidden(seq), fresh.hidden(known))


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
