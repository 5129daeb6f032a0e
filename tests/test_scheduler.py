"""Requests come and go between steps, and each text is the one that is written alone."""

from __future__ import annotations

import functools
import itertools
import random
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch

from tests.conftest import by_night, decode, make_sequence, random_table, shown
from tests.drafters.test_eagle import some_head
from tests.drafters.test_medusa import random_heads
from tests.heads.block_heads import some_block
from tests.tiny_models import CONTEXT, kv_engine, request, some_tokens, some_tree, tiny
from tokentree import LLM, ModelError, OptionError, RequestError, SamplingParams, StepError
from tokentree.acceptance import acceptance
from tokentree.decoder import Decoder
from tokentree.drafters.base import Drafter
from tokentree.drafters.block import Block
from tokentree.drafters.draft_model import DraftModel
from tokentree.drafters.eagle import Eagle
from tokentree.drafters.lookup.ngram import NGram
from tokentree.drafters.lookup.recycling import Recycling
from tokentree.drafters.lookup.suffix import Suffix
from tokentree.drafters.medusa import Medusa
from tokentree.drafters.merged import Merged
from tokentree.drafters.none import NoDrafter
from tokentree.engines.kv_engine import KVEngine
from tokentree.engines.table import TableEngine
from tokentree.engines.torch import TorchEngine
from tokentree.scheduler import Event, Scheduler
from tokentree.sequence import Sequence
from tokentree.shapes import shape
from tokentree.sharing import AHEAD

VOCAB = 12
TABLE = random_table(VOCAB, 2, seed=1, sharpness=2.0)

ENGINES: dict[str, Callable[[], KVEngine]] = {
    "one call": lambda: TorchEngine(tiny("llama", torch.bfloat16, hidden_size=64, intermediate_size=96)),
    "gemma3": lambda: TorchEngine(tiny("gemma3", torch.bfloat16, hidden_size=64, intermediate_size=96)),
    "llama": lambda: TorchEngine(tiny("llama")),
    "gemma2": lambda: TorchEngine(tiny("gemma2", torch.bfloat16)),
    "gpt2": lambda: TorchEngine(tiny("gpt2")),
    "8 bits": lambda: TorchEngine(
        tiny("qwen2", torch.bfloat16, hidden_size=64, intermediate_size=128), quantization="int8"
    ),
}
DRAFTERS: dict[str, Callable[[KVEngine], Drafter]] = {
    "none": lambda engine: NoDrafter(),
    "lookups": lambda engine: Merged([NGram(min_n=1), Suffix(), Recycling(engine.vocab_size)]),
    "draft model": lambda engine: DraftModel(TorchEngine(tiny("llama", seed=3)), engine.vocab_size),
    "block": lambda engine: Block(some_block("dspark", hidden_size=engine.facts.hidden_size), engine),
    "medusa": lambda engine: Medusa(random_heads(engine.facts.hidden_size), engine),
    "eagle": lambda engine: Eagle(some_head(3, 60, hidden_size=engine.facts.hidden_size), engine),
}


def scheduler_of(engine: Any, drafter: Drafter | None = None, form: str = "2x1", **options: Any) -> Scheduler:
    decoder = Decoder(engine, drafter or NoDrafter(), shape(form), acceptance("match"))
    return Scheduler(decoder, **options)


def steps(scheduler: Scheduler, count: int = 10_000) -> dict[int, list[Event]]:
    """The events of so many steps, or of all that there are, by request."""
    told = dict[int, list[Event]]()
    for _ in range(count):
        if scheduler.idle:
            break
        for event in scheduler.step():
            told.setdefault(event.request_id, []).append(event)
    else:
        assert count < 10_000, "it never ends"
    return told


def alone(engine: Any, prompt: list[int], **options: Any) -> list[int]:
    """What plain decoding gives, with nothing beside it."""
    return decode(engine, [made(prompt, **options)])[0]


def made(prompt: list[int], **options: Any) -> Sequence:
    return make_sequence(prompt, context=CONTEXT, **options)


