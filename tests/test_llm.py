"""Text in, text out: what a user of `LLM` may rely on, on a tiny model with a tiny tokenizer."""

from __future__ import annotations

import gc
import json
from collections.abc import Callable
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from tests.gguf_files import write_gguf
from tests.tiny_models import TEXTS, full_logits, kv_engine, save_model, some_tokens, tiny, tiny_pair, tiny_tokenizer
from tokentree import LLM, ModelError, OptionError, PairingError, Piece, PromptError, Result, SamplingParams
from tokentree.drafters.none import NoDrafter
from tokentree.engines.kv_engine import KVEngine
from tokentree.loading import load_model, load_tokenizer
from tokentree.making import short_name

CONTEXT, EOS = 96, 0
PROMPTS = ["The quick brown", "one two three four", "A tree"]


class World:
    """A target and a draft model on disk, with their tokenizer."""

    def __init__(self, folder: Path) -> None:
        self.tokenizer: PreTrainedTokenizerFast = tiny_tokenizer()
        options = {"max_position_embeddings": CONTEXT, "eos_token_id": EOS, "bos_token_id": None, "pad_token_id": None}
        self.vocab = len(self.tokenizer)
        self.model, draft = tiny_pair(self.vocab, self.vocab, **options)
        self.target = save_model(folder / "target", self.model, self.tokenizer)
        self.draft = save_model(folder / "draft", draft, self.tokenizer)
        other = tiny_tokenizer([*TEXTS, "another text another text"], size=310)
        self.other = save_model(folder / "other", tiny("llama", vocab_size=310, num_hidden_layers=1), other)
        self.llm = LLM(self.target, draft_model=self.draft, shape="2x2x1", dtype="float32")
        self.plain = self.llm.plain()


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return World(tmp_path_factory.mktemp("models"))


def same(got: Result, expected: Result) -> None:
    assert got.token_ids == expected.token_ids
    assert got.text == expected.text
    assert got.finish_reason == expected.finish_reason


# -- generate --------------------------------------------------------------------------------------------------------

OPTIONS: list[dict[str, Any]] = [
    {},
    {"temperature": 1.0, "seed": 3},
    {"temperature": 0.8, "top_p": 0.9, "top_k": 30, "min_p": 0.02, "seed": 4},
    {"repetition_penalty": 1.4, "presence_penalty": 0.3, "frequency_penalty": 0.2},
    {"logit_bias": {5: 2.0, 9: -3.0, 7: float("-inf")}},
    {"temperature": 1.0, "seed": 5, "logit_bias": {EOS: 3.0}},
    {"min_tokens": 9, "logit_bias": {EOS: 4.0}},
]


@pytest.mark.parametrize("options", OPTIONS, ids=lambda options: "-".join(options) or "greedy")
def test_generate_gives_plains_text_for_a_batch_of_prompts(world: World, options: dict[str, Any]) -> None:
    params = SamplingParams(max_tokens=30, **options)
    got, expected = world.llm.generate(PROMPTS, params), world.plain.generate(PROMPTS, params)
    assert [result.prompt_token_ids for result in got] == [world.tokenizer(text).input_ids for text in PROMPTS]
    for result, other in zip(got, expected, strict=True):
        same(result, other)
        assert result.text == world.tokenizer.decode(result.token_ids, skip_special_tokens=True)
        assert result.metrics.new_tokens == len(result.token_ids) == other.metrics.target_forwards
    assert sum(result.metrics.target_forwards for result in got) < sum(len(result.token_ids) for result in got)


def test_greedy_text_is_the_argmax_of_transformers_at_every_position(world: World) -> None:
    result = world.llm.generate("The lazy dog", SamplingParams(max_tokens=40))[0]
    text = [*result.prompt_token_ids, *result.token_ids]
    logits = full_logits(world.model, text)[len(result.prompt_token_ids) - 1 : -1]
    assert result.token_ids == logits.argmax(-1).tolist()


