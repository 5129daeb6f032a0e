"""Texts under a grammar: the ids of plain decoding under the same grammar, valid, and no row for what is forbidden."""

from __future__ import annotations

import asyncio
import functools
import json
import re
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from benchmarks.schemas import SCHEMAS, fits
from llguidance import LLTokenizer, TokenizerWrapper
from pydantic import BaseModel

from tests.conftest import all_pairs, decode, make_sequence, shown
from tests.drafters.test_eagle import some_head
from tests.drafters.test_medusa import random_heads
from tests.engines.gpu.test_engine import ONE, engine_of
from tests.heads.block_heads import some_block
from tests.test_lossless import PROMPT, TARGET, VOCAB, Law, decoder_maker, distance, text_law
from tests.tiny_models import save_model, some_tokens, tiny_pair, tiny_tokenizer
from tokentree import LLM, AsyncLLM, OptionError, RequestError, SamplingParams, StructuredOutputs
from tokentree.acceptance import Block, Match, Rejection, Traversal
from tokentree.cli import main as cli
from tokentree.draft import Draft
from tokentree.drafters.base import Drafter
from tokentree.drafters.block import Block as BlockDrafter
from tokentree.drafters.eagle import Eagle
from tokentree.drafters.medusa import Medusa
from tokentree.drafters.pard import Pard
from tokentree.engines.table import TableEngine
from tokentree.grammars import compiler
from tokentree.grammars.compiler import Grammars, _compiled
from tokentree.grammars.guide import Beginning, Guide
from tokentree.grammars.tokens import Spelled, Tokens
from tokentree.llm import Result
from tokentree.sampling import process_logits, to_probs
from tokentree.sequence import Accepted, Sequence
from tokentree.shapes import Shape

EOS = 0
PROMPTS = ["The quick brown", "one two three four", "A tree"]
REGEX = "(one|two|three) (Baum|東京){1,3}[.!]"
DRAFTERS = [
    "ngram", "suffix", "recycling", "draft_model", "merged", ["draft_model", "ngram"], "medusa", "eagle1", "eagle3",
    "block", "dspark", "pard",
]  # fmt: skip
SHAPES = ["cost", "2x2x1", "chain:4", "dynamic:nodes=9", "adaptive:mass=0.9,width=3", "paths:[[0],[1],[0,0]]"]
WAYS: list[dict[str, Any]] = [
    {},
    {"temperature": 1.0, "seed": 3},
    {"temperature": 0.8, "top_p": 0.9, "top_k": 20, "seed": 4},
]


class World:
    """A target and a draft model with their tokenizer, whose vocabulary is smaller than that of the logits."""

    def __init__(self, folder: Path) -> None:
        self.tokenizer = tiny_tokenizer()
        size = len(self.tokenizer) + 20
        model, draft = tiny_pair(size, size, eos_token_id=EOS, bos_token_id=None, pad_token_id=None)
        self.folder = save_model(folder / "target", model, self.tokenizer)
        self.draft = save_model(folder / "draft", draft, self.tokenizer)
        self.llm = LLM(self.folder, draft_model=self.draft, shape="2x2x1", dtype="float32")
        self.plain, self.size = self.llm.plain(), size

    @functools.cache  # noqa: B019
    def plainly(self, name: str, way: int) -> list[Result]:
        """What plain decoding writes under one of `SCHEMAS`."""
        return self.plain.generate(PROMPTS[:2], under(SCHEMAS[name], **WAYS[way]))

    def using(self, drafter: Any, shape: str | None = None) -> LLM:
        """As `LLM.using`, with random heads too."""
        if drafter == "medusa":
            return self.llm.using(Medusa(random_heads(48), self.llm.engine), shape)
        if drafter == "pard":
            [(name, engine)] = self.llm._parts.draft_engines
            return self.llm.using(Pard(engine, self.size, self.size - 1, name=name), shape)
        if drafter in ("block", "dspark"):
            head = some_block("dflash" if drafter == "block" else drafter, vocab_size=self.size)
            return self.llm.using(BlockDrafter(head, self.llm.engine), shape)
        if drafter in ("eagle1", "eagle3"):
            eagle = some_head(int(drafter[-1]), vocab_size=self.size)
            return self.llm.using(Eagle(eagle, self.llm.engine), shape)
        return self.llm.using(drafter, shape)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return World(tmp_path_factory.mktemp("models"))