def texts(events: dict[int, list[Event]]) -> dict[int, list[int]]:
    return {one: [token for event in told for token in event.tokens] for one, told in events.items()}


# -- texts -------------------------------------------------------------------------------------------------------------


@functools.cache
def written_alone(kind: str) -> list[list[int]]:
    return [alone(ENGINES[kind](), prompt, **options) for prompt, options in MIXED]


MIXED: list[tuple[list[int], dict[str, Any]]] = [
    (some_tokens(70, seed=1), {"max_tokens": 14}),
    (some_tokens(3, seed=2), {"max_tokens": 20, "temperature": 0.9, "seed": 5}),
    (some_tokens(1, seed=3), {"max_tokens": 9}),
    (some_tokens(70, seed=1)[:40], {"max_tokens": 12, "temperature": 1.1, "seed": 6, "top_p": 0.9}),
    (some_tokens(33, seed=4), {"max_tokens": 10, "repetition_penalty": 1.3}),
]


READ = [
    *((kind, "lookups") for kind in ENGINES), *(("one call", name) for name in DRAFTERS if name != "lookups"),
    ("gpt2", "eagle"), ("gpt2", "block"), ("gemma2", "medusa"), ("llama", "draft model"),
]  # fmt: skip


@pytest.mark.parametrize(
    ("pair", "rows"),
    by_night(itertools.product(READ, [1, 3, 16, 1000]), but=[*zip(READ, itertools.cycle([3, 1000]))]),
    ids=shown,
)
def test_prompts_read_in_parts_and_requests_that_join_give_the_texts_written_alone(
    pair: tuple[str, str], rows: int
) -> None:
    kind, drafter = pair
    engine = ENGINES[kind]()
    scheduler = scheduler_of(engine, DRAFTERS[drafter](engine), prefill_rows=rows)
    seqs = [made(prompt, **options) for prompt, options in MIXED]
    told = dict[int, list[Event]]()
    for seq in seqs:  # each joins while the others are under way
        assert scheduler.add(seq) == seq.id
        for one, events in steps(scheduler, 2).items():
            told.setdefault(one, []).extend(events)
    for one, events in steps(scheduler).items():
        told.setdefault(one, []).extend(events)
    assert [seq.output_ids for seq in seqs] == written_alone(kind)
    assert [texts(told)[seq.id] for seq in seqs] == written_alone(kind)
    for seq in seqs:
        assert [event.finish_reason for event in told[seq.id]][-1] == seq.finish_reason == "length"
        assert all(event.finish_reason is None for event in told[seq.id][:-1])
    assert not engine._kv
    assert not engine._branches


def test_the_kv_and_hidden_states_of_a_prompt_are_the_same_read_in_any_parts() -> None:
    for kind, make in ENGINES.items():
        stored = list[tuple[torch.Tensor, ...]]()
        for rows in (1000, 1, 7):
            engine = make()
            engine.capture([0, 1, engine.facts.num_layers])
            scheduler = scheduler_of(engine, prefill_rows=rows)
            other, seq = made(some_tokens(5), max_tokens=200), made(some_tokens(50, seed=8), max_tokens=200)
            scheduler.add(other)
            steps(scheduler, 7)
            scheduler.add(seq)
            steps(scheduler, 60 if rows == 1 else 20)
            assert seq.output_ids
            kv = engine._kv[seq.id][1]
            keys = [one.transpose(-1, -2).flatten(2, 3) if one.ndim == 5 else one for one in kv._keys]  # lie in blocks
            stored.append(tuple(one[:, :, :49].clone() for one in [*keys, *kv._values, kv.states[:, None]]))
        for others in stored[1:]:
            assert all(torch.equal(one, other) for one, other in zip(stored[0], others, strict=True)), kind


