"""`generator` inside transformers' own `generate`: the same ids, and refusals where they couldn't be the same."""

from __future__ import annotations

import copy
import functools
import gc
import inspect
import itertools
import math
import pickle
import threading
import time
import weakref
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    DynamicCache,
    GenerationConfig,
    GenerationMixin,
    LogitsProcessor,
    LogitsProcessorList,
    PreTrainedModel,
    StoppingCriteria,
    StoppingCriteriaList,
    StopStringCriteria,
    T5Config,
    T5ForConditionalGeneration,
    TextStreamer,
)
from transformers.generation import logits_process as known
from transformers.generation.stopping_criteria import EosTokenCriteria, MaxLengthCriteria
from transformers.generation.utils import GenerateDecoderOnlyOutput

from tests.tiny_models import (
    CONTEXT,
    VOCAB,
    full_logits,
    save_model,
    some_tokens,
    tiny,
    tiny_tokenizer,
)
from tokentree import LLM, hf_options
from tokentree.engines import torch as engine_module
from tokentree.engines.kv_engine import KVEngine
from tokentree.engines.support import cache_names
from tokentree.errors import ModelError, OptionError, PromptError, RequestError, TokenTreeError
from tokentree.heads.medusa import MedusaHeads
from tokentree.heads.saved import About, write_heads
from tokentree.hf import WARPERS, TreeGenerator, generator
from tokentree.hf_options import HONOURED, REFUSED, UNUSED, check_config
from tokentree.sampling import SamplingParams, to_probs

NEW = 16
PROMPT = some_tokens(11)
SEVERAL = [some_tokens(9, seed=1), some_tokens(3, seed=2), some_tokens(6, seed=3)]


@functools.cache
def model_of(family: str, seed: int = 0) -> PreTrainedModel:
    """A model whose default end token never gets in the way."""
    model = tiny(family, seed=seed)
    model.generation_config = GenerationConfig(pad_token_id=0, bos_token_id=1)
    return model


@functools.cache
def draft_of(kind: str) -> PreTrainedModel:
    """The target itself, whose drafts are all accepted; a model that is right now and then; one that never is."""
    if kind == "perfect":
        return model_of("llama")
    model = copy.deepcopy(model_of("llama"))
    if kind == "fair":
        noise = torch.Generator().manual_seed(5)
        with torch.no_grad():
            for weight in model.parameters():
                weight.add_(torch.randn(weight.shape, generator=noise) * 0.15 * weight.std())
        return model
    return model_of("llama", seed=9)


@functools.cache
def tree(draft: str = "fair", accept: str = "match", shape: str = "2x2x2") -> TreeGenerator:
    return generator(draft_of(draft), shape=shape, accept=accept, seed=3)


