"""Options and processors at the ends of what can be given: followed, or a typed error of one request alone."""

from __future__ import annotations

import decimal
import fractions
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from transformers.generation import logits_process as known

from tests.conftest import decode, make_sequence, random_table
from tests.tiny_models import some_tokens, tiny
from tokentree import LLM, OptionError, RequestError, SamplingParams
from tokentree.engines.table import TableEngine
from tokentree.errors import StepError
from tokentree.sampling import process_logits, to_probs

VOCAB = 120
PROMPT, END = some_tokens(7), 2
Processor = Callable[[list[int], torch.Tensor], Any]


@pytest.fixture(scope="module")
def llm() -> LLM:
    return LLM(tiny("llama", eos_token_id=END), drafter="ngram", shape="chain:3")


# -- options -----------------------------------------------------------------------------------------------------------


class Unspeakable(ArithmeticError):
    """A value, and an error, that can't be written down, nor read as a number."""

    def __repr__(self) -> str:
        raise RuntimeError("no words")

    __str__ = __repr__

    def __float__(self) -> float:
        raise RuntimeError("no number")

    __index__ = __float__


NUMBERS: list[Any] = [
    math.nan, math.inf, -math.inf, 1e300, 5e-324, True, np.bool_(False), "1", "", b"1", [1], {1}, {}, None, 1j,
    np.float16("nan"), np.array([1, 2]), np.array(["a"]), np.datetime64("2020"), torch.tensor(True),
    torch.tensor(1 + 1j), torch.tensor([0.5, 1]), torch.empty((), device="meta"),
    10**30, -(10**30), 10**400, -(10**400), 10**5000, -(10**5000),
    decimal.Decimal("sNaN"), fractions.Fraction(1, 3), Unspeakable(), object(), len, iter([1]),
    "x" * 10_000,
]  # fmt: skip


@pytest.mark.parametrize("name", SamplingParams.model_fields)
def test_any_value_is_taken_or_refused_in_one_short_sentence(name: str) -> None:
    said = list[str]()
    for value in NUMBERS:
        try:
            SamplingParams(**{name: value})
        except OptionError as error:
            said.append(str(error))
    assert len(said) > len(NUMBERS) / 2
    assert all("\n" not in one and len(one) < 300 for one in said)


def test_whole_numbers_end_where_machines_do() -> None:
    for name in ("top_k", "max_tokens", "logprobs", "seed"):
        assert getattr(SamplingParams(**{name: 2**63 - 1}), name) == 2**63 - 1
        with pytest.raises(OptionError, match=f"{name}=9223372036854775808: input should be less than"):
            SamplingParams(**{name: 2**63})


def test_never_is_the_one_word_for_early_stopping() -> None:
    assert SamplingParams(early_stopping="never").early_stopping == "never"
    assert SamplingParams(early_stopping="true").early_stopping is True
    for word in ("yes", "1", "off", "Never"):
        with pytest.raises(OptionError, match="early_stopping"):
            SamplingParams(early_stopping=word)


def test_a_copy_with_other_values_is_checked_too() -> None:
    params = SamplingParams(temperature=0.5, stop=["a"])
    assert params.model_copy(update={"top_k": np.int64(5)}) == SamplingParams(temperature=0.5, stop=["a"], top_k=5)
    assert params.model_copy() == params.model_copy(deep=True) == params
    for update in ({"temperature": math.nan}, {"stop": ""}, {"min_tokens": 10**6}, {"temprature": 1.0}):
        with pytest.raises(OptionError):
            params.model_copy(update=update)


@pytest.mark.parametrize("temperature", [2e-5, 1e30, 1e38, 1e39, 1e300])
def test_the_hottest_texts_keep_their_bans(temperature: float) -> None:
    params = SamplingParams(temperature=temperature, logit_bias={3: -math.inf})
    logits = torch.randn(VOCAB, generator=torch.Generator().manual_seed(0))
    probs = to_probs(process_logits(logits, params, [1], []), params)
    assert probs[3] == 0
    if temperature <= 1e38:  # above, transformers divides by infinity
        banned = logits.index_fill(0, torch.tensor([3]), -math.inf)[None]
        warped = known.TemperatureLogitsWarper(temperature)(torch.empty(1, 0, dtype=torch.long), banned)
        assert torch.allclose(probs, warped[0].double().softmax(-1))
    else:
        assert torch.allclose(probs[:3], torch.full((3,), 1 / (VOCAB - 1), dtype=torch.float64))