def test_a_forward_that_reads_too_gives_the_trees_the_same_logits() -> None:
    for kind, make in ENGINES.items():
        engine = make()
        one, other = request(some_tokens(9)), request(some_tokens(40, seed=2))
        engine.prefill(one)
        engine.begin(other)
        tree = some_tree(7, 9)
        expected = engine.verify([one], [tree]).all_logits.clone()
        for rows in (1, 7, 31):
            got = engine.verify([one], [tree], reading=[(other, rows)])
            assert torch.equal(got.all_logits, expected), (kind, rows)
            assert got.top(1)[1][:, 0].tolist() == expected.float().argmax(-1).tolist()
        assert engine.committed(other) == 39


# -- who is read, and how much -----------------------------------------------------------------------------------------


class Watched(TableEngine):
    """Writes down what each forward was about."""

    def __init__(self) -> None:
        super().__init__(TABLE)
        self.read: list[dict[int, int]] = []
        self.decoded: list[list[int]] = []
        self.nodes: list[int] = []

    def verify(self, seqs: Any, trees: Any, firsts: Any = None, reading: Any = ()) -> Any:
        self.read.append({seq.id: count for seq, count in reading})
        self.decoded.append([seq.id for seq in seqs])
        self.nodes.append(sum(len(tree) for tree in trees))
        return super().verify(seqs, trees, firsts, reading)


def test_a_long_prompt_holds_up_nobody_for_longer_than_a_budget() -> None:
    engine = Watched()
    scheduler = scheduler_of(engine, prefill_rows=10)
    short = [made([1, 2], max_tokens=100) for _ in range(3)]
    for seq in short:
        scheduler.add(seq)
    steps(scheduler, 3)
    joining, late = made([3] * 95, max_tokens=5), made([4] * 5, max_tokens=5)
    scheduler.add(joining)
    steps(scheduler, 1)
    scheduler.add(late)
    begun = len(engine.read)
    steps(scheduler, 12)
    for read, decoded in zip(engine.read[begun:], engine.decoded[begun:], strict=True):
        assert sum(read.values()) <= 10
        assert {seq.id for seq in short} <= {*decoded}
    assert engine.read[begun] == {late.id: 4, joining.id: 6}  # the short prompt is read first
    assert late.id in engine.decoded[begun + 1]
    assert joining.output_ids


def test_trees_rest_while_a_prompt_is_read_if_they_are_sized_by_cost() -> None:
    engine = Watched()
    scheduler = scheduler_of(engine, NGram(min_n=1), "cost", prefill_rows=10)
    repeating = [made([1, 2] * 10, max_tokens=200) for _ in range(2)]
    for seq in repeating:
        scheduler.add(seq)
    steps(scheduler, 6)
    assert engine.nodes[-1] > 2
    scheduler.add(made([3] * 60, max_tokens=1))
    begun = len(engine.read)
    steps(scheduler, 7)
    with_prompt = [nodes for read, nodes in zip(engine.read[begun:], engine.nodes[begun:], strict=True) if read]
    assert with_prompt == [2] * 6


def test_who_begins_as_one_that_is_being_read_takes_its_kv_over() -> None:
    engine = TorchEngine(tiny("llama"), prefix_bytes=10**7)
    scheduler = scheduler_of(engine, prefill_rows=8)
    prompt = some_tokens(50)
    seqs = [made(prompt, max_tokens=4) for _ in range(3)] + [made([*prompt[:20], 5, 6], max_tokens=4)]
    for seq in seqs:
        scheduler.add(seq)
    scheduler.add(other := made(some_tokens(20, seed=9), max_tokens=4))
    steps(scheduler, 2)
    assert other.id in engine._kv
    assert seqs[1].id not in engine._kv
    steps(scheduler)
    assert [seq.metrics.reused_tokens for seq in seqs] == [0, 49, 49, 20]
    assert [seq.output_ids for seq in seqs] == [alone(engine, seq.prompt_ids, max_tokens=4) for seq in seqs]


# -- leaving -----------------------------------------------------------------------------------------------------------