def batch(*prompts: list[int]) -> dict[str, torch.Tensor]:
    """Prompts as a left-padded batch."""
    longest = max(map(len, prompts))
    ids = [[0] * (longest - len(prompt)) + prompt for prompt in prompts]
    mask = [[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts]
    return {"input_ids": torch.tensor(ids), "attention_mask": torch.tensor(mask)}


def run(model: PreTrainedModel, inputs: dict[str, torch.Tensor], **options: Any) -> Any:
    return model.generate(**inputs, **({"max_new_tokens": NEW} | options))  # type: ignore[operator]


def assert_same(
    inputs: dict[str, torch.Tensor],
    model: PreTrainedModel | None = None,
    made: Callable[[], dict[str, Any]] = dict,
    **options: Any,
) -> list[list[int]]:
    """Greedy ids equal those of transformers' own loop; ``made`` gives options that must be fresh for each call."""
    model = model or model_of("llama")
    expected = run(model, inputs, do_sample=False, **options, **made())
    for draft in ("perfect", "fair"):
        ids = run(model, inputs, do_sample=False, custom_generate=tree(draft), **options, **made())
        assert ids.tolist() == expected.tolist()
        assert ids.dtype == expected.dtype
    return [[int(token) for token in row] for row in expected]


@functools.cache
def plain_text() -> list[int]:
    """The new tokens after PROMPT, decoded greedily."""
    return [int(token) for token in run(model_of("llama"), batch(PROMPT))[0, len(PROMPT) :]]


def token_inside_a_path() -> int:
    """A token that first comes up in the middle of the second tree of a perfect draft model."""
    text = plain_text()
    assert text[5] not in text[:5]
    return text[5]


# -- greedy ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_one_prompt(family: str) -> None:
    assert_same(batch(PROMPT), model_of(family))
    assert_same({"input_ids": torch.tensor([PROMPT])}, model_of(family))


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_ragged_batch(family: str) -> None:
    assert_same(batch(*SEVERAL), model_of(family))


def test_a_perfect_draft_saves_forwards() -> None:
    made = tree("perfect")
    run(model_of("llama"), batch(PROMPT), custom_generate=made)
    assert [metrics.target_forwards for metrics in made.metrics] == [NEW // 4]


def test_without_a_draft_model_it_looks_up_the_text() -> None:
    expected = run(model_of("llama"), batch(PROMPT * 3))
    for options in ({}, {"drafter": "ngram", "shape": "chain:3"}, {"drafter": "none"}):
        ids = run(model_of("llama"), batch(PROMPT * 3), custom_generate=generator(**options))  # type: ignore[arg-type]
        assert ids.tolist() == expected.tolist()


def test_a_draft_model_by_name(tmp_path: Path) -> None:
    folder = save_model(tmp_path / "draft", draft_of("fair"))
    made = generator(folder)
    assert run(model_of("llama"), batch(PROMPT), custom_generate=made).tolist() == run(
        model_of("llama"), batch(PROMPT)
    ).tolist()  # fmt: skip
    assert made.metrics[0].drafted_tokens > 0


def test_a_target_from_a_folder_without_a_tokenizer(tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(save_model(tmp_path / "target", model_of("llama")))
    assert run(model, batch(PROMPT), custom_generate=tree()).tolist() == run(model, batch(PROMPT)).tolist()


def test_heads(tmp_path: Path) -> None:
    model = model_of("llama")
    heads = MedusaHeads(3, 1, model.config.hidden_size)
    torch.nn.init.normal_(heads.weight, std=0.2, generator=torch.Generator().manual_seed(0))
    write_heads(tmp_path, heads, "tiny", VOCAB, About(choices=[[0], [1], [0, 0]]))
    inputs, seen = batch(PROMPT), []
    for options in ({"drafter": "medusa", "shape": "2x2x1"}, {"drafter": "medusa", "shape": "choices"}, {}):
        made = generator(heads=tmp_path, **options)  # type: ignore[arg-type]
        assert torch.equal(run(model, inputs, custom_generate=made), run(model, inputs))
        seen.append(made.metrics[0].drafted_tokens)
    assert all(seen)
    with pytest.raises(OptionError, match="heads"):
        generator(shape="choices")


def test_several_draft_models() -> None:
    made = generator([draft_of("fair"), draft_of("poor")], shape="2x2")
    expected = run(model_of("llama"), batch(*SEVERAL))
    assert run(model_of("llama"), batch(*SEVERAL), custom_generate=made).tolist() == expected.tolist()


def test_eos_inside_an_accepted_path() -> None:
    end = token_inside_a_path()
    assert len(assert_same(batch(PROMPT), eos_token_id=end)[0]) == len(PROMPT) + 6
    assert_same(batch(PROMPT), eos_token_id=[end, 2])


def test_rows_that_end_early_are_padded() -> None:
    plain = run(model_of("llama"), batch(*SEVERAL))
    ends = [int(plain[0, 12]), int(plain[1, 15])]
    rows = assert_same(batch(*SEVERAL), eos_token_id=ends)
    assert len({row.index(0, 9) if 0 in row[9:] else len(row) for row in rows}) > 1
    assert_same(batch(*SEVERAL), eos_token_id=ends, pad_token_id=7)


def test_pad_token_id_defaults_to_the_first_eos() -> None:
    model = copy.deepcopy(model_of("llama"))
    model.generation_config = GenerationConfig(bos_token_id=1)
    plain = run(model, batch(*SEVERAL))
    rows = assert_same(batch(*SEVERAL), model, eos_token_id=[int(plain[0, 12]), 2])
    assert rows[0][-1] == int(plain[0, 12])


@pytest.mark.parametrize(
    "options",
    [
        {"max_new_tokens": 1},
        {"max_new_tokens": 2},
        {"max_new_tokens": None, "max_length": 15},
        {"repetition_penalty": 1.7},
        {"repetition_penalty": 0.6, "no_repeat_ngram_size": 1},
        {"no_repeat_ngram_size": 2},
        {"sequence_bias": [[[5], 9.0], [[5, 6], -9.0]]},
        {"sequence_bias": [[[5], 9.0]], "repetition_penalty": 1.7},  # the penalty is not the first of the list
        {"remove_invalid_values": True, "renormalize_logits": True},
        {"forced_eos_token_id": 4},
        {"num_return_sequences": 1, "use_cache": False},
        {"max_time": 1000.0},
    ],
    ids=str,
)
def test_options(options: dict[str, Any]) -> None:
    assert_same(batch(PROMPT, *SEVERAL), **options)


def test_options_about_tokens() -> None:
    text, end = plain_text(), token_inside_a_path()
    options: list[dict[str, Any]] = [
        {"eos_token_id": end, "min_new_tokens": 9},
        {"eos_token_id": end, "min_length": 20},
        {"eos_token_id": end, "exponential_decay_length_penalty": (4, 1.5)},
        {"bad_words_ids": [[text[0]], text[3:5]]},
        {"suppress_tokens": text[:3]},
        {"begin_suppress_tokens": text[:1]},
    ]
    for some in options:
        assert plain_text() != assert_same(batch(PROMPT, *SEVERAL), **some)[0][len(PROMPT) :]


def test_prefix_allowed_tokens_fn_knows_the_row() -> None:
    def allowed(row: int, ids: torch.Tensor) -> list[int]:
        return [3 + row, 10 + int(ids[-1]) % 20, 50 + len(ids)]

    rows = assert_same(batch(*SEVERAL), prefix_allowed_tokens_fn=allowed)
    assert len({tuple(row[9:]) for row in rows}) == 3


class OneOfTwo(LogitsProcessor):
    """A grammar: what follows depends on the whole path."""

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        assert input_ids.shape[0] == scores.shape[0]
        banned = torch.full_like(scores, -math.inf)
        for row, ids in enumerate(input_ids):
            kept = [int(ids.sum()) % VOCAB, int(ids[-1] * 7 + ids[-2]) % VOCAB]
            banned[row, kept] = scores[row, kept]
        return banned


def test_a_logits_processor_of_the_user() -> None:
    for inputs in (batch(PROMPT), batch(*SEVERAL)):
        assert_same(inputs, logits_processor=LogitsProcessorList([OneOfTwo()]))
    # a second processor after it
    assert_same(batch(PROMPT), logits_processor=LogitsProcessorList([OneOfTwo()]), repetition_penalty=1.5)


def test_a_repetition_penalty_that_ignores_the_prompt() -> None:
    penalty = known.RepetitionPenaltyLogitsProcessor(penalty=2.5, prompt_ignore_length=9)
    assert_same(batch(*SEVERAL), logits_processor=LogitsProcessorList([penalty]))


def test_processors_on_a_draft_model_with_a_smaller_vocabulary() -> None:
    small, prompt = tiny("llama", vocab_size=VOCAB - 20), some_tokens(11, vocab=VOCAB - 20)
    options = {"suppress_tokens": list(range(VOCAB - 20, VOCAB)), "bad_words_ids": [[VOCAB - 1], [5, 6]]}
    expected = run(model_of("llama"), batch(prompt), **options)
    ids = run(model_of("llama"), batch(prompt), custom_generate=generator(small, shape="2x2"), **options)
    assert ids.tolist() == expected.tolist()


# -- stopping --------------------------------------------------------------------------------------------------------


class StopsAt(StoppingCriteria):
    """Ends a row at its first ``token``; counts the calls."""

    def __init__(self, token: int) -> None:
        self.token, self.lengths, self.shapes = token, list[int](), set[int]()

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        assert scores is None
        self.lengths.append(input_ids.shape[1])
        self.shapes.add(input_ids.shape[0])
        return input_ids[:, -1] == self.token


def test_a_stopping_criterion_inside_an_accepted_path() -> None:
    ours, theirs = StopsAt(token_inside_a_path()), StopsAt(token_inside_a_path())
    expected = run(model_of("llama"), batch(PROMPT), stopping_criteria=StoppingCriteriaList([theirs]))
    ids = run(
        model_of("llama"),
        batch(PROMPT),
        custom_generate=tree("perfect"),
        stopping_criteria=StoppingCriteriaList([ours]),
    )
    assert ids.tolist() == expected.tolist()
    assert ids.shape[1] == len(PROMPT) + 6
    assert ours.lengths == theirs.lengths == list(range(len(PROMPT) + 1, len(PROMPT) + 7))


def test_a_stopping_criterion_in_a_batch() -> None:
    plain = run(model_of("llama"), batch(*SEVERAL))
    stops = StopsAt(int(plain[1, 13]))
    assert_same(batch(*SEVERAL), stopping_criteria=StoppingCriteriaList([stops]), eos_token_id=2)
    made = tree("perfect")
    stops = StopsAt(int(plain[1, 13]))
    run(model_of("llama"), batch(*SEVERAL), custom_generate=made, stopping_criteria=StoppingCriteriaList([stops]))
    assert stops.shapes == {1}
    assert min(stops.lengths) == 10  # the padding counts, as it does in transformers


def test_criteria_of_the_user_replace_those_of_transformers() -> None:
    def made() -> dict[str, Any]:
        own = [MaxLengthCriteria(len(PROMPT) + 9), EosTokenCriteria(token_inside_a_path())]
        return {"stopping_criteria": StoppingCriteriaList(own), "eos_token_id": 2}

    assert len(assert_same(batch(PROMPT), made=made)[0]) == len(PROMPT) + 6
    # transformers looks only after a token
    short = StoppingCriteriaList([MaxLengthCriteria(3)])
    assert len(assert_same(batch(PROMPT), stopping_criteria=short)[0]) == len(PROMPT) + 1


def test_stop_strings_as_a_criterion() -> None:
    tokenizer = tiny_tokenizer()
    model = tiny("llama", vocab_size=len(tokenizer))
    inputs = dict(tokenizer("The quick brown fox", return_tensors="pt"))
    options = {"eos_token_id": None, "max_new_tokens": NEW, "do_sample": False}
    length = inputs["input_ids"].shape[1]
    new = model.generate(**inputs, **options)[0, length:]  # type: ignore[operator]
    inside = next(text for text in map(str, map(tokenizer.decode, new[5:])) if text.isascii() and text.isprintable())
    expected = model.generate(**inputs, **options, stop_strings=[inside], tokenizer=tokenizer)  # type: ignore[operator]
    assert length + 1 < expected.shape[1] < length + NEW
    stops = StoppingCriteriaList([StopStringCriteria(tokenizer, [inside])])
    ids = model.generate(  # type: ignore[operator]
        **inputs, **options, stopping_criteria=stops, custom_generate=generator(model, shape="chain:4")
    )
    assert ids.tolist() == expected.tolist()


def test_no_time_left_ends_after_one_token() -> None:
    assert len(assert_same(batch(PROMPT), max_time=0.0)[0]) == len(PROMPT) + 1


# -- what comes back -------------------------------------------------------------------------------------------------


def test_return_dict_in_generate() -> None:
    options = {"return_dict_in_generate": True}
    expected = run(model_of("llama"), batch(*SEVERAL), **options)
    out = run(model_of("llama"), batch(*SEVERAL), custom_generate=tree(), **options)
    assert isinstance(out, GenerateDecoderOnlyOutput)
    assert out.sequences.tolist() == expected.sequences.tolist()
    assert [*out] == ["sequences"]


class Recorder:
    def __init__(self) -> None:
        self.got: list[Any] = []

    def put(self, value: torch.Tensor) -> None:
        self.got.append(value.tolist())

    def end(self) -> None:
        self.got.append("end")


def test_a_streamer_gets_what_transformers_would_put() -> None:
    ours, theirs = Recorder(), Recorder()
    run(model_of("llama"), batch(PROMPT), streamer=theirs)
    made = generator(draft_of("perfect"), shape="2x2", streamer=ours)
    for _ in range(2):
        run(model_of("llama"), batch(PROMPT), custom_generate=made)
    assert ours.got == theirs.got * 2
    assert theirs.got[0] == [PROMPT]
    assert theirs.got[-1] == "end"


def test_a_text_streamer_prints(capsys: pytest.CaptureFixture[str]) -> None:
    tokenizer = tiny_tokenizer()
    model = tiny("llama", vocab_size=len(tokenizer))
    inputs = dict(tokenizer("one two", return_tensors="pt"))
    for options in (
        {"streamer": TextStreamer(tokenizer)},
        {"custom_generate": generator(model, streamer=TextStreamer(tokenizer))},
    ):
        model.generate(**inputs, **options, do_sample=False, max_new_tokens=NEW)  # type: ignore[operator]
    lines = capsys.readouterr().out
    assert lines[: len(lines) // 2] == lines[len(lines) // 2 :]
    assert lines.startswith("one two")


def test_what_transformers_drops_when_it_is_given_a_callable() -> None:
    """The reason for `hf._Signature`; if this fails, it may be needless."""
    seen: dict[str, Any] = {}

    def callable_(model: Any, input_ids: torch.Tensor, **options: Any) -> torch.Tensor:
        seen.update(options)
        return input_ids

    streamer = Recorder()
    dropped = {"assistant_model": draft_of("fair"), "streamer": streamer, "synced_gpus": True}
    run(model_of("llama"), batch(PROMPT), custom_generate=callable_, tokenizer="a tokenizer", **dropped)
    assert not seen.keys() & {*dropped, "tokenizer"}
    assert streamer.got == [[PROMPT]]
    with pytest.raises(ValueError, match="could not locate a tokenizer"):
        run(model_of("llama"), batch(PROMPT), custom_generate=callable_, stop_strings=["a"], tokenizer=tiny_tokenizer())


def test_a_streamer_given_to_generate() -> None:
    ours, theirs = Recorder(), Recorder()
    run(model_of("llama"), batch(PROMPT), streamer=theirs)
    made = generator(draft_of("perfect"), shape="2x2")
    for _ in range(2):
        run(model_of("llama"), batch(PROMPT), streamer=ours, custom_generate=made)
    assert ours.got == theirs.got * 2
    with pytest.raises(OptionError, match="each given a streamer"):
        run(model_of("llama"), batch(PROMPT), streamer=ours, custom_generate=generator(streamer=Recorder()))
    with pytest.raises(OptionError, match="a streamer takes one sequence"):
        run(model_of("llama"), batch(*SEVERAL), streamer=ours, custom_generate=made)


@pytest.mark.parametrize("where", ["call", "config", "model"])
def test_stop_strings(where: str) -> None:
    tokenizer = tiny_tokenizer()
    model = tiny("llama", vocab_size=len(tokenizer))
    inputs = dict(tokenizer("The quick brown fox", return_tensors="pt"))
    length = inputs["input_ids"].shape[1]
    new = run(model, inputs, eos_token_id=None)[0, length:]
    inside = next(text for text in map(str, map(tokenizer.decode, new[5:])) if text.isascii() and text.isprintable())
    options: dict[str, Any] = {"tokenizer": tokenizer}
    if where == "call":
        options |= {"stop_strings": [inside], "eos_token_id": None}
    elif where == "config":
        options["generation_config"] = GenerationConfig(stop_strings=inside, max_new_tokens=NEW)
    else:
        model.generation_config = GenerationConfig(stop_strings=[inside])
    expected = run(model, inputs, **options)
    assert length + 1 < expected.shape[1] < length + NEW
    for made in (generator(model, shape="chain:4"), generator(drafter="ngram")):
        assert run(model, inputs, custom_generate=made, **options).tolist() == expected.tolist()
    with pytest.raises(ValueError, match="could not locate a tokenizer"):  # transformers' own
        run(model, inputs, custom_generate=generator(), **(options | {"tokenizer": None}))


# -- sampling --------------------------------------------------------------------------------------------------------

SMALL = 8


@functools.cache
def small(seed: int) -> PreTrainedModel:
    sizes: dict[str, Any] = {"vocab_size": SMALL, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1}
    model = tiny("llama", seed=seed, **sizes, num_attention_heads=2, num_key_value_heads=1)
    model.generation_config = GenerationConfig(pad_token_id=0)
    return model


def exact(options: dict[str, Any]) -> torch.Tensor:
    """float64[8, 8]: the probability of each pair of first tokens after [4]."""
    params = SamplingParams(**({"top_k": 50} | options))
    pairs = torch.zeros(SMALL, SMALL, dtype=torch.float64)
    first = to_probs(full_logits(small(0), [4])[-1], params)
    for token in range(SMALL):
        pairs[token] = first[token] * to_probs(full_logits(small(0), [4, token])[-1], params)
    return pairs


@pytest.mark.parametrize(
    ("accept", "options"),  # a text under match is plain's: other tests compare ids
    [
        pytest.param("match", {"temperature": 2.5, "top_p": 0.8}, id="match, top_p"),
        pytest.param("rejection", {"temperature": 1.7, "top_k": 5}, id="rejection, top_k"),
        pytest.param("rejection", {"temperature": 2.5, "top_p": 0.8}, id="rejection, top_p", marks=pytest.mark.nightly),
        pytest.param("rejection", {"temperature": 2.0, "min_p": 0.1}, id="rejection, min_p"),
    ],
)
def test_sampling_has_the_target_s_distribution(accept: str, options: dict[str, Any]) -> None:
    draws, counts = 400, torch.zeros(SMALL, SMALL, dtype=torch.float64)
    made = generator(small(1), shape="2x2", accept=accept, seed=11)
    ids = run(
        small(0),
        batch([4]),
        custom_generate=made,
        do_sample=True,
        num_return_sequences=draws,
        max_new_tokens=3,
        **options,
    )
    for first, second in ids[:, 1:3].tolist():
        counts[first, second] += 1
    expected = exact(options) * draws
    assert counts[expected == 0].sum() == 0
    rare = expected < 5
    observed = torch.cat([counts[~rare], counts[rare].sum()[None]])
    wanted = torch.cat([expected[~rare], expected[rare].sum()[None]])
    observed, wanted = observed[wanted > 0], wanted[wanted > 0]
    chi_square = float(((observed - wanted) ** 2 / wanted).sum())
    freedom = len(wanted) - 1
    assert freedom > 4
    # Wilson and Hilferty's approximation of the 99.9% quantile
    assert chi_square < freedom * (1 - 2 / (9 * freedom) + 3.09 * math.sqrt(2 / (9 * freedom))) ** 3
    assert sum(metrics.accepted_tokens for metrics in made.metrics) > draws / 4


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"temperature": 0.7, "top_k": 0},
        {"temperature": 0.7, "top_k": 7, "top_p": 0.9, "min_p": 0.05, "repetition_penalty": 1.2},
        {"typical_p": 0.6},  # what only transformers can do is done by its own processors, all of them in its order
        {"temperature": 1.3, "top_k": 9, "epsilon_cutoff": 0.02, "eta_cutoff": 0.02},
        {"top_h": 0.5, "renormalize_logits": True},
    ],
    ids=str,
)
def test_under_match_a_seed_gives_plain_s_text(options: dict[str, Any]) -> None:
    plain = generator(drafter="none", seed=3)
    texts = [
        run(model_of("llama"), batch(*SEVERAL), custom_generate=made, do_sample=True, **options).tolist()
        for made in (plain, tree("fair"), tree("perfect", shape="chain:3"))
    ]
    assert texts[0] == texts[1] == texts[2]
    assert texts[0] != run(model_of("llama"), batch(*SEVERAL)).tolist()


def test_what_the_library_says_itself_is_what_transformers_says() -> None:
    """Temperature, top-k, top-p and min-p of `SamplingParams` against transformers' own, seed by seed."""
    options = {"temperature": 0.8, "top_k": 12, "top_p": 0.85, "min_p": 0.02}
    ours = run(model_of("llama"), batch(PROMPT), custom_generate=tree(), do_sample=True, **options)
    own = [kind(value) for (kind, _), value in zip(WARPERS, options.values(), strict=True)]
    last = known.SuppressTokensLogitsProcessor([])  # suppresses nothing, but behind them they stay as they are
    processors = LogitsProcessorList([*own, last])
    theirs = run(
        model_of("llama"), batch(PROMPT), custom_generate=tree(), do_sample=True, top_k=0, logits_processor=processors
    )
    assert ours.tolist() == theirs.tolist()
    for k in (0, 50):  # behind the user's own, transformers puts a top-k by default
        processors = LogitsProcessorList(own)
        theirs = run(
            model_of("llama"),
            batch(PROMPT),
            custom_generate=tree(),
            do_sample=True,
            top_k=k,
            logits_processor=processors,
        )
        assert ours.tolist() == theirs.tolist()


def test_seeds() -> None:
    def text(seed: int | None) -> list[list[int]]:
        made = generator(draft_of("fair"), shape="2x2", seed=seed)
        ids = run(model_of("llama"), batch(PROMPT), custom_generate=made, do_sample=True, num_return_sequences=3)
        rows: list[list[int]] = ids.tolist()
        return rows

    before = torch.get_rng_state()
    first = text(1)
    assert text(1) == first
    assert text(2) != first
    assert text(None) != text(None)
    assert len(set(map(tuple, first))) == 3  # the samples of one prompt differ
    assert torch.equal(before, torch.get_rng_state())


# -- what it keeps and what it leaves alone --------------------------------------------------------------------------


def test_the_model_is_not_changed() -> None:
    model = tiny("llama")
    weights, config = {k: v.clone() for k, v in model.state_dict().items()}, copy.deepcopy(model.config.to_dict())
    attributes = {name: set(vars(module)) for name, module in model.named_modules()}
    kinds = [type(module) for module in model.modules()]
    attention = model.config._attn_implementation
    expected = run(model, batch(*SEVERAL))
    run(model, batch(*SEVERAL), custom_generate=generator(model))
    assert model.config.to_dict() == config
    assert model.config._attn_implementation == attention
    assert [type(module) for module in model.modules()] == kinds
    assert {name: set(vars(module)) for name, module in model.named_modules()} == attributes
    assert all(torch.equal(value, weights[name]) for name, value in model.state_dict().items())
    assert run(model, batch(*SEVERAL)).tolist() == expected.tolist()


def test_the_engine_is_made_once_per_model(monkeypatch: pytest.MonkeyPatch) -> None:
    made = list[PreTrainedModel]()
    create = engine_module.TorchEngine

    def counted(model: PreTrainedModel, *args: Any, **options: Any) -> KVEngine:
        made.append(model)
        return create(model, *args, **options)

    monkeypatch.setattr(engine_module, "TorchEngine", counted)
    first, second, tree = tiny("llama"), tiny("gpt2"), generator()
    for model, _ in itertools.product((first, second), range(2)):
        run(model, batch(PROMPT), custom_generate=tree)
    assert made == [first, second]
    with torch.no_grad():  # new weights are packed anew
        first.get_output_embeddings().weight.mul_(-1)
    assert run(first, batch(PROMPT), custom_generate=tree).tolist() == run(first, batch(PROMPT)).tolist()
    assert made == [first, second, first]


def test_a_model_is_not_kept_alive() -> None:
    model, made = tiny("llama"), generator()
    run(model, batch(PROMPT), custom_generate=made)
    gone = weakref.ref(model)
    del model
    gc.collect()
    assert gone() is None


# -- what can't be honoured ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options",
    [
        {"num_beams": 2},
        {"num_beams": 2, "num_beam_groups": 2, "diversity_penalty": 0.5},
        {"constraints": ["one"]},
        {"force_words_ids": [[4]]},
        {"penalty_alpha": 0.6, "top_k": 4},
        {"dola_layers": "low"},
        {"prompt_lookup_num_tokens": 3},
        {"assistant_early_exit": 1},
        {"use_mtp": True},
        {"assistant_model": model_of("llama", seed=9)},
        {"synced_gpus": True},
        {"is_assistant": True},
        {"speculation_type": "dflash"},
        {"assistant_ensemble_weight": 0.5},
        {"cache_implementation": "static"},
        {"output_scores": True, "return_dict_in_generate": True},
        {"output_logits": True, "return_dict_in_generate": True},
        {"output_attentions": True, "return_dict_in_generate": True},
        {"output_hidden_states": True, "return_dict_in_generate": True},
        {"guidance_scale": 1.5},
        {"encoder_repetition_penalty": 1.5},
        {"encoder_no_repeat_ngram_size": 2},
        {"position_ids": torch.arange(1, len(PROMPT) + 1)[None]},
        {"token_type_ids": torch.zeros(1, len(PROMPT), dtype=torch.long)},
        {"attention_mask": torch.tensor([[1] * (len(PROMPT) - 1) + [0]])},
        {"attention_mask": torch.tensor([[1, 0] + [1] * (len(PROMPT) - 2)])},
        {"max_new_tokens": CONTEXT},
    ],
    ids=lambda options: next(iter(options)),
)
def test_what_can_t_be_honoured(options: dict[str, Any]) -> None:
    model = model_of("gpt2")  # it takes token_type_ids
    inputs: dict[str, torch.Tensor] = {"input_ids": torch.tensor([PROMPT])}
    with pytest.raises(OptionError) as error:
        run(model, inputs, custom_generate=generator(), **options)
    assert "\n" not in str(error.value)
    name = next(iter(options))
    if name not in ("guidance_scale", "max_new_tokens") and not name.startswith("encoder"):
        assert name in str(error.value)