def test_a_prompt_may_be_a_text_or_token_ids_one_or_several(world: World) -> None:
    ids = world.tokenizer(PROMPTS[0]).input_ids
    params = SamplingParams(max_tokens=8)
    expected = world.llm.generate(PROMPTS[0], params)
    assert len(expected) == 1
    for prompts in (ids, [ids], [PROMPTS[0]], [PROMPTS[0], ids]):
        for result in world.llm.generate(prompts, params):
            same(result, expected[0])


def test_each_prompt_gets_n_samples_in_a_row_and_a_seed_fixes_them(world: World) -> None:
    params = SamplingParams(max_tokens=12, temperature=1.0, n=3, seed=8)
    first, again = world.llm.generate(PROMPTS, params), world.plain.generate(PROMPTS, params)
    assert [result.prompt_token_ids for result in first] == [
        world.tokenizer(text).input_ids for text in PROMPTS for _ in range(3)
    ]
    for result, other in zip(first, again, strict=True):
        same(result, other)
    assert len({tuple(result.token_ids) for result in first[:3]}) == 3
    single = world.llm.generate(PROMPTS[1], SamplingParams(max_tokens=12, temperature=1.0, seed=8))[0]
    assert single.token_ids == first[3].token_ids


def test_without_a_seed_two_requests_differ(world: World) -> None:
    params = SamplingParams(max_tokens=20, temperature=1.5)
    texts = [tuple(world.llm.generate(PROMPTS[0], params)[0].token_ids) for _ in range(2)]
    assert texts[0] != texts[1]


def test_more_prompts_than_the_batch_holds_are_all_decoded_in_order(world: World) -> None:
    llm = LLM(world.target, draft_model=world.draft, dtype="float32", max_batch=2)
    prompts = [some_tokens(length, seed=length, vocab=world.vocab) for length in (5, 1, 30, 7, 2)]
    params = SamplingParams(max_tokens=10)
    for got, prompt in zip(llm.generate(prompts, params), prompts, strict=True):
        assert got.prompt_token_ids == prompt
        same(got, world.plain.generate([prompt], params)[0])
    assert not kv_engine(llm)._kv


def test_a_progress_bar_changes_nothing(world: World) -> None:
    params = SamplingParams(max_tokens=6)
    same(world.llm.generate(PROMPTS[0], params, progress=True)[0], world.llm.generate(PROMPTS[0], params)[0])
    params = SamplingParams(max_tokens=12, num_beams=3)
    same(world.llm.generate(PROMPTS[0], params, progress=True)[0], world.llm.generate(PROMPTS[0], params)[0])


def test_the_default_type_of_a_cpu_gives_plains_text_too(world: World) -> None:
    llm = LLM(world.target, draft_model=world.draft)
    params = SamplingParams(max_tokens=24)
    for got, expected in zip(llm.generate(PROMPTS, params), llm.plain().generate(PROMPTS, params), strict=True):
        same(got, expected)


def test_a_loaded_model_is_used_as_it_is_and_stays_as_it_was(world: World) -> None:
    before = {key: value.clone() for key, value in world.model.state_dict().items()}
    attention = world.model.config._attn_implementation
    llm = LLM(world.model, tokenizer=world.tokenizer)
    params = SamplingParams(max_tokens=10)
    same(llm.generate(PROMPTS[0], params)[0], world.plain.generate(PROMPTS[0], params)[0])
    assert world.model.config._attn_implementation == attention
    assert all(torch.equal(value, before[key]) for key, value in world.model.state_dict().items())


@pytest.mark.parametrize("drafter", ["none", "ngram", "draft_model", "merged", ["draft_model", "ngram"]])
def test_every_drafter_gives_plains_text(world: World, drafter: str | list[str]) -> None:
    params = SamplingParams(max_tokens=24)
    result = world.llm.using(drafter, "2x2").generate(PROMPTS[1], params)[0]
    same(result, world.plain.generate(PROMPTS[1], params)[0])