EXTREMES: list[dict[str, Any]] = [
    {"temperature": 1e-5}, {"temperature": 1e300}, {"temperature": 1e300, "logit_bias": {5: -math.inf}},
    {"temperature": 1.0, "top_k": 2**62}, {"temperature": 1.0, "top_k": 1}, {"temperature": 1.0, "top_p": 5e-324},
    {"temperature": 1.0, "min_p": 1.0}, {"temperature": 1.0, "top_p": 1 - 2**-53, "min_p": 5e-324},
    {"temperature": 1.0, "repetition_penalty": 1e9}, {"repetition_penalty": 2e-9},
    {"presence_penalty": -1e9, "frequency_penalty": 1e9}, {"logit_bias": {5: 1e30, 6: -1e300}},
    {"logprobs": 2**62}, {"min_tokens": 8}, {"timeout": 1e300}, {"timeout": 0.0}, {"max_tokens": 2**62},
    {"stop_token_ids": list(range(VOCAB))}, {"stop_token_ids": list(range(VOCAB)), "min_tokens": 8},
    {"stop_token_ids": [10**4000]}, {"logit_bias": {10**4000: 1.0}},
]  # fmt: skip


@pytest.mark.parametrize("options", EXTREMES, ids=str)
def test_extremes_give_plains_text_or_a_typed_error(llm: LLM, options: dict[str, Any]) -> None:
    params = SamplingParams(**{"max_tokens": 8, "seed": 1} | options)
    results = [one.generate([PROMPT, PROMPT[:3]], [params, SamplingParams(max_tokens=8)]) for one in (llm, llm.plain())]
    (got, other), (expected, _) = results
    assert got.token_ids == expected.token_ids
    assert type(got.error) is type(expected.error)
    assert got.error is None or (isinstance(got.error, RequestError | OptionError) and len(str(got.error)) < 200)
    assert other.error is None
    assert len(other.token_ids) == 8


# -- processors --------------------------------------------------------------------------------------------------------

OWN = torch.zeros(VOCAB)
OWN[END] = 5.0
BIAS = nn.Parameter(torch.linspace(0, 1, VOCAB))


class Kind(torch.Tensor):
    """A tensor of a class of its own."""


def with_gradients(ids: list[int], logits: torch.Tensor) -> torch.Tensor:
    with torch.enable_grad():
        return BIAS * 2


def emptied(ids: list[int], logits: torch.Tensor) -> torch.Tensor:
    ids.clear()
    return BIAS


RULES: dict[str, tuple[Processor, torch.Tensor]] = {
    "its own tensor": (lambda ids, logits: OWN, OWN),
    "one value for all": (lambda ids, logits: torch.ones(1).expand(VOCAB), torch.ones(VOCAB)),
    "every other of more": (lambda ids, logits: BIAS.detach().repeat_interleave(2)[::2], BIAS.detach()),
    "a parameter": (lambda ids, logits: BIAS, BIAS.detach()),
    "with gradients": (with_gradients, 2 * BIAS.detach()),
    "an own class": (lambda ids, logits: BIAS.detach().as_subclass(Kind), BIAS.detach()),
    "emptied ids": (emptied, BIAS.detach()),
    "written over": (lambda ids, logits: logits.copy_(BIAS), BIAS.detach()),
}


@pytest.mark.parametrize("beams", [1, 2])
@pytest.mark.parametrize("min_tokens", [0, 4])
@pytest.mark.parametrize("rule", RULES)
def test_what_a_processor_returns_stays_its_own(llm: LLM, rule: str, min_tokens: int, beams: int) -> None:
    """Bans are put into a copy, whatever kind of tensor it is."""
    processor, scores = RULES[rule]
    before = scores.clone()
    options: dict[str, Any] = {"max_tokens": 8, "min_tokens": min_tokens, "num_beams": beams}
    got = llm.generate(PROMPT, SamplingParams(logits_processors=processor, **options))[0]
    assert torch.equal(scores, before)
    fresh = SamplingParams(logits_processors=lambda ids, logits: before.clone(), **options)
    assert got.token_ids == llm.generate(PROMPT, fresh)[0].token_ids


def reshaped(ids: list[int], logits: torch.Tensor) -> Any:
    return logits.resize_(3)


def sparse(ids: list[int], logits: torch.Tensor) -> Any:
    return logits.to_sparse()


def complex_numbers(ids: list[int], logits: torch.Tensor) -> Any:
    return logits.to(torch.complex64)


def unspeakable(ids: list[int], logits: torch.Tensor) -> Any:
    raise Unspeakable


def long_winded(ids: list[int], logits: torch.Tensor) -> Any:
    raise KeyError("many words " * 1000)


def stopping(ids: list[int], logits: torch.Tensor) -> Any:
    raise StopIteration


def deep(ids: list[int], logits: torch.Tensor) -> Any:
    return deep(ids, logits)


def large(ids: list[int], logits: torch.Tensor) -> Any:
    return logits.double() + 1e300


def test_what_is_too_large_behind_the_temperature_is_no_fault_of_the_model(llm: LLM) -> None:
    """Half of the largest float32 is finite, and a temperature of 0.4 makes it infinite."""
    params = SamplingParams(temperature=0.4, max_tokens=5, logits_processors=lambda ids, logits: logits * 0 + 1.7e38)
    with pytest.raises(RequestError, match=r"request's rules give hold 1.7e\+38: .* behind the temperature"):
        llm.generate(PROMPT, params)
    cool = params.model_copy(update={"temperature": 0.6})
    assert llm.generate(PROMPT, cool)[0].finish_reason == "length"