def test_reasons_are_true_ones() -> None:
    for options, reason in (
        ({"num_beams": 2}, r"SamplingParams\(num_beams=\.\.\.\)"),
        ({"penalty_alpha": 0.6, "top_k": 4}, "hidden states of several candidates.*no longer has it"),
        ({"dola_layers": "low"}, "no longer has it.*dola"),
        ({"assistant_model": draft_of("fair")}, "pass it draft_model="),
    ):
        with pytest.raises(OptionError, match=reason):
            run(model_of("llama"), batch(PROMPT), custom_generate=tree(), **options)


def test_a_prompt_that_transformers_rewrites_is_refused() -> None:
    with pytest.raises(OptionError, match="token_healing=True: it rewrites the prompt"):
        check_config(GenerationConfig(token_healing=True))


def test_every_setting_is_honoured_or_without_effect_or_refused() -> None:
    names = {name for name in vars(GenerationConfig()) if not name.startswith("_")}
    sets = [HONOURED, UNUSED, set(REFUSED)]
    assert names <= set.union(*sets), "a version of transformers has more: say what becomes of it"
    assert not [a & b for a, b in itertools.combinations(sets, 2) if a & b]
    asked = set(inspect.signature(GenerationMixin.generate).parameters) - {"self", "kwargs"}
    known_here = {
        "inputs", "generation_config", "logits_processor", "stopping_criteria", "prefix_allowed_tokens_fn",
        "custom_generate", "streamer",  # honoured
        "synced_gpus", "assistant_model",  # refused
        "negative_prompt_ids", "negative_prompt_attention_mask",  # without guidance_scale, which is refused, no effect
    }  # fmt: skip
    assert asked == known_here