# -- where a text ends -----------------------------------------------------------------------------------------------


def test_an_end_token_ends_the_text_unless_told_to_go_on(world: World) -> None:
    bias = {EOS: 100.0}
    assert world.llm.eos_ids == {EOS}
    for llm in (world.llm, world.plain):
        ends = llm.generate(PROMPTS[0], SamplingParams(max_tokens=9, logit_bias=bias))[0]
        assert (ends.token_ids, ends.text, ends.finish_reason) == ([EOS], "", "stop")
        goes_on = llm.generate(PROMPTS[0], SamplingParams(max_tokens=9, logit_bias=bias, ignore_eos=True))[0]
        assert (goes_on.token_ids, goes_on.text, goes_on.finish_reason) == ([EOS] * 9, "", "length")


def test_an_end_token_can_come_only_behind_min_tokens(world: World) -> None:
    for llm in (world.llm, world.plain):
        params = SamplingParams(max_tokens=20, min_tokens=7, logit_bias={EOS: 100.0})
        result = llm.generate(PROMPTS[0], params)[0]
        assert result.token_ids.index(EOS) == 7
        assert (len(result.token_ids), result.finish_reason) == (8, "stop")


def test_a_stop_token_ends_the_text_and_stays_in_it(world: World) -> None:
    free = world.plain.generate(PROMPTS[2], SamplingParams(max_tokens=30))[0].token_ids
    for place in (0, 3, 10, 29):
        params = SamplingParams(max_tokens=30, stop_token_ids=(free[place],))
        for llm in (world.llm, world.plain):
            result = llm.generate(PROMPTS[2], params)[0]
            assert result.token_ids == free[: free.index(free[place]) + 1]
            assert result.finish_reason == "stop"


def test_a_stop_string_cuts_the_text_wherever_it_falls_in_the_tokens(world: World) -> None:
    free = world.plain.generate(PROMPTS[2], SamplingParams(max_tokens=40))[0].text
    for start, length in ((0, 1), (4, 3), (9, 6), (len(free) - 4, 2)):
        stop = free[start : start + length]
        if "\ufffd" in stop:
            continue
        params = SamplingParams(max_tokens=40, stop=(stop, "never there"))
        for llm in (world.llm, world.plain):
            result = llm.generate(PROMPTS[2], params)[0]
            assert result.text == free[: free.index(stop)]
            assert result.finish_reason == "stop"
            assert stop in world.tokenizer.decode(result.token_ids)


def test_max_tokens_and_the_context_end_the_text_by_length(world: World) -> None:
    for llm in (world.llm, world.plain):
        short = llm.generate(PROMPTS[0], SamplingParams(max_tokens=5, ignore_eos=True))[0]
        assert (len(short.token_ids), short.finish_reason) == (5, "length")
        full = llm.generate([some_tokens(80, vocab=world.vocab)], SamplingParams(max_tokens=10**9, ignore_eos=True))[0]
        assert (len(full.token_ids), full.finish_reason) == (CONTEXT - 80, "length")
        last = llm.generate([some_tokens(CONTEXT - 1, vocab=world.vocab)])[0]
        assert len(last.token_ids) == 1


# -- what is reported ------------------------------------------------------------------------------------------------


def test_logprobs_are_plains_and_those_of_transformers(world: World) -> None:
    params = SamplingParams(max_tokens=20, logprobs=4, temperature=1.0, seed=2, top_k=3, repetition_penalty=1.3)
    got, expected = world.llm.generate(PROMPTS[0], params)[0], world.plain.generate(PROMPTS[0], params)[0]
    assert got.logprobs == expected.logprobs
    assert got.logprobs is not None
    assert [entry.token for entry in got.logprobs] == got.token_ids
    text = [*got.prompt_token_ids, *got.token_ids]
    raw = full_logits(world.model, text)[len(got.prompt_token_ids) - 1 : -1].log_softmax(-1)
    for entry, row in zip(got.logprobs, raw, strict=True):
        assert entry.logprob == pytest.approx(float(row[entry.token]), abs=1e-4)
        assert list(entry.top) == row.topk(4).indices.tolist()
        assert list(entry.top.values()) == pytest.approx(row.topk(4).values.tolist(), abs=1e-4)


