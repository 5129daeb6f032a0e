"""Log-probabilities of prompts are those that the same text has where it is written."""

from __future__ import annotations

import dataclasses
import functools
import itertools
from typing import Any

import pytest
import torch

from tests.conftest import make_sequence, random_table
from tests.engines.gpu.test_engine import prepared
from tests.hybrids import tiny_hybrid
from tests.tiny_models import full_logits, request, some_tokens, tiny
from tokentree import LLM, SamplingParams
from tokentree.acceptance import acceptance
from tokentree.decoder import Decoder
from tokentree.drafters.none import NoDrafter
from tokentree.engines.base import Engine
from tokentree.engines.gpu.engine import TritonEngine
from tokentree.engines.output import TargetOutput
from tokentree.engines.table import TableEngine
from tokentree.errors import InvariantError, OptionError, RequestError
from tokentree.prompt_kv import PromptKV
from tokentree.result import Result
from tokentree.scheduler import Scheduler
from tokentree.sequence import Sequence, TokenLogprobs
from tokentree.shapes import shape

SCORED = SamplingParams(prompt_logprobs=3, max_tokens=0, ignore_eos=True)
OTHERS = [some_tokens(40, seed=5), some_tokens(7, seed=6)]


@functools.cache
def model_of(kind: str) -> Any:
    if kind == "hybrid":
        return tiny_hybrid("lfm2")
    return tiny("llama", torch.bfloat16 if kind == "call" else torch.float32)


@functools.cache
def llm_of(kind: str, rows: int = 64) -> LLM:
    """Its forward is one compiled call, goes through modules with our attention, or with the model's own, or has
    recurrent states."""
    attention = "sdpa" if kind == "sdpa" else None
    return LLM(model_of(kind), ["ngram", "suffix"], shape="2x2", attention=attention, prefill_rows=rows)


@functools.cache
def written(kind: str) -> Result:
    """A text, with its log-probabilities."""
    params = SamplingParams(max_tokens=40, temperature=1.0, seed=3, logprobs=3, ignore_eos=True)
    return llm_of(kind).generate([some_tokens(30)], params)[0]


def text_of(kind: str) -> list[int]:
    return [*some_tokens(30), *written(kind).token_ids]


def check(kind: str, scored: list[TokenLogprobs | None] | None) -> None:
    """Exactly what was said when the text was written, and what transformers says of all of it."""
    assert scored is not None
    assert scored[0] is None
    text, known = text_of(kind), written(kind).logprobs
    assert [one.token for one in scored[1:] if one] == text[1:]
    assert known is not None
    if kind == "sdpa":
        assert [one.logprob for one in scored[30:] if one] == pytest.approx([one.logprob for one in known], abs=1e-3)
    else:
        assert scored[30:] == known
    if kind != "call":
        rows = full_logits(model_of(kind), text)[:-1].log_softmax(-1)
        for one, row in zip(scored[1:], rows, strict=True):
            assert one is not None
            assert one.logprob == pytest.approx(float(row[one.token]), abs=1e-3)
            assert list(one.top.values()) == pytest.approx(row.topk(3).values.tolist(), abs=1e-3)


@pytest.mark.parametrize("kind", ["call", "modules", "sdpa", "hybrid"])
def test_whole_in_parts_and_beside_others(kind: str) -> None:
    text = text_of(kind)
    for rows in (64, 9):
        params = [
            SCORED,
            SamplingParams(max_tokens=9, ignore_eos=True),
            SCORED,
            SCORED.model_copy(update={"max_tokens": 4}),
        ]
        found = llm_of(kind, rows).generate([text, *OTHERS, text], params)
        for result in (found[0], found[3]):
            check(kind, result.prompt_logprobs)
            assert result.metrics.reused_tokens == 0
        assert [len(result.token_ids) for result in found] == [0, 9, 0, 4]
        assert {result.finish_reason for result in found} == {"length"}
        assert found[1].prompt_logprobs is None
        assert len(found[2].prompt_logprobs or ()) == len(OTHERS[1])