FAILING: dict[Processor, str] = {
    reshaped: r"returned float32\[3\]", sparse: r"returned sparse_coo float32\[120\]", complex_numbers: "complex64",
    unspeakable: "raised Unspeakable$", long_winded: "raised KeyError: 'many words", stopping: "raised StopIteration$",
    deep: "raised RecursionError", large: "hold inf",
}  # fmt: skip


@pytest.mark.parametrize("beams", [1, 2])
@pytest.mark.parametrize("failing", FAILING, ids=lambda failing: failing.__name__)
def test_what_fails_is_one_short_sentence_of_that_request(llm: LLM, failing: Processor, beams: int) -> None:
    params = [SamplingParams(max_tokens=5, logits_processors=failing, num_beams=beams), SamplingParams(max_tokens=5)]
    bad, good = llm.generate([PROMPT, PROMPT], params)
    assert isinstance(bad.error, RequestError)
    if failing is not large or beams == 1:  # a beam search ends dead there
        with pytest.raises(RequestError, match=FAILING[failing]):
            raise bad.error
    assert len(str(bad.error)) < 300
    assert good.token_ids == llm.generate(PROMPT, params[1])[0].token_ids
    assert not llm.engine._kv  # type: ignore[attr-defined]


def test_a_rule_that_ends_texts_may_be_unspeakable_too() -> None:
    def rule(ids: list[int]) -> bool:
        raise Unspeakable

    seq = make_sequence([1], stop_rules=(rule,))
    decode(TableEngine(random_table(8, 1)), [seq])
    with pytest.raises(RequestError, match=r"raised Unspeakable$"):
        raise seq.error or AssertionError


def test_a_beam_search_that_fails_otherwise_ends_alone(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*args: Any) -> None:
        raise MemoryError("no room")

    monkeypatch.setattr("tokentree.beam.BeamSearch.advance", full)
    params = [SamplingParams(max_tokens=5, num_beams=2), SamplingParams(max_tokens=5)]
    bad, good = llm.generate([PROMPT, PROMPT], params)
    assert isinstance(bad.error, StepError)
    assert isinstance(bad.error.__cause__, MemoryError)
    assert good.error is None
    assert not llm.engine._kv  # type: ignore[attr-defined]


# -- a text in the midst of another ------------------------------------------------------------------------------------


@pytest.mark.parametrize("beams", [1, 2])
@pytest.mark.parametrize("way", ["generate", "stream", "twin", "beams"])
def test_a_model_writes_no_text_in_the_midst_of_its_own_step(llm: LLM, way: str, beams: int) -> None:
    few = SamplingParams(max_tokens=2)
    ways: dict[str, Callable[[], Any]] = {
        "generate": lambda: llm.generate(PROMPT, few), "stream": lambda: list(llm.stream(PROMPT, few)),
        "twin": lambda: llm.plain().generate(PROMPT, few),
        "beams": lambda: llm.generate(PROMPT, SamplingParams(max_tokens=2, num_beams=2)),
    }  # fmt: skip

    def nested(ids: list[int], logits: torch.Tensor) -> torch.Tensor:
        ways[way]()
        return logits

    expected = llm.generate(PROMPT, SamplingParams(max_tokens=8))[0].token_ids
    params = SamplingParams(max_tokens=8, logits_processors=nested, num_beams=beams)
    bad, good = llm.generate([PROMPT, PROMPT], [params, SamplingParams(max_tokens=8)])
    with pytest.raises(RequestError, match=r"^a model can't write another text in the midst of a step"):
        raise bad.error or AssertionError
    assert bad.finish_reason == "error"
    assert good.token_ids == expected
    assert not llm.engine._kv  # type: ignore[attr-defined]
    assert llm.generate(PROMPT, SamplingParams(max_tokens=8))[0].token_ids == expected


def test_a_watcher_neither() -> None:
    def watch(*step: Any) -> None:
        mine.generate(PROMPT, SamplingParams(max_tokens=2))

    mine = LLM(tiny("llama", eos_token_id=None), watch=watch)
    with pytest.raises(RequestError, match="in the midst of a step"):
        mine.generate(PROMPT, SamplingParams(max_tokens=8))
    assert len(mine.plain().generate(PROMPT, SamplingParams(max_tokens=8))[0].token_ids) == 8


def test_another_model_may(llm: LLM) -> None:
    judge = LLM(tiny("llama", seed=1, eos_token_id=None))

    def judged(ids: list[int], logits: torch.Tensor) -> torch.Tensor:
        said = judge.generate(ids, SamplingParams(max_tokens=1))[0].token_ids
        return logits.index_fill(0, torch.tensor(said), -math.inf)

    params = SamplingParams(max_tokens=6, logits_processors=judged)
    results = [one.generate(PROMPT, params)[0] for one in (llm, llm.plain())]
    assert results[0].token_ids == results[1].token_ids
    assert results[0].error is None