def test_what_was_cancelled_is_gone_and_the_others_go_on() -> None:
    engine = ENGINES["one call"]()
    drafter = DRAFTERS["eagle"](engine)
    scheduler = scheduler_of(engine, drafter, prefill_rows=16)
    seqs = [made(prompt, **options) for prompt, options in MIXED]
    for seq in seqs:
        scheduler.add(seq)
    steps(scheduler, 3)
    reading, decoding = seqs[0], seqs[2]
    assert not reading.output_ids
    assert decoding.output_ids
    for seq in (reading, decoding):
        scheduler.cancel(seq.id)
    scheduler.cancel(10**9)  # nobody's
    told = steps(scheduler, 1)
    assert not {reading.id, decoding.id} & ({*engine._kv} | {*told})
    assert not {reading.id, decoding.id} & {*drafter._engine._states}  # type: ignore[attr-defined]
    steps(scheduler)
    kept = [i for i, seq in enumerate(seqs) if seq not in (reading, decoding)]
    assert [seqs[i].output_ids for i in kept] == [written_alone("one call")[i] for i in kept]
    assert not engine._kv
    waiting = made([5, 6], max_tokens=3)
    scheduler.add(waiting)
    scheduler.cancel(waiting.id)
    assert scheduler.idle
    assert scheduler.step() == []


def test_over_its_deadline_a_request_ends_with_what_it_has_and_others_go_on() -> None:
    engine = TableEngine(TABLE)
    scheduler = scheduler_of(engine, max_batch=2)
    slow = made([1, 2], max_tokens=10_000, timeout=60)
    other, waiting = made([3, 4], max_tokens=40), made([5], max_tokens=5, timeout=60)
    for seq in (slow, other, waiting):
        scheduler.add(seq)
    steps(scheduler, 4)
    slow.deadline = waiting.deadline = time.perf_counter() - 1
    told = steps(scheduler, 1)
    assert slow.finish_reason == waiting.finish_reason == "timeout"
    assert told[slow.id] == [Event(slow.id, [], "timeout")]
    assert waiting.output_ids == []
    assert slow.output_ids
    assert slow.output_ids == alone(engine, [1, 2], max_tokens=len(slow.output_ids))
    assert {*engine._committed} == {other.id}
    steps(scheduler)
    assert other.output_ids == alone(engine, [3, 4], max_tokens=40)


def test_a_timeout_is_an_option() -> None:
    llm = LLM(tiny("llama"), "suffix")
    prompts, params = (
        [some_tokens(5), some_tokens(9)],
        [SamplingParams(max_tokens=9, timeout=0), SamplingParams(max_tokens=40)],
    )
    results = llm.generate(prompts, params)
    assert [one.finish_reason for one in results] == ["timeout", "length"]
    assert results[0].token_ids == []
    assert results[0].error is None
    assert results[1].token_ids == llm.plain().generate([prompts[1]], params[1])[0].token_ids
    with pytest.raises(OptionError, match="without a timeout"):
        SamplingParams(num_beams=2, timeout=1)


# -- failing -----------------------------------------------------------------------------------------------------------


def late(count: int) -> Callable[[list[int]], bool]:
    """A rule that raises once a text has so many ids."""

    def rule(ids: list[int]) -> bool:
        if len(ids) >= count:
            raise KeyError("no such rule")
        return False

    return rule


def test_rules_that_raise_end_their_request_alone_with_what_came_before() -> None:
    engine = TorchEngine(tiny("llama"))
    scheduler = scheduler_of(engine, NGram(min_n=1))
    good = made(some_tokens(5), max_tokens=30)
    bad = made(some_tokens(6), max_tokens=30, stop_rules=(late(17),))
    for seq in (good, bad):
        scheduler.add(seq)
    told = steps(scheduler)
    assert good.output_ids == alone(engine, good.prompt_ids, max_tokens=30)
    assert bad.output_ids == alone(engine, bad.prompt_ids, max_tokens=10)
    assert told[bad.id][-1].finish_reason == "error"
    assert isinstance(bad.error, RequestError)
    assert isinstance(bad.error.__cause__, KeyError)
    assert not engine._kv