@pytest.mark.parametrize("kind", ["call", "hybrid"])
def test_kv_of_others_is_not_reused_and_its_own_is(kind: str) -> None:
    llm, text = LLM(model_of(kind), "none", prefill_rows=9), text_of(kind)
    plain = SamplingParams(max_tokens=2)
    other = text[:50] + some_tokens(20, seed=9)
    before = llm.generate([text, other], plain)  # what they share is kept, and all of each
    assert llm.generate([text], plain)[0].metrics.reused_tokens > 0
    scored, beside = llm.generate([text, text], [SCORED, plain])
    assert scored.metrics.reused_tokens == 0
    assert beside.token_ids == before[0].token_ids
    check(kind, scored.prompt_logprobs)
    fresh = LLM(model_of(kind), "none", prefill_rows=9)
    fresh.generate([text], SCORED)
    again = fresh.generate([text], plain)[0]
    assert again.metrics.reused_tokens > 0
    assert again.token_ids == before[0].token_ids


@pytest.mark.parametrize("kind", ["call", "hybrid"])
def test_set_back_in_its_midst_nothing_is_doubled_or_lost(kind: str) -> None:
    llm = LLM(model_of(kind), "none")
    scheduler = Scheduler(llm.decoder, prefill_rows=9)
    llm.generate([text_of(kind)], SamplingParams(max_tokens=1))  # whose KV is there
    seq = llm.sequence(text_of(kind), SCORED.model_copy(update={"max_tokens": 12}))
    scheduler.add(seq)
    lengths = []
    for step in range(30):
        scheduler.step()
        lengths.append(len(seq.prompt_logprobs))
        if step in (2, 4, 12) and not seq.finished:  # twice while it is read, and then while it is decoded
            scheduler._set_back(seq)
    assert lengths[2:5] == sorted(lengths[2:5])
    assert 1 < lengths[2] < lengths[4] < 70
    assert seq.finish_reason == "length"
    assert len(seq.output_ids) == 12
    check(kind, seq.prompt_logprobs)
    assert not llm.engine._kv  # type: ignore[attr-defined]


class Short(TritonEngine):
    """Whose forwards are so short that a prompt takes several."""

    sizes = (1, 2, 4, 8, 16)


class Failing(TableEngine):
    """Its second forward fails once it has been made."""

    def verify(self, *args: Any, **options: Any) -> TargetOutput:
        out = super().verify(*args, **options)
        self.calls = getattr(self, "calls", 0) + 1
        if self.calls == 2:
            raise MemoryError
        return out


def scheduler_of(engine: Engine, **options: Any) -> Scheduler:
    return Scheduler(Decoder(engine, NoDrafter(), shape("2x2"), acceptance("match")), **options)


def run(scheduler: Scheduler, *seqs: Sequence) -> None:
    for seq in seqs:
        scheduler.add(seq)
    while not scheduler.idle:
        scheduler.step()


def of_table(table: torch.Tensor, ids: list[int]) -> list[float]:
    return [float(table[a].log_softmax(-1)[b]) for a, b in itertools.pairwise(ids)]