def test_a_setting_that_is_not_known_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hf_options, "UNUSED", UNUSED - {"low_memory"})
    with pytest.raises(OptionError, match="doesn't know low_memory=True"):
        run(model_of("llama"), batch(PROMPT), custom_generate=tree(), low_memory=True)


@pytest.mark.parametrize(
    "options",
    [
        {"output_scores": True},
        {"output_attentions": True},
        {"length_penalty": 2.0, "early_stopping": True},
        {"num_assistant_tokens": 3},
        {"cache_implementation": "dynamic", "prefill_chunk_size": 4},
        {"disable_compile": True},
        {"do_sample": False, "penalty_alpha": 0.0},
        {"negative_prompt_ids": torch.tensor([[5, 6]])},
    ],
    ids=str,
)
def test_what_has_no_effect(options: dict[str, Any]) -> None:
    expected = run(model_of("llama"), batch(PROMPT), **options).tolist()
    assert run(model_of("llama"), batch(PROMPT), custom_generate=tree(), **options).tolist() == expected


def test_threads_share_one_engine(monkeypatch: pytest.MonkeyPatch) -> None:
    count, create = list[int](), engine_module.TorchEngine
    expected = [run(model_of("llama"), batch(prompt)).tolist() for prompt in SEVERAL]
    model = copy.deepcopy(model_of("llama"))

    def counted(*args: Any, **options: Any) -> KVEngine:
        count.append(1)
        time.sleep(0.05)
        return create(*args, **options)

    monkeypatch.setattr(engine_module, "TorchEngine", counted)
    made, ready = generator(drafter="none"), threading.Barrier(3)

    def first() -> LLM:
        ready.wait()
        return made._llm(model)

    with ThreadPoolExecutor(3) as pool:
        asked = [pool.submit(first) for _ in SEVERAL]
        assert len({id(one.result()) for one in asked}) == 1
    assert len(count) == 1
    assert [run(model, batch(prompt), custom_generate=made).tolist() for prompt in SEVERAL] == expected