def under(schema: Any, **options: Any) -> SamplingParams:
    return SamplingParams(**{"max_tokens": 280, "structured_outputs": {"json": schema}} | options)


def ids(llm: LLM, prompts: Any, params: SamplingParams) -> list[list[int]]:
    return [result.token_ids for result in llm.generate(prompts, params)]


# -- plain's ids -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("drafter", "number"), all_pairs(DRAFTERS, range(12)), ids=shown)
def test_every_drafter_gives_plains_ids_and_valid_texts(world: World, drafter: Any, number: int) -> None:
    llm = world.using(drafter, SHAPES[(DRAFTERS.index(drafter) // 6 + number) % 6])
    for name in [*SCHEMAS][number::12]:
        params = under(SCHEMAS[name], **WAYS[number % 3])
        for got, expected in zip(llm.generate(PROMPTS[:2], params), world.plainly(name, number % 3), strict=True):
            assert got.token_ids == expected.token_ids, name
            assert got.finish_reason == expected.finish_reason == "stop"
            assert got.token_ids[-1] == EOS
            assert fits(json.loads(got.text), SCHEMAS[name])
            assert got.metrics.target_forwards <= expected.metrics.target_forwards


@pytest.mark.parametrize(("shape", "way"), all_pairs(SHAPES, range(3)))
def test_every_shape_gives_plains_ids(world: World, shape: str, way: int) -> None:
    params = SamplingParams(max_tokens=60, structured_outputs={"regex": REGEX}, **WAYS[way])
    for result, expected in zip(
        world.llm.using("merged", shape).generate(PROMPTS, params), ids(world.plain, PROMPTS, params), strict=True
    ):
        assert result.token_ids == expected
        assert re.fullmatch(REGEX, result.text)


def test_a_text_goes_on_where_the_mask_of_llguidance_itself_says(world: World) -> None:
    params = under(SCHEMAS["tagged"])
    result = world.llm.generate(PROMPTS[0], params)[0]
    guide, logits = guide_of(world, params), table_of(world, result.prompt_token_ids)
    for place, token in enumerate(result.token_ids):
        bits = guide.allowed(result.token_ids[:place])
        assert bits is not None
        may = np.unpackbits(bits, count=world.size, bitorder="little").astype(bool)
        assert not may[len(world.tokenizer) :].any()
        assert token == int(logits(result.token_ids[:place]).masked_fill(~torch.from_numpy(may), -torch.inf).argmax())


def table_of(world: World, prompt: list[int]) -> Callable[[list[int]], torch.Tensor]:
    """The target's raw logits behind a prompt, by its plain text without a grammar."""

    def logits(path: list[int]) -> torch.Tensor:
        seen = list[torch.Tensor]()

        def keep(_: list[int], row: torch.Tensor) -> torch.Tensor:
            seen.append(row.clone())
            return row

        world.plain.generate([[*prompt, *path]], SamplingParams(max_tokens=1, logits_processors=(keep,)))
        return seen[0]

    return logits


def guide_of(world: World, params: SamplingParams) -> Guide:
    guide = world.llm.sequence("x", params).guide
    assert guide is not None
    return guide


def test_masks_depend_on_the_path_alone(world: World) -> None:
    rng = np.random.default_rng(0)
    for name in ("tagged", "wide", "unicode_keys", "optional"):
        guide, path = guide_of(world, under(SCHEMAS[name])), list[int]()
        for _ in range(120):
            if rng.random() < 0.3:
                guide.forced(path, 8)
            bits, fresh = guide.allowed(path), guide_of(world, under(SCHEMAS[name])).allowed(path)
            assert bits is not None
            assert fresh is not None
            assert (bits == fresh).all()
            tokens = [one for one in np.flatnonzero(np.unpackbits(bits, bitorder="little")).tolist() if one != EOS]
            if path and (not tokens or rng.random() < 0.4):
                del path[-int(rng.integers(1, len(path) + 1)) :]
            else:
                path.append(int(rng.choice(tokens)))


def test_requests_with_and_without_a_grammar_share_a_batch(world: World) -> None:
    params = [under(SCHEMAS["nested"]), SamplingParams(max_tokens=17), under(SCHEMAS["enum"], temperature=1.0, seed=2)]
    together = world.llm.generate(PROMPTS, params)
    alone = [world.plain.generate([prompt], one)[0] for prompt, one in zip(PROMPTS, params, strict=True)]
    assert [result.token_ids for result in together] == [result.token_ids for result in alone]


def test_samples_streams_and_asyncio_give_the_same(world: World) -> None:
    params = under(SCHEMAS["list"], temperature=1.0, seed=5, n=3)
    first, plain = world.llm.generate(PROMPTS[0], params), world.plain.generate(PROMPTS[0], params)
    assert [result.token_ids for result in first] == [result.token_ids for result in plain]
    assert len({result.text for result in first}) > 1
    single = under(SCHEMAS["list"], temperature=1.0, seed=5)
    stream = world.llm.stream(PROMPTS[0], single)
    assert "".join(piece.text for piece in stream) == stream.result.text == first[0].text

    async def ask() -> list[list[int]]:
        async with AsyncLLM(world.llm) as llm:
            return [result.token_ids for result in await llm.generate([PROMPTS[0]], single)]

    assert asyncio.run(ask()) == [first[0].token_ids]


# -- the law of texts ------------------------------------------------------------------------------------------------

LETTERS = ["a", "b", "ab", "<end>"]  # the vocabulary of the tables, the last one an end token


class Letters:
    """What llguidance asks of a tokenizer."""

    eos_token_id, bos_token_id, special_token_ids = VOCAB, None, [3, VOCAB]
    tokens = [letter.encode() for letter in [*LETTERS, "<our end>"]]

    def __call__(self, text: bytes | str) -> list[int]:
        whole = text if isinstance(text, bytes) else text.encode()
        return [LETTERS.index(chr(byte)) for byte in whole]


def letters_guide(regex: str) -> Guide:
    tokens = Tokens(Spelled(LLTokenizer(TokenizerWrapper(Letters())), VOCAB), np.zeros(4, np.uint8), {})
    return Guide(Beginning(_compiled("regex", regex, tokens)), frozenset({3}), VOCAB, tokens.hidden)


def masked_law(regex: str, **options: Any) -> Law:
    """The target's law under a mask that is worked out by hand: a token may come if a text of the regex begins so."""
    words = [word for count in range(5) for word in _words(count) if re.fullmatch(regex, word)]
    params, engine = SamplingParams(**options), TableEngine(TARGET)
    law: Law = {(): 1.0}
    done: Law = {}
    for _ in range(params.max_tokens):
        longer: Law = {}
        for text, prob in law.items():
            written = "".join(LETTERS[token] for token in text)
            may = [any(word.startswith(written + LETTERS[token]) for word in words) for token in range(3)]
            bits = np.packbits([*may, written in words, 0, 0, 0, 0], bitorder="little")
            logits = process_logits(engine.logits_after([*PROMPT, *text]), params, PROMPT, text, allowed=bits)
            for token, share in enumerate(to_probs(logits, params).tolist()):
                if share > 0:
                    (done if token == 3 else longer)[*text, token] = prob * share
        law = longer
    return done | law


def _words(count: int) -> list[str]:
    return [""] if not count else [word + letter for word in _words(count - 1) for letter in "ab"]


DRAWN = [
    *((form, rule) for form in ("2", "2x1", "3") for rule in (Match, Rejection, Traversal)),
    ("2x2", Match),
    ("chain:3", Block),
]


@pytest.mark.parametrize(("way", "regex"), all_pairs(DRAWN, ["(a|b){1,3}", "a(ab|b)?", "ab?a?"]), ids=shown)
def test_the_law_of_texts_is_the_targets_under_the_mask(way: tuple[str, Any], regex: str) -> None:
    (form, rule), params = way, dict[str, Any](max_tokens=3, temperature=0.8)

    def make() -> Any:
        return decoder_maker(form, rule())()

    found = text_law(make, lambda: letters_guide(regex), eos_ids=frozenset({3}), **params)
    assert sum(found.values()) == pytest.approx(1)
    assert distance(found, masked_law(regex, **params)) < 1e-9


# -- drafts ----------------------------------------------------------------------------------------------------------


class Anything(Drafter):
    """Proposes some tokens of the vocabulary at three levels, whatever may come."""

    name = "anything"

    def propose(self, seqs: list[Sequence], shape: Shape, sampled: bool) -> list[Draft]:
        drafts = [Draft(seq.tokens[-1]) for seq in seqs]
        for draft, seq in zip(drafts, seqs, strict=True):
            nodes = [0]
            for level in range(3):
                first = len(seq.tokens) + level
                nodes = [draft.add(node, (first + 5 * i) % 119, -1.0, i) for node in nodes[:6] for i in range(12)]
        return drafts


def watched(world: World, drafter: Any, params: SamplingParams) -> list[tuple[Draft, Accepted, list[bool]]]:
    """Each step of a text: its draft, what was accepted of it, and whether each node may come."""
    steps = list[tuple[Draft, Accepted, list[bool]]]()

    def watch(seq: Sequence, draft: Draft, step: Accepted) -> None:
        judge = guide_of(world, params)
        done = seq.output_ids[: len(seq.output_ids) - len(step.tokens)]
        may = [
            judge.allows([*done, *draft.path_tokens(node)[:-1]], draft.tokens[node]) for node in range(1, len(draft))
        ]
        steps.append((draft, step, may))

    llm = world.llm.using(drafter, "dynamic:nodes=40,depth=6", watch=watch)
    assert ids(llm, PROMPTS[0], params) == ids(world.plain, PROMPTS[0], params)
    return steps


@pytest.mark.parametrize(
    ("drafter", "name"),
    all_pairs(["anything", "merged", "draft_model"], ["tagged", "list", "unicode_keys"], by_day=2),
)
def test_nothing_forbidden_is_verified(world: World, drafter: str, name: str) -> None:
    steps = watched(world, Anything() if drafter == "anything" else drafter, under(SCHEMAS[name]))
    assert all(all(may) for _, _, may in steps)
    assert sum(len(may) for _, _, may in steps) > len(steps)


def test_forced_tokens_come_as_a_chain_though_nobody_proposes_them(world: World) -> None:
    params = under(SCHEMAS["long_keys"])
    plain = world.plain.generate(PROMPTS[0], params)[0]
    assert plain.metrics.target_forwards == len(plain.token_ids)
    assert not plain.metrics.accepted_by_source
    result = world.llm.using("ngram", "chain:8").generate(PROMPTS[0], params)[0]
    assert result.token_ids == plain.token_ids
    assert result.metrics.accepted_by_source["grammar"] > 10
    assert result.metrics.target_forwards < 0.7 * len(plain.token_ids)
    guide, path = guide_of(world, params), list[int]()
    forced = guide.forced(path, 100)
    for token in forced:  # each of them is the only one that may come
        bits = guide.allowed(path)
        assert bits is not None
        assert np.flatnonzero(np.unpackbits(bits, bitorder="little")).tolist() == [token]
        path.append(token)
    assert len(forced) > 3
    assert guide.forced([], 2) == forced[:2]


def test_kernels_on_gpus_give_plains_ids_too() -> None:
    engine, texts = engine_of(**ONE), list[list[list[int]]]()
    for drafter in (None, Anything()):
        guide = letters_guide("a(ab|b){1,9}")
        seq = make_sequence(some_tokens(3), guide=guide, eos_ids=frozenset({3}), max_tokens=4, temperature=1.0)
        texts.append(decode(engine, [seq], drafter, "2x1"))
    assert texts[0] == texts[1]
    assert max(texts[0][0]) <= 3


# -- where texts end -------------------------------------------------------------------------------------------------


def test_an_end_comes_where_the_grammar_may_end_and_nowhere_else(world: World) -> None:
    bias = {EOS: 60.0}
    for llm in (world.llm, world.plain):
        one = llm.generate(PROMPTS[0], SamplingParams(logit_bias=bias, structured_outputs={"regex": "(Baum ){2,9}"}))[0]
        assert (one.text, one.finish_reason) == ("Baum Baum ", "stop")
        least = SamplingParams(logit_bias=bias, structured_outputs={"regex": "(東){1,9}"}, min_tokens=5)
        assert llm.generate(PROMPTS[0], least)[0].metrics.new_tokens == 7  # three a letter
        cut = SamplingParams(max_tokens=3, structured_outputs={"regex": "a{9}"})
        assert llm.generate(PROMPTS[0], cut)[0].finish_reason == "length"


def test_min_tokens_behind_the_end_of_a_grammar_is_an_error_of_the_request(world: World) -> None:
    params = SamplingParams(min_tokens=9, max_tokens=20, structured_outputs={"choice": ["one", "two"]})
    for llm in (world.llm, world.plain):
        with pytest.raises(RequestError, match="leave no token"):
            llm.generate(PROMPTS[0], params)


def test_stop_strings_and_stop_tokens_cut_a_text_short(world: World) -> None:
    params = SamplingParams(structured_outputs={"regex": "one two three four five"}, stop=("thr",))
    for llm in (world.llm, world.plain):
        assert llm.generate(PROMPTS[0], params)[0].text == "one two "
    special = world.tokenizer.convert_tokens_to_ids("<|user|>")
    bias = {special: 50.0}
    params = SamplingParams(structured_outputs={"choice": ["one"]}, stop_token_ids=(special,), logit_bias=bias)
    results = [llm.generate(PROMPTS[0], params)[0] for llm in (world.llm, world.plain)]
    assert [result.token_ids[-1] for result in results] == [special, special]
    assert {result.text for result in results} == {"one"}


def test_a_model_without_end_tokens_stops_where_the_grammar_does(tmp_path: Path) -> None:
    tokenizer = tiny_tokenizer()
    model, _ = tiny_pair(len(tokenizer), len(tokenizer), eos_token_id=None, bos_token_id=None, pad_token_id=None)
    llm = LLM(model, tokenizer=tokenizer, shape="2x2x1")
    assert not llm.eos_ids
    for way in WAYS:
        params = SamplingParams(max_tokens=60, structured_outputs={"regex": REGEX}, **way)
        got, expected = llm.generate(PROMPTS, params), llm.plain().generate(PROMPTS, params)
        assert [result.token_ids for result in got] == [result.token_ids for result in expected]
        assert all(re.fullmatch(REGEX, result.text) and result.finish_reason == "stop" for result in got)


def test_several_end_tokens_may_all_come(world: World) -> None:
    guide = world.llm._grammars.guide(StructuredOutputs(choice=["one"]), frozenset({0, 1, 2, 310}))
    path = guide.forced([], 9)
    bits = guide.allowed(path)
    assert bits is not None
    assert np.flatnonzero(np.unpackbits(bits, bitorder="little")).tolist() == [0, 1, 2, 310]
    assert world.tokenizer.decode(path) == "one"
    assert guide.allowed([*path, 310]) is None


# -- what may be asked -----------------------------------------------------------------------------------------------


class Person(BaseModel):
    name: str
    age: int


@pytest.mark.parametrize(
    "given",
    [
        StructuredOutputs(json=SCHEMAS["flat"]), {"json": json.dumps(SCHEMAS["flat"])}, {"json": Person},
        {"json_object": True}, {"grammar": 'start: "[" /[0-9]{1,3}/ "]"'}, {"json": True},
        {"choice": ["a\"b\\c/", "ü\n東京"]},
    ],
    ids=lambda given: str(given)[:40],
)  # fmt: skip
def test_grammars_of_every_kind(world: World, given: Any) -> None:
    params = SamplingParams(max_tokens=40, structured_outputs=given)
    got, expected = (llm.generate(PROMPTS[0], params)[0] for llm in (world.llm, world.plain))
    assert got.token_ids == expected.token_ids
    if isinstance(given, dict) and "choice" in given:
        assert got.text in given["choice"]
    if isinstance(given, dict) and "grammar" in given:
        assert re.fullmatch(r"\[[0-9]{1,3}\]", got.text)
    assert SamplingParams(**vars(params)).structured_outputs == params.structured_outputs
    assert hash(params.structured_outputs)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({}, "exactly one"),
        ({"json": {}, "regex": "a"}, "json and regex"),
        ({"json_object": False}, "exactly one"),
        ({"json_object": 1}, "neither True nor False"),
        ({"schema": {}}, "has no schema"),
        ("regex", "or a dict"),
        ({"json": "{"}, "no JSON"),
        ({"json": [1]}, "is an object"),
        ({"json": False}, "no value"),
        ({"json": {"minimum": float("nan")}}, "can't be written"),
        ({"json": {"const": object()}}, "can't be written"),
        ({"regex": ""}, "empty"),
        ({"regex": 3}, "is a text"),
        ({"regex": "\ud800"}, "half of a character"),
        ({"grammar": "x" * 200_000}, "is the most"),
        ({"choice": []}, "at least one"),
        ({"choice": "one"}, "at least one"),
        ({"choice": ["a" * 100_000, "b" * 100_000]}, "more than"),
    ],
)
def test_options_that_make_no_sense_are_refused(given: Any, said: str) -> None:
    with pytest.raises(OptionError, match=said):
        SamplingParams(structured_outputs=given)


def test_schemas_without_end_are_refused() -> None:
    deep: Any = {"type": "integer"}
    for _ in range(70):
        deep = {"type": "array", "items": deep}
    ring: dict[str, Any] = {}
    ring["properties"] = {"a": ring, "b": ring}
    for schema in (deep, ring, json.dumps(deep), "[" * 100_000):
        with pytest.raises(OptionError, match=r"levels|no JSON"):
            StructuredOutputs(json=schema)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"json": {"not": {}}}, 'can\'t be compiled: Unimplemented keys: \\["not"\\]'),
        ({"json": {"type": "strin"}}, "Invalid type"),
        ({"json": {"type": "array", "items": False, "minItems": 1}}, "Unsatisfiable"),
        ({"json": {"$ref": "#/$defs/none"}}, "does not exist"),
        ({"json": {"$ref": "http://127.0.0.1:9/schema"}}, "does not fetch"),
        ({"json": {"$ref": "#"}}, "allows no text"),
        ({"json": {"type": "string", "pattern": "(?=a)b"}}, "look-around"),
        ({"regex": "(a"}, "expression can't be compiled: unclosed group"),
        ({"regex": "(a)\\1"}, "backreferences"),
        ({"regex": "(" * 5000 + ")" * 5000}, "can't be compiled"),
        ({"grammar": "start: nothing"}, "unknown name"),
        ({"grammar": "{}"}, "begins with a rule"),
        ({"grammar": "start: " + "(" * 60_000 + '"a"' + ")" * 60_000}, "nested"),
    ],
    ids=lambda one: str(one)[:40],
)
def test_what_cannot_be_compiled_is_refused_in_one_sentence(world: World, given: Any, said: str) -> None:
    with pytest.raises(OptionError, match=said) as raised:
        world.llm.generate(PROMPTS[0], SamplingParams(structured_outputs=given))
    assert "\n" not in str(raised.value)
    assert len(str(raised.value)) < 500