class Poisoned(TableEngine):
    """Raises whenever a text with a certain token is in a forward."""

    def __init__(self, token: int, error: BaseException) -> None:
        super().__init__(TABLE)
        self.token, self.error = token, error

    def verify(self, seqs: Any, trees: Any, firsts: Any = None, reading: Any = ()) -> Any:
        if any(self.token in seq.prompt_ids for seq in [*seqs, *(seq for seq, _ in reading)]):
            raise self.error
        return super().verify(seqs, trees, firsts, reading)

    def commit(self, seqs: Any, paths: Any) -> None:
        super().commit(seqs, paths)
        if any(len(seq.tokens) >= -self.token > 0 for seq in seqs):  # half of the step is done
            self.token = 0
            raise self.error


@pytest.mark.parametrize("error", [RuntimeError("out of memory"), ModelError("changed")])
def test_a_request_whose_steps_fail_ends_alone(error: Exception) -> None:
    engine = Poisoned(11, error)
    scheduler = scheduler_of(engine, NGram(min_n=1), prefill_rows=4)
    good = [made(prompt, max_tokens=30, temperature=1.0) for prompt in ([1, 2, 3], [4], [5] * 20)]
    bad = made([5, 11, 5], max_tokens=30)
    for seq in good[:2]:
        scheduler.add(seq)
    steps(scheduler, 3)
    for seq in (bad, good[2]):
        scheduler.add(seq)
    with pytest.warns(UserWarning, match="each is tried alone"):
        told = steps(scheduler)
    assert [seq.output_ids for seq in good] == [
        alone(TableEngine(TABLE), seq.prompt_ids, max_tokens=30, temperature=1.0) for seq in good
    ]
    assert bad.finish_reason == told[bad.id][-1].finish_reason == "error"
    assert bad.error is error or (isinstance(bad.error, StepError) and bad.error.__cause__ is error)
    assert not engine._committed


def test_an_interrupted_step_loses_nothing() -> None:
    engine = Poisoned(-9, KeyboardInterrupt())
    scheduler = scheduler_of(engine, NGram(min_n=1))
    seqs = [made([1, 2], max_tokens=30, temperature=1.0), made([3, 4, 5], max_tokens=30, temperature=1.0)]
    for seq in seqs:
        scheduler.add(seq)
    with pytest.raises(KeyboardInterrupt):
        steps(scheduler)
    assert not engine._committed
    told = texts(steps(scheduler))
    for seq in seqs:
        assert seq.output_ids == alone(TableEngine(TABLE), seq.prompt_ids, max_tokens=30, temperature=1.0)
        assert seq.output_ids[-len(told[seq.id]) :] == told[seq.id]


def test_what_is_no_request_is_refused_and_ends_nobody() -> None:
    scheduler = scheduler_of(TableEngine(TABLE))
    scheduler.add(seq := made([1], max_tokens=5))
    for wrong, told in ((3, "is none"), (None, "is none"), (seq, "decoded twice")):
        with pytest.raises(OptionError, match=told):
            scheduler.add(wrong)  # type: ignore[arg-type]
    steps(scheduler)
    assert len(seq.output_ids) == 5


# -- memory ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kv_bytes", [0, 100, 200, 300, 1000])
def test_when_memory_runs_out_the_youngest_waits_and_is_never_lost(kv_bytes: int) -> None:
    """A table's KV takes a byte for each row."""
    engine = Watched()
    scheduler = scheduler_of(engine, prefill_rows=8, kv_bytes=kv_bytes)
    asked: list[tuple[list[int], dict[str, Any]]]
    asked = [([i + 1, i + 2] * (1 + 3 * i), {"max_tokens": 100, "temperature": 0.7 * (i % 2)}) for i in range(5)]
    seqs = [made(prompt, **options) for prompt, options in asked]
    for seq in seqs:
        scheduler.add(seq)
    told, back, order = dict[int, list[Event]](), 0, list[int]()
    while not scheduler.idle:
        before = {seq.id for seq in scheduler._active}
        for event in scheduler.step():
            told.setdefault(event.request_id, []).append(event)
            order += [event.request_id] * (event.finish_reason is not None)
        there = [seq for seq in scheduler._active if not seq.finished]
        back += sum(seq.id in before and seq in scheduler._waiting for seq in seqs)
        rows = sum(len(seq.tokens) + shape("2x1").max_nodes for seq in there)
        assert len(there) <= 1 or rows <= kv_bytes + 3 * len(there)  # what a step adds
    expected = [alone(TableEngine(TABLE), prompt, **options) for prompt, options in asked]
    assert [seq.output_ids for seq in seqs] == expected == [texts(told)[seq.id] for seq in seqs]
    assert order[0] == seqs[0].id
    assert back > 0 or kv_bytes not in (200, 300)
    assert kv_bytes < 1000 or max(map(len, engine.decoded)) == 5