def test_logprobs_come_only_when_asked_for_and_0_means_that_of_the_token_alone(world: World) -> None:
    assert world.llm.generate(PROMPTS[0], SamplingParams(max_tokens=3))[0].logprobs is None
    entries = world.llm.generate(PROMPTS[0], SamplingParams(max_tokens=3, logprobs=0))[0].logprobs
    assert entries is not None
    assert [entry.top for entry in entries] == [{}, {}, {}]


def test_metrics_add_up(world: World) -> None:
    seen: list[tuple[int, int]] = []
    llm = world.llm.using(shape="2x2x1", watch=lambda seq, draft, step: seen.append((len(draft) - 1, len(step.tokens))))
    metrics = llm.generate(PROMPTS[0], SamplingParams(max_tokens=30, ignore_eos=True))[0].metrics
    assert metrics.new_tokens == sum(new for _, new in seen) == 30
    assert metrics.target_forwards == len(seen)
    assert metrics.drafted_tokens == sum(nodes for nodes, _ in seen)
    assert metrics.accepted_tokens == 30 - len(seen) == sum(metrics.accepted_by_source.values())
    assert list(metrics.accepted_by_source) == ["draft"]  # the folder's name
    assert metrics.mean_accepted_length == 30 / len(seen)
    assert not metrics.lossy


# -- the path of each node as history --------------------------------------------------------------------------------


def naive_greedy(model: PreTrainedModel, prompt: list[int], count: int, change: Callable[..., Any]) -> list[int]:
    text = list(prompt)
    for _ in range(count):
        text.append(int(change(text, full_logits(model, text)[-1].clone()).argmax()))
    return text[len(prompt) :]


def test_a_repetition_penalty_sees_every_token_of_the_nodes_own_path(world: World) -> None:
    def penalise(text: list[int], logits: torch.Tensor) -> torch.Tensor:
        for token in set(text):
            logits[token] = logits[token] * 1.5 if logits[token] < 0 else logits[token] / 1.5
        return logits

    params = SamplingParams(max_tokens=30, repetition_penalty=1.5, ignore_eos=True)
    result = world.llm.generate(PROMPTS[0], params)[0]
    assert result.metrics.accepted_tokens > 0
    assert result.token_ids == naive_greedy(world.model, result.prompt_token_ids, 30, penalise)
    assert result.token_ids != world.plain.generate(PROMPTS[0], SamplingParams(max_tokens=30))[0].token_ids


def test_a_logit_bias_forbids_and_prefers_tokens(world: World) -> None:
    free = world.plain.generate(PROMPTS[0], SamplingParams(max_tokens=20, ignore_eos=True))[0].token_ids
    bias = {token: float("-inf") for token in free} | {17: 3.0}
    result = world.llm.generate(PROMPTS[0], SamplingParams(max_tokens=20, logit_bias=bias, ignore_eos=True))[0]
    assert not set(result.token_ids) & set(free)

    def biased(text: list[int], logits: torch.Tensor) -> torch.Tensor:
        for token, value in bias.items():
            logits[token] += value
        return logits

    assert result.token_ids == naive_greedy(world.model, result.prompt_token_ids, 20, biased)


