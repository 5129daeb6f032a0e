"""Logits to probabilities, against transformers and against formulas; and the random numbers."""

from __future__ import annotations

import math
from collections import Counter
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import (
    LogitsProcessor,
    LogitsProcessorList,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from tests.conftest import make_sequence
from tests.strategies import numbers
from tokentree.errors import OptionError, RequestError
from tokentree.kernels.topk import greedy
from tokentree.sampling import SamplingParams, SeededNoise, process_logits, seeded_noise, to_probs

VOCAB = 40
WIDE = 6000  # more than are looked at for top_p, unless that takes them all
PROMPT, OUTPUT = [3, 5, 3], [7, 5, 9, 5]


def _logits(seed: int, vocab: int = VOCAB) -> torch.Tensor:
    return 3 * torch.randn(vocab, generator=torch.Generator().manual_seed(seed))


def _plain_noise(seed: int) -> SeededNoise:
    return SeededNoise(np.random.default_rng(seed))


# -- options --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"temprature": 1.0}, "temprature=1.0: extra inputs are not permitted"),
        ({"temperature": -0.1}, "temperature=-0.1: input should be greater than or equal to 0"),
        ({"temperature": math.nan}, "temperature"),
        ({"temperature": math.inf}, "temperature"),
        ({"temperature": "hot"}, "temperature='hot'"),
        ({"top_k": -1}, "top_k=-1"),
        ({"top_k": 1.5}, "top_k=1.5"),
        ({"top_p": 0.0}, "top_p=0.0: input should be greater than 0"),
        ({"top_p": 1.1}, "top_p=1.1"),
        ({"top_p": math.nan}, "top_p"),
        ({"min_p": -0.1}, "min_p=-0.1"),
        ({"min_p": 1.1}, "min_p=1.1"),
        ({"min_p": math.nan}, "min_p"),
        ({"repetition_penalty": 0.0}, "repetition_penalty=0.0"),
        ({"repetition_penalty": math.inf}, "repetition_penalty"),
        ({"presence_penalty": math.nan}, "presence_penalty"),
        ({"frequency_penalty": math.inf}, "frequency_penalty"),
        ({"logit_bias": {"a": 1.0}}, "logit_bias"),
        ({"logit_bias": {1: math.nan}}, "logit_bias"),
        ({"logit_bias": {1: math.inf}}, "logit_bias"),
        ({"logits_processors": (3,)}, "logits_processors"),
        ({"seed": -1}, "seed=-1"),
        ({"seed": 2**63}, "seed"),
        ({"n": 0}, "n=0"),
        ({"max_tokens": 0}, "max_tokens=0"),
        ({"min_tokens": -1}, "min_tokens=-1"),
        ({"min_tokens": 5, "max_tokens": 4}, "min_tokens=5 is more than max_tokens=4"),
        ({"stop": ""}, "a stop string can't be empty"),
        ({"stop": ("a", "")}, "a stop string can't be empty"),
        ({"stop": 3}, "stop"),
        ({"stop_token_ids": ("x",)}, "stop_token_ids"),
        ({"logprobs": -1}, "logprobs=-1"),
    ],
)
def test_a_bad_option_raises_and_names_itself(options: dict[str, Any], says: str) -> None:
    with pytest.raises(OptionError) as error:
        SamplingParams(**options)
    assert says in str(error.value)


def test_params_can_not_be_changed_and_default_to_greedy() -> None:
    params = SamplingParams()
    assert params.is_greedy
    assert not params.changes_logits
    with pytest.raises(ValueError, match="frozen"):
        params.temperature = 1.0  # type: ignore[misc]


def test_one_stop_string_may_come_alone() -> None:
    assert SamplingParams(stop="ab").stop == ("ab",)
    assert SamplingParams(stop=["a", "b"]).stop == ("a", "b")


# -- against transformers -------------------------------------------------------------------------------------------

WARPERS: dict[str, Any] = {
    "repetition_penalty": RepetitionPenaltyLogitsProcessor,
    "temperature": TemperatureLogitsWarper,
    "top_k": TopKLogitsWarper,
    "top_p": TopPLogitsWarper,
    "min_p": MinPLogitsWarper,
}