def test_memory_is_what_storage_takes_and_models_are_set_back_too() -> None:
    requests = [(prompt, {**options, "max_tokens": 110}) for prompt, options in MIXED[:3]]
    expected = {
        kind: [alone(plain, prompt, **options) for prompt, options in requests]
        for kind in ("one call", "llama") for plain in [ENGINES[kind]()]
    }  # fmt: skip
    for kind, name in (("one call", "lookups"), ("llama", "draft model"), ("one call", "eagle")):
        engine = ENGINES[kind]()
        one = engine.nbytes(made(MIXED[0][0]), 120)
        scheduler = scheduler_of(engine, DRAFTERS[name](engine), prefill_rows=16, kv_bytes=2 * one)
        seqs = [made(prompt, **options) for prompt, options in requests]
        for seq in seqs:
            scheduler.add(seq)
        back = set[int]()
        while not scheduler.idle:
            scheduler.step()
            held = sum(kv.nbytes for _, kv in engine._kv.values())
            assert held <= 2 * one or len(engine._kv) == 1
            back |= {seq.id for seq in scheduler._waiting if seq.output_ids}
        assert back, kind
        assert [seq.output_ids for seq in seqs] == expected[kind]


def test_storage_grows_with_the_text_and_its_size_is_known_before() -> None:
    engine = TorchEngine(tiny("llama"))
    seq = request(some_tokens(20), max_tokens=250)
    expected = engine.nbytes(seq, 20)
    engine.begin(seq)
    kv = engine._kv[seq.id][1]
    assert kv.nbytes == expected == engine.nbytes(seq, 30)
    assert kv.capacity < 150
    expected = engine.nbytes(seq, kv.capacity + 1)
    kv.reserve(kv.capacity + 1)
    assert kv.nbytes == expected


# -- controls: what these tests look at does fail ----------------------------------------------------------------------


def test_a_token_that_is_not_read_shows_in_the_text(monkeypatch: pytest.MonkeyPatch) -> None:
    expected = [alone(TableEngine(TABLE), [3, 4, 5, token], max_tokens=20) for token in range(6)]
    own = Decoder.unread
    monkeypatch.setattr(Decoder, "unread", lambda self, seq: max(0, own(self, seq) - 1))
    assert [alone(TableEngine(TABLE), [3, 4, 5, token], max_tokens=20) for token in range(6)] != expected


def test_rows_beside_the_trees_that_are_stored_elsewhere_show_in_the_text(monkeypatch: pytest.MonkeyPatch) -> None:
    own, expected = KVEngine._chain, written_alone("llama")
    monkeypatch.setattr(KVEngine, "_chain", staticmethod(lambda kv, ids, start: own(kv, [*ids[1:], ids[0]], start)))
    engine = ENGINES["llama"]()
    seqs = [made(prompt, **options) for prompt, options in MIXED]
    assert decode(engine, seqs) != expected


def test_memory_that_nobody_counts_is_passed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Scheduler, "_fits", lambda *_: True)
    engine = Watched()
    scheduler = scheduler_of(engine, kv_bytes=100)
    for i in range(4):
        scheduler.add(made([i + 1] * 40, max_tokens=20))
    steps(scheduler)
    assert max(map(len, engine.decoded)) == 4