class Grammar:
    """After a token, only those of the next class, and never the same class twice: which depends on the path."""

    def __init__(self, vocab: int) -> None:
        self.vocab = vocab
        self.calls = 0

    def allowed(self, token: int) -> torch.Tensor:
        return torch.arange(self.vocab) % 5 == (token + 1 + token % 3) % 5

    def __call__(self, path_ids: list[int], logits: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        assert logits.shape == (self.vocab,)
        return logits.masked_fill(~self.allowed(path_ids[-1]), float("-inf"))


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_logits_processor_rules_every_node_by_its_own_path(world: World, temperature: float) -> None:
    grammar, drafted = Grammar(world.vocab), 0

    def watch(seq: Any, draft: Any, accepted: Any) -> None:
        nonlocal drafted
        for node in range(1, len(draft)):
            drafted += 1
            assert grammar.allowed(draft.tokens[draft.parents[node]])[draft.tokens[node]]

    params = SamplingParams(
        max_tokens=30, temperature=temperature, seed=1, logits_processors=(grammar,), ignore_eos=True
    )
    result = world.llm.using(shape="2x2x1", watch=watch).generate(PROMPTS[0], params)[0]
    text = [result.prompt_token_ids[-1], *result.token_ids]
    assert all(grammar.allowed(token)[after] for token, after in pairwise(text))
    assert result.metrics.accepted_tokens > 0
    assert drafted > 30
    same(result, world.plain.generate(PROMPTS[0], params)[0])


# -- stream ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options", [{}, {"stop": "e"}, {"stop": ("xyzzyxyzzy", "o")}, {"logit_bias": {EOS: 4.0}}, {"temperature": 1.3}]
)
def test_the_pieces_of_a_stream_join_to_the_text_and_the_tokens(world: World, options: dict[str, Any]) -> None:
    for seed in range(2):
        params = SamplingParams(max_tokens=40, seed=seed, **{"temperature": 0.9, **options})
        stream = world.llm.stream(PROMPTS[2], params)
        pieces = list(stream)
        result = stream.result
        assert "".join(piece.text for piece in pieces) == result.text
        assert [piece.token_id for piece in pieces if piece.token_id is not None] == result.token_ids
        same(result, world.plain.generate(PROMPTS[2], params)[0])


def test_a_stream_gives_text_out_as_soon_as_it_is_certain_and_tells_drafted_tokens(world: World) -> None:
    stream = world.llm.stream(PROMPTS[1], SamplingParams(max_tokens=30, ignore_eos=True))
    pieces: list[Piece] = []
    for piece in stream:
        pieces.append(piece)
        so_far = stream.result
        given = "".join(piece.text for piece in pieces)
        assert so_far.text.startswith(given)
    metrics = stream.result.metrics
    assert sum(piece.drafted for piece in pieces) == metrics.accepted_tokens > 0
    assert sum(not piece.drafted for piece in pieces if piece.token_id is not None) == metrics.target_forwards
    assert not any(piece.drafted for piece in world.plain.stream(PROMPTS[1], SamplingParams(max_tokens=5)))


def test_a_stream_never_shows_the_start_of_a_stop_string(world: World) -> None:
    free = world.plain.generate(PROMPTS[2], SamplingParams(max_tokens=40))[0].text
    stop = next(free[i : i + 8] for i in range(10, len(free) - 8) if "\ufffd" not in free[i : i + 8])
    stream = world.llm.stream(PROMPTS[2], SamplingParams(max_tokens=40, stop=stop))
    given = ""
    for piece in stream:
        given += piece.text
        assert free[: free.index(stop)].startswith(given)
    assert given == free[: free.index(stop)] == stream.result.text


def test_an_interrupted_stream_keeps_what_there_is_and_forgets_its_kv(world: World) -> None:
    params = SamplingParams(max_tokens=60, ignore_eos=True)
    whole = world.plain.generate(PROMPTS[0], params)[0]
    stream = world.llm.stream(PROMPTS[0], params)
    for count, _ in enumerate(stream):
        if count == 7:
            break
    assert len(kv_engine(world.llm)._kv) == 1
    stream.close()
    assert not kv_engine(world.llm)._kv
    for _, engine in world.llm._parts.draft_engines:
        assert isinstance(engine, KVEngine)
        assert not engine._kv
    result = stream.result
    assert result.finish_reason == "interrupted"
    assert 8 <= len(result.token_ids) < 60
    assert result.token_ids == whole.token_ids[: len(result.token_ids)]
    assert list(stream) == []