def test_metrics_are_those_of_the_thread_s_own_call() -> None:
    made = generator(drafter="none")
    run(model_of("llama"), batch(PROMPT), custom_generate=made)
    mine = made.metrics
    with ThreadPoolExecutor(1) as pool:
        theirs = pool.submit(lambda: (run(model_of("llama"), batch(*SEVERAL), custom_generate=made), made.metrics)[1])
        assert len(theirs.result()) == 3
    assert made.metrics is mine


def test_a_cache_of_the_user_is_refused() -> None:
    model = model_of("llama")
    ((name, cache),) = dict.fromkeys(cache_names(model), DynamicCache(config=model.config)).items()
    model(torch.tensor([PROMPT[:4]]), **{name: cache})
    for value in (cache, DynamicCache(config=model.config)):
        with pytest.raises(OptionError, match=f"can't honour {name}: it keeps KV"):
            run(model, batch(PROMPT), custom_generate=tree(), **{name: value})


def test_embeddings_are_refused() -> None:
    model = model_of("llama")
    embedded = model.get_input_embeddings()(torch.tensor([PROMPT])).detach()
    with pytest.raises(OptionError, match="inputs_embeds"):
        run(model, {"inputs_embeds": embedded}, custom_generate=tree())


def test_an_encoder_decoder_is_refused() -> None:
    with torch.random.fork_rng(devices=[]):
        config = T5Config(vocab_size=VOCAB, d_model=16, d_ff=16, num_layers=1, num_heads=2, d_kv=8)
        model = T5ForConditionalGeneration(config)
    with pytest.raises(ModelError, match="decoder-only"):
        run(model, {"input_ids": torch.tensor([PROMPT])}, custom_generate=tree(), decoder_start_token_id=0)