def test_what_a_step_that_failed_leaves_is_half_of_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Scheduler, "_set_back", lambda self, seq: None)
    engine = Poisoned(-9, KeyboardInterrupt())
    scheduler = scheduler_of(engine)
    scheduler.add(seq := made([1, 2], max_tokens=30))
    with pytest.raises(KeyboardInterrupt):
        steps(scheduler)
    assert engine.committed(seq) == len(seq.tokens)  # and not one less


# -- threads -----------------------------------------------------------------------------------------------------------


def test_two_streams_of_two_threads_share_forwards() -> None:
    llm = LLM(tiny("llama"), "none")
    params, widths, barrier = SamplingParams(max_tokens=60, ignore_eos=True), list[int](), threading.Barrier(2)
    own = llm.engine.verify

    def verify(seqs: Any, *more: Any, **named: Any) -> Any:
        widths.append(len(seqs))
        return own(seqs, *more, **named)

    llm.engine.verify = verify  # type: ignore[method-assign]

    def read(number: int) -> list[int]:
        barrier.wait()
        stream = llm.stream(some_tokens(5 + number), params)
        return [piece.token_id for piece in stream if piece.token_id is not None]

    with ThreadPoolExecutor(2) as pool:
        got = list(pool.map(read, range(2)))
    assert widths.count(2) > 40
    assert got == [llm.plain().generate([some_tokens(5 + i)], params)[0].token_ids for i in range(2)]
    assert not kv_engine(llm)._kv


def test_a_stream_that_nobody_reads_is_stopped_and_holds_up_nobody() -> None:
    llm = LLM(tiny("llama"), "none", max_batch=1, kv_mb=0)
    params = SamplingParams(max_tokens=100, ignore_eos=True)
    stream = iter(left_open := llm.stream(some_tokens(5), params))
    first = next(stream).token_id
    expected = llm.plain().generate([some_tokens(5), some_tokens(6)], params)
    assert llm.generate([some_tokens(6)], params)[0].token_ids == expected[1].token_ids
    assert 1 <= len(left_open.result.token_ids) <= AHEAD + 1
    assert [first, *(piece.token_id for piece in stream)] == expected[0].token_ids
    del stream, left_open
    assert not kv_engine(llm)._kv


@pytest.mark.parametrize("kind", ["one call", "gemma2"])
def test_eight_threads_with_mixed_requests(kind: str) -> None:
    model = tiny("llama" if kind == "one call" else kind, torch.bfloat16, hidden_size=64, intermediate_size=96)
    llm = LLM(model, ["suffix", "ngram", "recycling"], prefill_rows=7, kv_mb=0.4)
    plain = llm.plain()
    dice = random.Random(1)
    jobs = list[tuple[list[int], SamplingParams]]()
    for i in range(24):
        params = SamplingParams(
            max_tokens=dice.randint(1, 30), temperature=dice.choice([0.0, 0.8]), seed=i, n=dice.choice([1, 1, 2])
        )
        jobs.append((some_tokens(dice.choice([1, 4, 30, 90]), seed=i % 5), params))
    expected = [[one.token_ids for one in plain.generate([prompt], params)] for prompt, params in jobs]

    def write(number: int) -> Any:
        prompt, params = jobs[number]
        if number % 4 == 1 and params.n == 1:
            stream = llm.stream(prompt, params)
            tokens = [piece.token_id for piece in stream]
            assert tokens == stream.result.token_ids
            return [tokens]
        if number % 4 == 2:
            stream = llm.stream(prompt, params.model_copy(update={"n": 1}))
            next(iter(stream), None)
            stream.close()
        if number % 8 == 3:
            bad = llm.sequence(prompt, params.model_copy(update={"max_tokens": 30}))
            bad.stop_rules = (late(len(prompt) + 3),)
            for _ in llm.run([bad]):
                pass
            assert isinstance(bad.error, RequestError)
            assert len(bad.output_ids) == 2
        return [one.token_ids for one in llm.generate([prompt], params)]

    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(write, range(len(jobs)))) == expected
    assert not kv_engine(llm)._kv
    assert llm._shared._scheduler.idle
    assert not llm._shared._owned