def test_a_stream_that_is_dropped_or_never_begun_leaves_no_kv(world: World) -> None:
    stream = world.llm.stream(PROMPTS[0], SamplingParams(max_tokens=60, ignore_eos=True))
    next(iter(stream))
    del stream
    gc.collect()
    unused = world.llm.stream(PROMPTS[0])
    unused.close()
    assert not kv_engine(world.llm)._kv
    assert (unused.result.text, unused.result.finish_reason) == ("", "interrupted")


# -- chat ------------------------------------------------------------------------------------------------------------


def test_chat_follows_the_template(world: World) -> None:
    messages = [{"role": "user", "content": "A tree of tokens"}]
    prompt = world.llm.chat_prompt(messages)
    assert world.tokenizer.decode(prompt) == "<|user|>A tree of tokens<|end|><|assistant|>"
    params = SamplingParams(max_tokens=10)
    same(world.llm.chat(messages, params), world.plain.generate([prompt], params)[0])


def test_chat_without_a_template_is_refused(world: World) -> None:
    bare = tiny_tokenizer()
    bare.chat_template = None
    llm = LLM(world.model, tokenizer=bare)
    with pytest.raises(PromptError, match="no chat template"):
        llm.chat([{"role": "user", "content": "Hello"}])


# -- the other spelling ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("config", "form"),
    [
        ({"mode": "tree", "depth": 3, "branching_factor": 2}, "2x2x2"),
        ({"num_speculative_tokens": 4}, "1x1x1x1"),
        ({"mode": "chain", "num_speculative_tokens": 2}, "1x1"),
        ({"depth": 2}, "2x2"),
    ],
)
def test_speculative_model_and_config_are_another_spelling(world: World, config: dict[str, Any], form: str) -> None:
    llm = LLM(world.target, speculative_model=world.draft, speculative_config=config, dtype="float32")
    assert repr(llm.decoder.shape) == form
    params = SamplingParams(max_tokens=8)
    same(llm.generate(PROMPTS[0], params)[0], world.plain.generate(PROMPTS[0], params)[0])


# -- mistakes --------------------------------------------------------------------------------------------------------


def refused(kind: type[ValueError], reason: str, call: Callable[[], Any]) -> None:
    with pytest.raises(kind, match=reason) as error:
        call()
    message = str(error.value)
    assert isinstance(error.value, ValueError)
    assert "\n" not in message
    assert len(message) < 400


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"drafter": "oracle"}, "unknown drafter 'oracle': choose one of .*ngram"),
        ({"drafter": ["ngram", "oracle"]}, "unknown drafter 'oracle'"),
        ({"drafter": []}, "at least one drafter"),
        ({"shape": "two by two"}, "'two by two' is not a shape: write cost, 2x2x2"),
        ({"shape": "2x0"}, "branching factor must be at least 1"),
        ({"shape": "dynamic:depth=0"}, "depth of at least 1"),
        ({"shape": "dynamic:width=3"}, "'width=3' is not an option"),
        ({"accept": "hope"}, "unknown acceptance rule 'hope'"),
        ({"dtype": "float8"}, "unknown dtype 'float8': choose one of float32"),
        ({"device": "abacus"}, "device 'abacus' can't be used"),
        ({"device": "cuda:99"}, "device 'cuda:99' can't be used"),
        ({"max_batch": 0}, "max_batch must be at least 1"),
        ({"speculative_config": {"depth": 0}}, "whole numbers of at least 1"),
        ({"speculative_config": {"depth": 2.5}}, "whole numbers of at least 1"),
        ({"speculative_config": {"width": 2}}, "unknown speculative_config key 'width'"),
        ({"speculative_config": {"mode": "graph"}}, "speculative_config takes mode"),
        ({"speculative_config": {"depth": 2}, "shape": "2x2"}, "give one of them"),
        ({"speculative_model": "a", "draft_model": "b"}, "give one of them"),
    ],
    ids=str,
)
def test_a_wrong_option_is_refused_in_one_sentence(world: World, options: dict[str, Any], reason: str) -> None:
    refused(OptionError, reason, lambda: LLM(world.target, **options))


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"temperature": -1.0}, "temperature=-1.0"),
        ({"temperature": float("nan")}, "temperature=nan"),
        ({"top_p": 0.0}, "top_p=0.0"),
        ({"max_tokens": 0}, "max_tokens=0"),
        ({"n": 0}, "n=0"),
        ({"seed": -1}, "seed=-1"),
        ({"stop": ""}, "can't be empty"),
        ({"temprature": 1.0}, "temprature=1.0"),
    ],
    ids=str,
)
def test_a_wrong_sampling_option_is_refused_in_one_sentence(options: dict[str, Any], reason: str) -> None:
    refused(OptionError, reason, lambda: SamplingParams(**options))