def test_bad_prompts() -> None:
    for ids in ([VOCAB], [-1, 4]):
        with pytest.raises(PromptError, match="vocabulary"):
            run(model_of("llama"), {"input_ids": torch.tensor([ids])}, custom_generate=tree())
    nothing = {"input_ids": torch.tensor([[0, 0], [4, 5]]), "attention_mask": torch.tensor([[0, 0], [1, 1]])}
    with pytest.raises(PromptError, match="empty"):
        run(model_of("llama"), nothing, custom_generate=tree())


def test_a_streamer_takes_one_sequence() -> None:
    made = generator(streamer=Recorder())
    with pytest.raises(OptionError, match="streamer"):
        run(model_of("llama"), batch(*SEVERAL), custom_generate=made)
    with pytest.raises(OptionError, match="streamer"):
        run(model_of("llama"), batch(PROMPT), custom_generate=made, do_sample=True, num_return_sequences=2)


def test_rows_of_different_length_need_padding() -> None:
    model = copy.deepcopy(model_of("llama"))
    model.generation_config = GenerationConfig()
    criteria = StoppingCriteriaList([StopsAt(5)])
    with pytest.raises(OptionError, match="pad_token_id"):
        run(model, {"input_ids": torch.tensor([[5, 6], [7, 8]])}, custom_generate=tree(), stopping_criteria=criteria)