BOMBS = [
    {"regex": "((a{1,1000}){1,1000}){1,1000}"}, {"regex": "(.*)a(.{30})(.*)b(.{30})c.*"}, {"regex": "(a|b)*a(a|b){30}"},
    {"regex": "(?i)[\\p{L}\\w]{1,5000}(foo|bar){1,5000}"},
    {"grammar": "start: A0\n" + "".join(f"A{i}: A{i + 1} A{i + 1}\n" for i in range(60)) + 'A60: "y"'},
    {"grammar": 'start: a{1,1000000}\na: b{1,100000}\nb: "x"'}, {"grammar": 'start: "a" start'},
    {"json": {"allOf": [{"anyOf": [{"properties": {f"a{i}{j}": {}}} for j in range(8)]} for i in range(8)]}},
    {"json": {"type": "array", "minItems": 100_000, "items": {"type": "string", "minLength": 100_000}}},
    {"json": {"enum": [f"value {i}" for i in range(6000)]}}, {"grammar": 'start: a\na: a a | "x" | "y" | " "'},
    {"regex": "(.|\\n)+" * 1000}, {"regex": "\\w{0,1000}" * 1000}, {"regex": "\\w" * 40_000},
    {"json": {"type": "string", "pattern": "^" + "[^x]?" * 1000 + "$"}},
]  # fmt: skip