@pytest.mark.filterwarnings("ignore:a step of")
@pytest.mark.parametrize("kv_bytes", [None, 200])
@pytest.mark.parametrize("kind", [TableEngine, Failing])
def test_steps_that_fail_and_memory_that_runs_out(
    kind: type[TableEngine], kv_bytes: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:  # fmt: skip
    table = random_table(8, 1, 0, 2.0)
    prompts = [[(i * i + j) % 8 for i in range(20 + j)] for j in range(3)]
    seqs = [make_sequence(ids, prompt_logprobs=1, max_tokens=90) for ids in prompts]
    scheduler = scheduler_of(kind(table), prefill_rows=4, kv_bytes=kv_bytes)
    set_back, back = scheduler._set_back, list[int]()

    def counting(seq: Sequence) -> None:
        back.append(len(seq.prompt_logprobs))
        set_back(seq)

    monkeypatch.setattr(scheduler, "_set_back", counting)
    run(scheduler, *seqs)
    assert bool(back) == (kind is Failing or kv_bytes is not None)
    for seq, ids in zip(seqs, prompts, strict=True):
        assert seq.error is None
        assert [one.logprob for one in seq.prompt_logprobs[1:] if one] == pytest.approx(of_table(table, ids))


def test_a_prompt_of_one_token_has_nothing_to_score() -> None:
    seqs = [make_sequence([3], prompt_logprobs=2, max_tokens=most) for most in (0, 3)]
    run(scheduler_of(TableEngine(random_table(8, 1, 0, 2.0))), *seqs)
    assert [seq.prompt_logprobs for seq in seqs] == [[None]] * 2
    assert [(len(seq.output_ids), seq.finish_reason) for seq in seqs] == [(0, "length"), (3, "length")]


def test_logits_that_are_no_numbers_end_the_request_alone() -> None:
    table = random_table(8, 1, 0, 2.0)
    table[5] = float("nan")
    bad = make_sequence([1, 5, 2, 3], prompt_logprobs=2, max_tokens=0)
    good = make_sequence([1, 2, 2, 3], prompt_logprobs=2, max_tokens=0)
    run(scheduler_of(TableEngine(table)), bad, good)
    assert isinstance(bad.error, RequestError)
    assert (good.error, len(good.prompt_logprobs)) == (None, 4)


def test_an_engine_that_reuses_what_has_to_be_read_is_found_out() -> None:
    class Reusing(TableEngine):
        def begin(self, seq: Sequence) -> int:
            self._committed[seq.id] = seq.tokens[:3]
            return 3

    decoder = scheduler_of(Reusing(random_table(8, 1, 0, 2.0)))._decoder
    with pytest.raises(InvariantError, match="tokens 1 to 3"):
        decoder.prefill(make_sequence([1, 5, 2, 3, 4], prompt_logprobs=2))


def test_kernels_of_our_own() -> None:
    """A prompt longer than a forward, and one beside it, have the bits of a tree's rows."""
    engine = Short(prepared(num_hidden_layers=1), 1 << 30, 2000)
    known = request(some_tokens(20), max_tokens=8, logprobs=2)
    scheduler = scheduler_of(engine, prefill_rows=24)
    run(scheduler, known)
    scored, beside = request(known.tokens, prompt_logprobs=2, max_tokens=0), request(some_tokens(5), max_tokens=2)
    part = request(known.tokens[:9], prompt_logprobs=2, max_tokens=1)
    run(scheduler, beside, scored, part)
    assert scored.metrics.reused_tokens == 0
    assert [one.token for one in scored.prompt_logprobs if one] == known.tokens[1:]
    assert scored.prompt_logprobs[20:] == known.logprobs
    assert scored.prompt_logprobs[:9] == part.prompt_logprobs
    assert (len(beside.output_ids), len(part.output_ids)) == (2, 1)
    engine.check()


def test_wrong_uses() -> None:
    with pytest.raises(OptionError, match="max_tokens=0 is less than 1"):
        SamplingParams(max_tokens=0)
    with pytest.raises(OptionError, match="nor logprobs"):
        SamplingParams(num_beams=2, prompt_logprobs=1)
    with pytest.raises(OptionError, match="prompt_logprobs=-1"):
        SamplingParams(prompt_logprobs=-1)
    kv: Any = PromptKV.__new__(PromptKV)
    seq = make_sequence([1, 2])
    with pytest.raises(OptionError, match="the model read by itself"):
        Sequence([1, 2], SCORED, seq.noise, seq.context, prompt_kv=kv)


def test_an_engine_that_gives_none_says_so() -> None:
    class Without(TableEngine):
        @property
        def info(self) -> Any:
            return dataclasses.replace(super().info, scores_prompts=False)

    llm = LLM(engine=Without(random_table(8, 1, 0, 2.0)), drafter="none", shape="2x2")
    with pytest.raises(OptionError, match="a table gives no logits of prompts here"):
        llm.generate([[1, 2]], SCORED)