def test_an_unknown_option_of_the_constructor_raises(world: World) -> None:
    with pytest.raises(TypeError, match="quantum"):
        LLM(world.target, quantum=True)  # type: ignore[call-arg]


@pytest.mark.parametrize("way", ["generate", "stream"])
def test_a_prompt_that_can_not_be_decoded_is_refused(world: World, way: str) -> None:
    run: Callable[..., Any] = getattr(world.llm, way)
    wrapped: Callable[[Any], Any] = (lambda prompt: [prompt]) if way == "generate" else (lambda prompt: prompt)
    refused(PromptError, "the prompt is empty", lambda: run(wrapped("")))
    refused(PromptError, "the prompt is empty", lambda: run(wrapped([])))
    long = some_tokens(CONTEXT, vocab=world.vocab)
    refused(PromptError, f"has {CONTEXT} tokens and the context holds {CONTEXT}", lambda: run(wrapped(long)))
    refused(PromptError, "the context holds", lambda: run(wrapped("tree " * CONTEXT)))
    for token in (-1, world.vocab):
        refused(PromptError, f"outside the vocabulary of {world.vocab}", partial(run, wrapped([5, token])))
    assert not kv_engine(world.llm)._kv


def test_a_bias_on_a_token_that_is_not_there_is_refused_and_leaves_no_kv(world: World) -> None:
    params = SamplingParams(logit_bias={world.vocab: 1.0})
    refused(OptionError, f"logit_bias names token {world.vocab}", lambda: world.llm.generate("A tree", params))
    assert not kv_engine(world.llm)._kv


def test_texts_and_stop_strings_need_a_tokenizer_and_token_ids_do_not(world: World) -> None:
    bare = tiny("llama")
    llm = LLM(bare)
    assert llm.tokenizer is None
    refused(PromptError, "came without a tokenizer", lambda: llm.generate("A tree"))
    refused(PromptError, "stop strings need a tokenizer", lambda: llm.generate([[5]], SamplingParams(stop="x")))
    result = llm.generate([[5, 6]], SamplingParams(max_tokens=4))[0]
    assert (result.text, len(result.token_ids)) == ("", 4)


def test_a_place_without_a_model_is_refused_with_its_name(world: World, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "noise.gguf").write_bytes(b"noise" * 100)
    for name, reason in (
        (tmp_path / "nowhere", "there is no folder '.*nowhere'"),
        ("./nowhere", "there is no folder './nowhere'"),
        (tmp_path / "nothing.gguf", "there is no file '.*nothing.gguf'"),
        (tmp_path / "empty", "the folder '.*empty' has no config.json"),
        (tmp_path / "noise.gguf", "can't load the model '.*noise.gguf'"),
    ):
        refused(ModelError, reason, partial(LLM, name))
        refused(ModelError, reason, partial(LLM, world.target, draft_model=name))