@pytest.mark.parametrize("given", BOMBS, ids=lambda one: str(one)[:40])
def test_a_grammar_that_explodes_costs_no_more_than_seconds(world: World, given: dict[str, Any]) -> None:
    """It is refused, it ends its request, or it is written like any other."""
    started, params = time.monotonic(), SamplingParams(max_tokens=6, structured_outputs=given)
    ends = list[Any]()
    for llm in (world.llm, world.plain):
        try:
            ends.append(ids(llm, PROMPTS[0], params))
        except (OptionError, RequestError) as error:
            ends.append(type(error))
    assert ends[0] == ends[1]
    assert time.monotonic() - started < 20


def test_it_goes_neither_with_beams_nor_with_ignore_eos_nor_without_a_guide(world: World) -> None:
    for option in ({"num_beams": 2}, {"ignore_eos": True}):
        with pytest.raises(OptionError, match="neither with num_beams nor with ignore_eos"):
            under({}, **option)
    with pytest.raises(OptionError, match="needs a guide"):
        Sequence([1], under({}), lambda *_: None, 10)  # type: ignore[arg-type]
    bare = LLM(engine=TableEngine(TARGET), drafter="ngram")
    with pytest.raises(OptionError, match="needs a tokenizer"):
        bare.generate([[1]], under({}))
    with pytest.raises(OptionError, match="fast tokenizer"):
        Grammars(object()).guide(StructuredOutputs(json={}), frozenset())  # type: ignore[arg-type]