class Counts(LogitsProcessor):
    """Changes its mind after a few calls."""

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        return scores - 5 * (self.calls > 6) * torch.arange(scores.shape[-1])


def test_a_logits_processor_with_a_memory_is_refused() -> None:
    with pytest.raises(OptionError, match="Counts keeps state"):
        run(model_of("llama"), batch(PROMPT), custom_generate=tree(), logits_processor=LogitsProcessorList([Counts()]))


WRONG_SCORES: list[tuple[Callable[..., Any], str]] = [
    (lambda ids, scores: scores[:, :-1], rf"returned \[1, {VOCAB - 1}\]: it must return \[1, {VOCAB}\]$"),
    (lambda ids, scores: torch.cat([scores, scores], 1), rf"returned \[1, {2 * VOCAB}\]"),
    (lambda ids, scores: scores.repeat(2, 1), rf"returned \[2, {VOCAB}\]"),
    (lambda ids, scores: scores[0], rf"returned \[{VOCAB}\]"),
    (lambda ids, scores: scores.numpy(), "returned ndarray: it must return a tensor$"),
    (lambda ids, scores: scores[1], "raised IndexError: index 1 is out of bounds"),
]


@pytest.mark.parametrize(("wrong", "says"), WRONG_SCORES, ids=range(len(WRONG_SCORES)))
def test_what_a_logits_processor_returns_is_one_row_or_refused(wrong: Callable[..., Any], says: str) -> None:
    """Nothing is cut off or taken from a batch, and the one to blame is named, whoever stands behind it."""
    both = LogitsProcessorList([Counts(), wrong, Counts()])
    with pytest.raises(RequestError, match=r"^the logits processor <lambda> " + says):
        run(model_of("llama"), batch(PROMPT), custom_generate=tree(), logits_processor=both)


@pytest.mark.parametrize("way", [copy.deepcopy, lambda made: pickle.loads(pickle.dumps(made))], ids=["copy", "pickle"])
def test_a_generator_may_be_copied(way: Callable[[Any], Any]) -> None:
    used = generator(drafter="ngram", shape="2x2", seed=3)
    options: dict[str, Any] = {"do_sample": True, "temperature": 0.7}
    expected = run(model_of("llama"), batch(PROMPT), custom_generate=used, **options)
    assert torch.equal(run(model_of("llama"), batch(PROMPT), custom_generate=way(used), **options), expected)


@pytest.mark.parametrize(
    "options",
    [
        {"drafter": "oracle"},
        {"drafter": ["ngram", "oracle"]},
        {"shape": "2y2"},
        {"accept": "never"},
        {"seed": -1},
        {"seed": True},
        {"seed": 2**63},
    ],
    ids=str,
)
def test_unknown_names_are_told_at_once(options: dict[str, Any]) -> None:
    with pytest.raises(TokenTreeError):
        generator(**options)