@pytest.mark.parametrize(
    "options",
    [
        {"temperature": 0.7},
        {"top_k": 1},
        {"top_k": 5},
        {"top_k": 1000},
        {"top_p": 0.01},
        {"top_p": 0.6},
        {"top_p": 0.95},
        {"min_p": 0.05},
        {"min_p": 1.0},
        {"repetition_penalty": 1.3},
        {"repetition_penalty": 0.8},
        {"temperature": 1.5, "top_k": 20, "top_p": 0.8},
        {"temperature": 0.6, "top_p": 0.9, "min_p": 0.1},
        {"repetition_penalty": 1.2, "temperature": 0.9, "top_k": 12, "top_p": 0.7, "min_p": 0.02},
    ],
)
@given(seed=numbers)
def test_probabilities_are_those_of_transformers(options: dict[str, Any], seed: int) -> None:
    logits = _logits(seed)
    theirs: list[LogitsProcessor] = [kind(options[name]) for name, kind in WARPERS.items() if name in options]
    ids: Any = torch.tensor([PROMPT + OUTPUT])
    scores = LogitsProcessorList(theirs)(ids, logits[None].clone())[0]
    params = SamplingParams(**{"temperature": 1.0} | options)
    probs = to_probs(process_logits(logits, params, PROMPT, OUTPUT), params)
    expected = scores.double().softmax(-1)
    assert ((probs > 0) == (expected > 0)).all()
    torch.testing.assert_close(probs, expected, rtol=1e-5, atol=1e-9)


@given(numbers, st.floats(-2, 2), st.floats(-2, 2))
def test_presence_and_frequency_penalties_are_subtracted(seed: int, presence: float, frequency: float) -> None:
    logits = _logits(seed)
    params = SamplingParams(temperature=1.0, presence_penalty=presence, frequency_penalty=frequency)
    counts = Counter(OUTPUT)  # the prompt doesn't count
    expected = [
        float(logits[token]) - presence * (token in counts) - frequency * counts[token] for token in range(VOCAB)
    ]
    processed = process_logits(logits, params, PROMPT, OUTPUT)
    torch.testing.assert_close(processed, torch.tensor(expected), rtol=0, atol=1e-5)


def test_bias_is_added_and_may_ban() -> None:
    logits = _logits(0)
    params = SamplingParams(temperature=1.0, logit_bias={2: 5.0, 4: -math.inf})
    changed = process_logits(logits, params, PROMPT, OUTPUT)
    assert changed[2] == logits[2] + 5
    assert to_probs(changed, params)[4] == 0
    assert (changed != logits).sum() == 2
    with pytest.raises(OptionError, match="logit_bias names token 40, but the vocabulary has 40"):
        process_logits(logits, SamplingParams(logit_bias={VOCAB: 1.0}), PROMPT, OUTPUT)


def test_processors_come_after_penalties_and_see_prompt_and_path() -> None:
    seen: list[tuple[list[int], float]] = []

    def spy(path_ids: list[int], logits: torch.Tensor) -> torch.Tensor:
        seen.append((path_ids, float(logits[1])))
        return logits - 1

    params = SamplingParams(logit_bias={1: 2.0}, logits_processors=(spy,))
    logits = _logits(1)
    changed = process_logits(logits, params, PROMPT, OUTPUT)
    assert seen == [(PROMPT + OUTPUT, float(logits[1] + 2))]
    assert changed[0] == logits[0] - 1


def test_the_logits_given_are_left_as_they_are() -> None:
    logits = _logits(2)
    before = logits.clone()
    params = SamplingParams(temperature=0.5, repetition_penalty=2.0, presence_penalty=1.0, logit_bias={1: 3.0})
    to_probs(process_logits(logits, params, PROMPT, OUTPUT, banned=[0]), params)
    assert torch.equal(logits, before)


def test_eos_and_stop_tokens_are_banned_until_min_tokens() -> None:
    seq = make_sequence([0], eos_ids=frozenset({1}), stop_token_ids=(2,), min_tokens=2, temperature=1.0)
    for path, banned in [([], True), ([3], True), ([3, 3], False), ([3, 3, 3], False)]:
        probs = to_probs(seq.processed(_logits(3), path), seq.params)
        assert [float(probs[token]) == 0 for token in (1, 2, 3)] == [banned, banned, False]


@given(numbers)
def test_greedy_is_all_on_the_most_probable_token(seed: int) -> None:
    logits = _logits(seed)
    probs = to_probs(logits, SamplingParams())
    assert probs.tolist() == [float(token == logits.argmax()) for token in range(VOCAB)]


@pytest.mark.parametrize("vocab", [4, 1000, 151_936])
def test_equal_logits_take_the_lowest_id(vocab: int) -> None:
    logits = torch.zeros(vocab)
    logits[2:] = 1.0
    assert greedy(logits) == 2
    assert int(to_probs(logits, SamplingParams()).argmax()) == 2


@pytest.mark.parametrize("temperature", [1e-3, 1e-5, 1e-30, 1e-45, 1e-300])
def test_a_tiny_temperature_is_greedy_in_the_limit(temperature: float) -> None:
    probs = to_probs(_logits(4), SamplingParams(temperature=temperature))
    assert float(probs[_logits(4).argmax()]) == 1


# -- random numbers -------------------------------------------------------------------------------------------------