def test_without_llguidance_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "llguidance", None)
    with pytest.raises(OptionError, match=re.escape("tokentree[grammar]")):
        Grammars(object()).guide(StructuredOutputs(regex="a"), frozenset())  # type: ignore[arg-type]


# -- what happens beside ---------------------------------------------------------------------------------------------


def test_a_grammar_is_compiled_once_and_the_oldest_ones_are_dropped(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    count, compiled = Counter[str](), compiler._compiled

    def counted(kind: str, text: str, tokens: Any) -> Any:
        count[text] += 1
        return compiled(kind, text, tokens)

    monkeypatch.setattr(compiler, "_compiled", counted)
    monkeypatch.setattr(compiler, "KEPT", 2)
    grammars = Grammars(world.tokenizer)
    for regex in ("a", "b", "a", "a", "c", "a", "b"):
        grammars.guide(StructuredOutputs(regex=regex), frozenset({0}))
    assert count == {"a": 1, "b": 2, "c": 1}


def test_kept_grammars_have_a_limit_together(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiler, "KEPT_CHARS", 100)
    grammars, words = Grammars(world.tokenizer), ["a" * 40, "b" * 40, "c" * 40, "d" * 200, "e"]
    for place, regex in enumerate(words):
        grammars.guide(StructuredOutputs(regex=regex), frozenset({0})).allowed([])
        kept = [text for _, text in grammars._kept]
        assert kept[-1] == regex  # however large
        assert len(kept) == [1, 2, 2, 1, 1][place]


@pytest.mark.parametrize(
    "given",
    [
        {"regex": "\\w?" * 8000},
        {"regex": "a{1,2}" * 1001},
        {"json": {"properties": {f"p{i}": {"pattern": "a+" * 11} for i in range(100)}}},
        {"json": {"patternProperties": {"a?" * 1001: {}}}},
        {"json": {"items": [{"anyOf": [{"pattern": "[^x]?" * 8000}]}]}},
        {"grammar": "start: A\nA: " + '"a"? ' * 8000},
    ],
    ids=lambda one: str(one)[:40],
)
def test_too_many_quantifiers_are_refused_at_once(given: Any) -> None:
    started = time.monotonic()
    with pytest.raises(OptionError, match=r"has \d+ quantifiers, and 1000 is the most"):
        StructuredOutputs(**given)
    assert time.monotonic() - started < 1


def test_a_question_in_a_schema_is_no_quantifier() -> None:
    StructuredOutputs(json={"enum": [f"why {i}?" for i in range(2000)], "description": "*" * 5000})


def test_threads_share_a_compiled_grammar(world: World) -> None:
    params = [under(SCHEMAS["tagged"], temperature=1.0, seed=seed) for seed in range(4)]
    expected = [ids(world.plain, PROMPTS[0], one) for one in params]
    got: list[Any] = [None] * len(params)

    def ask(number: int) -> None:
        got[number] = ids(world.llm, PROMPTS[0], params[number])

    threads = [threading.Thread(target=ask, args=(number,)) for number in range(len(params))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert got == expected


def test_a_request_that_is_set_back_goes_on_where_it_was(world: World) -> None:
    params = under(SCHEMAS["nested"], temperature=1.0, seed=8)
    expected = ids(world.plain, PROMPTS, params)
    scheduler = world.llm.scheduler()
    seqs, step = [world.llm.sequence(prompt, params) for prompt in PROMPTS], 0
    for seq in seqs:
        scheduler.add(seq)
    while not scheduler.idle:
        scheduler.step()
        step += 1
        if step % 3 == 0 and len(scheduler._active) > 1:
            scheduler._set_back(scheduler._active[-1])
    assert [seq.output_ids for seq in seqs] == expected


def test_a_matcher_that_fails_ends_its_request_alone(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    params = [under(SCHEMAS["nested"]), under(SCHEMAS["flat"])]
    expected = [ids(world.plain, PROMPTS[0], one)[0] for one in params]
    computed = Guide._computed

    def fails(guide: Guide, path: Any) -> Any:
        if guide is bad and len(guide._text) + len(path) >= 4:
            raise RequestError("the matcher is broken")
        return computed(guide, path)

    seqs = [world.llm.sequence(PROMPTS[0], one) for one in params]
    bad = seqs[0].guide
    monkeypatch.setattr(Guide, "_computed", fails)
    for _ in world.llm.decoder.run(seqs):
        pass
    assert (seqs[0].finish_reason, seqs[0].output_ids) == ("error", expected[0][:4])
    assert isinstance(seqs[0].error, RequestError)
    assert seqs[1].output_ids == expected[1]


def test_a_guide_whose_matcher_failed_begins_anew(world: World) -> None:
    guide = guide_of(world, under(SCHEMAS["enums"]))
    path = guide.forced([], 5)
    bits, more = guide.allowed(path), [token for token in range(1, 300) if guide.allows(path, token)][:1]
    assert more
    with pytest.raises(RequestError, match="doesn't go on"):
        guide.allowed([*path, *more, 299])  # a part of it is read before that is known
    guide._known.clear()
    again = guide.allowed(path)
    assert bits is not None
    assert again is not None
    assert (bits == again).all()


def test_lossy_rules_stay_within_the_grammar(world: World) -> None:
    for accept in ("typical", "best_path"):
        for way in WAYS:
            result = world.llm.using(accept=accept).generate(PROMPTS[0], under(SCHEMAS["tagged"], **way))[0]
            assert fits(json.loads(result.text), SCHEMAS["tagged"]), accept


def test_the_command_writes_under_a_schema(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def run(*options: object) -> Any:
        words = ["generate", PROMPTS[0], "--model", world.folder, "--no-chat", "--json", "--compare", *options]
        monkeypatch.setattr(sys, "argv", ["tokentree", *map(str, words)])
        with pytest.raises(SystemExit) as stopped:
            cli.main()
        said = capsys.readouterr()
        return json.loads(said.out) if not stopped.value.code else said.err

    file = tmp_path / "schema.json"
    file.write_text(json.dumps(SCHEMAS["enums"]))
    found = run("--json-schema", file)
    assert found["identical"]
    assert fits(json.loads(found["text"]), SCHEMAS["enums"])
    assert re.fullmatch("[0-9]{3}", run("--regex", "[0-9]{3}")["text"])
    assert run("--choice", "yes", "--choice", "no")["text"] in ("yes", "no")
    file.write_text('start: "x" | "y"')
    assert run("--grammar", file)["text"] in ("x", "y")
    assert "exactly one" in " ".join(run("--grammar", file, "--regex", "a").split())
    assert "no JSON" in " ".join(run("--json-schema", file).split())