def test_a_damaged_folder_is_refused_with_the_reason(world: World, tmp_path: Path) -> None:
    folders = [save_model(tmp_path / name, tiny("llama"), world.tokenizer) for name in ("cut", "gone", "kind", "size")]
    cut, gone, kind, size = folders
    weights = cut / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    (gone / "model.safetensors").unlink()
    for folder, change in ((kind, {"model_type": "abacus", "architectures": ["AbacusLM"]}), (size, {"vocab_size": 77})):
        config = json.loads((folder / "config.json").read_text()) | change
        (folder / "config.json").write_text(json.dumps(config))
    for folder in folders:
        refused(ModelError, f"can't load the model '.*{folder.name}'", partial(LLM, folder))


def test_a_checkpoint_that_lacks_weights_is_refused_with_their_names(world: World, tmp_path: Path) -> None:
    """Transformers would fill them with random numbers and go on."""
    headless = save_model(tmp_path / "headless", tiny("llama").base_model, world.tokenizer)  # type: ignore[arg-type]
    refused(ModelError, r"can't load the model '.*headless': .*lm_head.weight", lambda: LLM(headless))


def test_a_draft_model_may_have_another_tokenizer(world: World) -> None:
    llm = LLM(world.target, draft_model=world.other, shape="2x2", dtype="float32")
    params = SamplingParams(max_tokens=12)
    for got, expected in zip(llm.generate(PROMPTS, params), llm.plain().generate(PROMPTS, params), strict=True):
        same(got, expected)
        assert got.metrics.drafted_tokens


def test_pairs_that_do_not_fit_are_refused(world: World) -> None:
    refused(PairingError, "needs draft_model=", lambda: LLM(world.target, drafter="draft_model"))
    refused(PairingError, "accept='rejection' needs", lambda: LLM(world.target, accept="rejection"))
    refused(
        PairingError, "accept='rejection' needs", lambda: world.llm.using(["draft_model", "ngram"], accept="rejection")
    )
    assert LLM(world.target, drafter=NoDrafter(), accept="rejection").decoder.drafter.name == "none"


# -- GGUF ------------------------------------------------------------------------------------------------------------


def test_a_gguf_file_of_an_architecture_that_is_not_known_is_refused(world: World, tmp_path: Path) -> None:
    path = tmp_path / "odd.gguf"
    writer = gguf.GGUFWriter(path, "abacus")
    writer.add_context_length(64)
    writer.add_tensor("token_embd.weight", np.zeros((8, 8), np.float32))
    for write in (writer.write_header_to_file, writer.write_kv_data_to_file, writer.write_tensors_to_file):
        write()
    writer.close()
    refused(ModelError, "can't load the model '.*odd.gguf': .*abacus", lambda: LLM(path))


def test_a_gguf_file_decodes_like_the_folder_it_was_made_from(world: World, tmp_path: Path) -> None:
    path = tmp_path / "tiny.gguf"
    write_gguf(path, world.model, world.tokenizer)
    model = load_model(path, "float32", torch.device("cpu"))
    tokens = some_tokens(30, vocab=world.vocab)
    torch.testing.assert_close(full_logits(model, tokens), full_logits(world.model, tokens), rtol=1e-4, atol=1e-4)
    assert load_tokenizer(path).encode(TEXTS[2]) == world.tokenizer.encode(TEXTS[2])
    llm = LLM(path, draft_model=path, dtype="float32", shape="2x2")
    params = SamplingParams(max_tokens=16)
    same(llm.generate(PROMPTS[0], params)[0], world.plain.generate(PROMPTS[0], params)[0])
    few = LLM(path, draft_model=path, shape="2x2", quantization="gguf")
    assert "gguf" in few.engine.info.signature
    same(few.generate(PROMPTS[0], params)[0], few.plain().generate(PROMPTS[0], params)[0])


def test_draft_models_are_called_by_the_end_of_their_name_and_numbered_where_alike() -> None:
    names = list[str]()
    for name in ("org/small-0.5b", "models/small-0.5b", "small.gguf", "x/small-0.5b", ""):
        names.append(short_name(name, names))
    assert names == ["small-0.5b", "small-0.5b #2", "small", "small-0.5b #3", "draft_model"]