def test_choose_follows_the_distribution() -> None:
    probs = torch.tensor([0.0, 0.1, 0.2, 0.0, 0.3, 0.4, 0.0], dtype=torch.float64)
    noise, draws = _plain_noise(0), 20_000
    counts = Counter(noise.choose(7 * probs) for _ in range(draws))  # need not be normalised
    assert set(counts) == {1, 2, 4, 5}
    statistic = sum((counts[i] - draws * float(probs[i])) ** 2 / (draws * float(probs[i])) for i in counts)
    assert torch.special.gammaincc(torch.tensor(3 / 2), torch.tensor(statistic / 2)) > 1e-4


def test_accepts_follows_the_probability() -> None:
    noise = _plain_noise(1)
    rate = sum(noise.accepts(0.3) for _ in range(20_000)) / 20_000
    assert abs(rate - 0.3) < 4 * math.sqrt(0.3 * 0.7 / 20_000)
    assert all(noise.accepts(1.0) for _ in range(100))
    assert not any(noise.accepts(0.0) for _ in range(100))


@given(numbers, st.lists(st.sampled_from([0.0, 0.0, 1e-300, 1e-17, 0.1, 1.0]), min_size=1, max_size=8))
def test_choose_never_takes_what_has_no_probability(seed: int, weights: list[float]) -> None:
    if not any(weights):
        weights[seed % len(weights)] = 1.0
    noise = _plain_noise(seed)
    assert all(weights[noise.choose(torch.tensor(weights, dtype=torch.float64))] > 0 for _ in range(20))


@pytest.mark.parametrize("number", [0.0, 0.5, 1 - 2**-53])
def test_choose_is_safe_at_the_ends_of_the_unit_interval(number: float) -> None:
    class Fixed(np.random.Generator):
        def random(self, *_: Any, **__: Any) -> Any:
            return number

    noise = SeededNoise(Fixed(np.random.PCG64(0)))
    for weights in ([0.0, 0.3, 0.0], [0.0, 1.0, 0.0, 0.0], [0.0, 1e-320, 0.0]):
        assert noise.choose(torch.tensor(weights, dtype=torch.float64)) == 1
    assert not noise.accepts(0.0)
    assert noise.accepts(1.0)


def test_noise_depends_on_seed_sample_position_and_purpose_alone() -> None:
    def numbers_of(seed: int, sample: int, position: int, purpose: int) -> tuple[int, ...]:
        noise = seeded_noise(seed, sample)(position, purpose)
        return tuple(noise.choose(torch.ones(1 << 20)) for _ in range(3))

    places = [
        (seed, sample, at, why) for seed in (0, 1, 2**63 - 1) for sample in (0, 1) for at in (0, 1, 9) for why in (0, 1)
    ]
    first = {place: numbers_of(*place) for place in places}
    assert len(set(first.values())) == len(places)
    flat = [number for triple in first.values() for number in triple]
    assert len(set(flat)) > len(flat) - 3  # no stream is a shifted copy of another
    stream = seeded_noise(1, 1)
    for position, purpose in [(9, 1), (0, 0), (9, 1), (1, 0)]:  # in any order, as often as wanted
        noise = stream(position, purpose)
        assert tuple(noise.choose(torch.ones(1 << 20)) for _ in range(3)) == first[1, 1, position, purpose]


@pytest.mark.parametrize("top_p", [0.01, 0.3, 0.9, 0.95, 0.9999])
@pytest.mark.parametrize("form", ["flat", "peaked", "ties", "one", "steps", "banned"])
def test_a_nucleus_has_the_bits_that_sorting_all_tokens_gives(form: str, top_p: float) -> None:
    generator = torch.Generator().manual_seed(7)
    logits = {
        "flat": torch.randn(WIDE, generator=generator) / 100,
        "peaked": 4 * torch.randn(WIDE, generator=generator),
        "ties": torch.randint(0, 6, (WIDE,), generator=generator).float(),
        "one": 50 * torch.nn.functional.one_hot(torch.tensor(5), WIDE).float(),
        "steps": -torch.arange(WIDE).div(100, rounding_mode="floor").float(),
        "banned": torch.randn(WIDE, generator=generator).index_fill(0, torch.arange(5900), -math.inf),
    }[form]
    probs = logits.double().softmax(-1)
    ordered, order = probs.sort(descending=True, stable=True)
    probs[order[ordered.cumsum(-1) - ordered >= top_p]] = 0.0
    assert torch.equal(to_probs(logits, SamplingParams(temperature=1.0, top_p=top_p)), probs / probs.sum())


def test_a_nucleus_of_what_is_no_number_is_refused() -> None:
    with pytest.raises(RequestError):
        to_probs(torch.full((WIDE,), math.nan), SamplingParams(temperature=1.0, top_p=0.9))
