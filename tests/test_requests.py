"""What can be wrong with one request: told before it decodes, or ending that one alone."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch

from tests.conftest import decode, make_sequence, random_table
from tests.tiny_models import kv_engine, tiny, tiny_pair, tiny_tokenizer
from tokentree import LLM, OptionError, PromptError, RequestError, SamplingParams, TokenTreeError
from tokentree.drafters.draft_model import DraftModel
from tokentree.drafters.lookup.ngram import NGram
from tokentree.engines.table import TableEngine
from tokentree.errors import DeadEnd
from tokentree.sampling import check_vocabulary
from tokentree.sequence import Sequence

Processor = Callable[[list[int], torch.Tensor], Any]
VOCAB = 8


def nan(ids: list[int], logits: torch.Tensor) -> Any:
    return logits.index_fill(0, torch.tensor([3]), math.nan)


def minus_nan(ids: list[int], logits: torch.Tensor) -> Any:
    return logits.index_fill(0, torch.tensor([3]), -math.nan)


def infinite(ids: list[int], logits: torch.Tensor) -> Any:
    return logits.index_fill(0, torch.tensor([3]), math.inf)


def nothing(ids: list[int], logits: torch.Tensor) -> Any:
    return torch.full_like(logits, -math.inf)


def short(ids: list[int], logits: torch.Tensor) -> Any:
    return logits[:-1]


def row(ids: list[int], logits: torch.Tensor) -> Any:
    return logits[None]


def integers(ids: list[int], logits: torch.Tensor) -> Any:
    return logits.long()


def elsewhere(ids: list[int], logits: torch.Tensor) -> Any:
    return logits.to("meta")


def none(ids: list[int], logits: torch.Tensor) -> Any:
    logits[0] = 0.0


def array(ids: list[int], logits: torch.Tensor) -> Any:
    return logits.numpy()


def raising(ids: list[int], logits: torch.Tensor) -> Any:
    raise KeyError("no such rule")


WRONG = [nan, minus_nan, infinite, nothing, short, row, integers, elsewhere, none, array, raising]


def after(count: int, processor: Processor) -> Processor:
    """``processor`` once a text has so many ids, and before that none."""

    def change(ids: list[int], logits: torch.Tensor) -> Any:
        return logits if len(ids) < count else processor(ids, logits)

    return change


def some(*processors: Processor, temperature: float = 0.0, **options: Any) -> Sequence:
    return make_sequence([1, 2, 1], logits_processors=processors, temperature=temperature, seed=3, **options)


# -- rules that fail -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("wrong", WRONG, ids=lambda wrong: wrong.__name__)
@pytest.mark.parametrize("way", ["plain", "chain", "tree", "rejection", "lookup"])
def test_a_processor_that_fails_ends_its_request_alone_with_what_came_before(
    way: str, wrong: Processor, temperature: float
) -> None:
    table = random_table(VOCAB, 1, 0, 2.0)
    draft = table if way in ("chain", "tree") else random_table(VOCAB, 1, 1, 1.0)  # all is accepted, or little

    def run(way: str) -> tuple[Sequence, Sequence]:
        bad = some(after(7, wrong), max_tokens=12, temperature=temperature)
        good = some(after(7, lambda ids, logits: logits), max_tokens=12, temperature=temperature)
        engine = TableEngine(table)
        drafter = {"plain": None, "lookup": NGram()}.get(way, DraftModel(TableEngine(draft), VOCAB))
        shape = {"chain": "chain:4", "tree": "2x2x2"}.get(way, "2x2")
        decode(engine, [bad, good], drafter, shape, "rejection" if way == "rejection" else "match")
        assert not engine._committed
        return bad, good

    (bad, good), (plain_bad, plain_good) = run(way), run("plain")
    assert (bad.finish_reason, good.finish_reason) == ("error", "length")
    assert isinstance(bad.error, RequestError)
    assert good.error is None
    assert len(bad.output_ids) == 4
    assert len(good.output_ids) == 12
    if way != "rejection" or temperature == 0:  # its text with a tree is drawn otherwise
        assert bad.output_ids == plain_bad.output_ids
        assert good.output_ids == plain_good.output_ids
    assert bad.metrics.accepted_tokens >= 0
    assert sum(new for _, new, _ in bad.metrics.steps) == 4
    if way in ("chain", "tree"):
        assert bad.metrics.accepted_tokens > 0


def test_the_error_names_the_processor_and_what_it_did() -> None:
    says = {
        nan: "hold nan", infinite: "hold inf", nothing: "leave no token", raising: "raising raised KeyError",
        none: "none returned NoneType", short: r"returned float32\[7\]", integers: r"returned int64\[8\]",
        elsewhere: "on meta", array: "array returned ndarray",
    }  # fmt: skip
    for wrong, reason in says.items():
        seq = some(wrong)
        decode(TableEngine(random_table(VOCAB, 1)), [seq])
        with pytest.raises(RequestError, match=reason):
            raise seq.error or AssertionError
    assert seq.output_ids == []
    raised = some(raising)
    decode(TableEngine(random_table(VOCAB, 1)), [raised])
    assert isinstance((raised.error or ValueError()).__cause__, KeyError)


@pytest.mark.parametrize("rule", ["best_path", "typical"])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_lossy_rules_end_a_request_that_fails_alone_too(rule: str, temperature: float) -> None:
    table = random_table(VOCAB, 1, 0, 2.0)
    bad, good = some(after(8, nothing), temperature=temperature), some(temperature=temperature, max_tokens=9)
    decode(TableEngine(table), [bad, good], DraftModel(TableEngine(table), VOCAB), "2x2", rule)
    assert (bad.finish_reason, good.finish_reason) == ("error", "length")
    assert isinstance(bad.error, DeadEnd)


def test_what_fails_behind_the_end_of_a_text_is_of_no_account() -> None:
    """A walk goes on behind a token that ends the text; plain decoding never asks there."""
    table = torch.full((4, 4), -5.0)
    table[0, 1] = table[1, 2] = table[2, 3] = table[3, 0] = 5.0  # 0, 1, 2, 3, 0, …

    def careful(ids: list[int], logits: torch.Tensor) -> torch.Tensor:
        assert ids[-1] != 3, "asked behind the end"
        return logits

    for form in ("chain:1", "chain:4", "2x2x2"):
        seq = make_sequence([0], eos_ids=frozenset({3}), logits_processors=(careful,))
        decode(TableEngine(table), [seq], DraftModel(TableEngine(table), 4), form)
        assert (seq.output_ids, seq.finish_reason, seq.error) == ([1, 2, 3], "stop", None)


def test_bans_that_leave_nothing_are_a_dead_end() -> None:
    options: list[dict[str, Any]] = [
        {"logit_bias": dict.fromkeys(range(VOCAB), -math.inf)},
        {"logit_bias": dict.fromkeys(range(1, VOCAB), -math.inf), "stop_token_ids": [0], "min_tokens": 2},
        {"stop_token_ids": list(range(VOCAB)), "min_tokens": 1},
    ]
    for option in options:
        for temperature in (0.0, 1.0):
            seq = make_sequence([1], temperature=temperature, **option)
            decode(TableEngine(random_table(VOCAB, 1)), [seq], DraftModel(TableEngine(random_table(VOCAB, 1)), VOCAB))
            assert isinstance(seq.error, DeadEnd)


@pytest.mark.parametrize("value", [math.nan, -math.nan, math.inf])
@pytest.mark.parametrize("temperature", [0.0, 0.7])
def test_a_model_whose_logits_are_no_numbers_is_told_of(value: float, temperature: float) -> None:
    table = random_table(VOCAB, 1)
    table[5] = value
    if value == math.inf and temperature == 0:
        return  # they are equal, and the first is taken
    bad = make_sequence([5], temperature=temperature, seed=0)
    good = make_sequence([1], temperature=temperature, seed=0, max_tokens=4, logit_bias={5: -math.inf})
    decode(TableEngine(table), [bad, good])
    assert isinstance(bad.error, RequestError)
    assert "not finite numbers" in str(bad.error)
    assert good.finish_reason == "length"


def test_processors_in_other_types_of_float_are_followed() -> None:
    plain = some(max_tokens=9)
    doubled = some(lambda ids, logits: logits.double(), max_tokens=9)
    decode(TableEngine(random_table(VOCAB, 2)), [plain, doubled])
    assert plain.output_ids == doubled.output_ids
    assert doubled.error is None


# -- through LLM -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def llm() -> LLM:
    tokenizer = tiny_tokenizer()
    options = {"eos_token_id": 0, "bos_token_id": None, "pad_token_id": None}
    model, draft = tiny_pair(len(tokenizer), len(tokenizer), **options)
    return LLM(model, draft_model=draft, shape="2x2x1", tokenizer=tokenizer)


def kept(llm: LLM) -> int:
    engines: list[Any] = [llm.engine, *(engine for _, engine in llm._parts.draft_engines)]
    return sum(len(engine._kv) for engine in engines)


IDS = [20, 21, 22]
FAILS = SamplingParams(max_tokens=12, logits_processors=[after(6, nothing)], ignore_eos=True)
WORKS = SamplingParams(max_tokens=12, ignore_eos=True)


def test_one_request_that_fails_raises_and_leaves_no_kv(llm: LLM) -> None:
    for way in (llm, llm.plain()):
        with pytest.raises(DeadEnd):
            way.generate(IDS, FAILS)
        with pytest.raises(DeadEnd):
            way.generate([IDS, IDS], FAILS)  # all of them
        with pytest.raises(DeadEnd):
            way.chat([{"role": "user", "content": "A tree of tokens and more"}], FAILS)
        assert not kept(way)


def test_of_several_requests_the_others_are_as_alone(llm: LLM) -> None:
    alone = llm.generate(IDS, WORKS)[0]
    good, bad, last = llm.generate([IDS] * 3, [WORKS, FAILS, WORKS])
    assert good.token_ids == last.token_ids == alone.token_ids
    assert (good.error, good.finish_reason) == (None, "length")
    assert bad.finish_reason == "error"
    assert isinstance(bad.error, DeadEnd)
    assert bad.token_ids == alone.token_ids[:3]
    assert bad.text == llm.tokenizer.decode(bad.token_ids, skip_special_tokens=True)  # type: ignore[union-attr]
    assert not kept(llm)


def test_a_stream_gives_what_there_is_and_then_raises(llm: LLM) -> None:
    stream, seen = llm.stream(IDS, FAILS), []
    with pytest.raises(DeadEnd):
        seen += [piece.token_id for piece in stream]
    result = stream.result
    assert (result.finish_reason, len(result.token_ids)) == ("error", 3)
    assert isinstance(result.error, DeadEnd)
    stream = llm.stream(IDS, FAILS)
    pieces = []
    try:
        for piece in stream:
            pieces.append(piece.token_id)
    except RequestError:
        pass
    assert [token for token in pieces if token is not None] == result.token_ids
    assert not kept(llm)


@pytest.mark.parametrize("wrong", [nan, nothing, short, raising], ids=lambda wrong: wrong.__name__)
def test_beam_search_ends_with_a_typed_error_too(llm: LLM, wrong: Processor) -> None:
    fails = SamplingParams(
        max_tokens=9, num_beams=3, num_return_sequences=2, logits_processors=[after(6, wrong)], ignore_eos=True
    )
    works = SamplingParams(max_tokens=9, num_beams=3, num_return_sequences=2, ignore_eos=True)
    with pytest.raises(RequestError):
        llm.generate(IDS, fails)
    results = llm.generate([IDS] * 3, [works, fails, WORKS])
    assert [result.finish_reason for result in results] == ["length", "length", "error", "error", "length"]
    alone = llm.generate(IDS, works)
    assert [result.token_ids for result in results[:2]] == [result.token_ids for result in alone]
    assert results[4].token_ids == llm.generate(IDS, WORKS)[0].token_ids
    assert not kept(llm)
    assert not kv_engine(llm)._branches


def test_beams_that_end_dead_leave_the_others_alone(llm: LLM) -> None:
    """Of a first token that is odd, nothing can follow: the beams that go on are those of an even one."""

    def dead(ids: list[int], scores: torch.Tensor) -> torch.Tensor:
        return torch.full_like(scores, -math.inf) if len(ids) == 4 and ids[-1] % 2 else scores

    params = SamplingParams(max_tokens=5, num_beams=4, logits_processors=[dead], ignore_eos=True)
    result = llm.generate(IDS, params)[0]
    assert result.error is None
    assert len(result.token_ids) == 5
    assert result.token_ids[0] % 2 == 0


def test_beams_that_are_not_there_are_errors_and_no_empty_texts(llm: LLM) -> None:
    bias = {token: -math.inf for token in range(llm.engine.vocab_size) if token not in (30, 31)}
    params = SamplingParams(max_tokens=1, num_beams=4, num_return_sequences=4, logit_bias=bias)
    results = llm.generate(IDS, params)
    assert sorted(result.token_ids for result in results[:2]) == [[30], [31]]
    assert [result.finish_reason for result in results] == ["length", "length", "error", "error"]


# -- before anything decodes -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options",
    [
        {"logit_bias": {10**6: 1.0}},
        {"logit_bias": {10**30: 1.0}},
        {"stop_token_ids": [10**9]},
        {"stop_token_ids": [10**9], "min_tokens": 4},
        {"stop_token_ids": [3, 10**30]},
    ],
    ids=str,
)
@pytest.mark.parametrize("beams", [1, 2])
def test_tokens_that_are_not_there_are_told_of_before_anything_decodes(
    llm: LLM, options: dict[str, Any], beams: int
) -> None:
    params, forwards = SamplingParams(max_tokens=5, num_beams=beams, **options), []
    watched = llm.using(watch=lambda *_: forwards.append(1))
    for prompts, given in (([IDS], params), ([IDS, IDS, IDS], params), ([IDS, IDS], [params, params])):
        with pytest.raises(OptionError, match=f"names token .*but the vocabulary has {llm.engine.vocab_size}"):
            watched.generate(prompts, given)
    if beams == 1:
        with pytest.raises(OptionError, match="names token"):
            watched.stream(IDS, params)
    assert not forwards
    assert not kept(llm)


def test_beams_that_can_not_be_ranked_are_told_of() -> None:
    for count, vocab, most in ((1024, 65536, None), (1024, 65537, 1023), (442, 152_064, 441)):
        params = SamplingParams(num_beams=count)
        if most is None:
            check_vocabulary(params, vocab)
            continue
        with pytest.raises(OptionError, match=f"with {vocab} tokens {most} is the most"):
            check_vocabulary(params, vocab)
    check_vocabulary(SamplingParams(), 1 << 30)
    with pytest.raises(OptionError, match="num_beams=1025: input should be less than or equal to 1024"):
        SamplingParams(num_beams=1025)


WRONG_OPTIONS: list[tuple[dict[str, Any], str]] = [
    ({"logit_bias": {10**6: 1.0}}, "logit_bias names token 1000000"),
    ({"stop_token_ids": [10**9]}, "stop_token_ids names token"),
    ({"stop_token_ids": [10**9], "n": 3, "temperature": 1.0}, "stop_token_ids names token"),
    ({"stop_token_ids": [10**9], "num_beams": 3, "num_return_sequences": 2}, "stop_token_ids names token"),
    ({"logit_bias": {10**6: 1.0}, "logprobs": 2}, "logit_bias names token 1000000"),
]


@pytest.mark.parametrize(("options", "says"), WRONG_OPTIONS, ids=str)
def test_wrong_options_of_one_request_end_that_one_alone(llm: LLM, options: dict[str, Any], says: str) -> None:
    alone = llm.generate(IDS, WORKS)[0]
    results = llm.generate([IDS] * 3, [WORKS, SamplingParams(max_tokens=5, **options), WORKS])
    assert len(results) == 2 + options.get("n", options.get("num_return_sequences", 1))
    good, *bad, last = results
    assert good.token_ids == last.token_ids == alone.token_ids
    assert (good.error, last.error) == (None, None)
    for result in bad:
        assert (result.finish_reason, result.text, result.token_ids) == ("error", "", [])
        assert result.prompt_token_ids == IDS
        assert result.logprobs == ([] if "logprobs" in options else None)
        with pytest.raises(OptionError, match=says):
            raise result.error  # type: ignore[misc]
    assert not kept(llm)


@pytest.mark.parametrize(
    ("wrong", "says"),
    [("", "the prompt is empty"), ([], "the prompt is empty"), ([10**6], "outside the vocabulary"),
     ([5] * 320, "no room for an answer"), ([{"role": "nobody", "content": "x"}], "unknown role")],
    ids=lambda value: ascii(value)[:20],
)  # fmt: skip
def test_a_prompt_that_can_not_be_decoded_ends_alone_too(llm: LLM, wrong: Any, says: str) -> None:
    alone = llm.generate(IDS, WORKS)[0]
    good, bad = llm.generate([IDS, wrong], WORKS)
    assert good.token_ids == alone.token_ids
    assert (bad.finish_reason, bad.token_ids) == ("error", [])
    with pytest.raises(PromptError, match=says):
        raise bad.error  # type: ignore[misc]
    with pytest.raises(PromptError, match=says):
        llm.generate([wrong, wrong], WORKS)


def test_end_tokens_that_the_vocabulary_lacks_ban_nothing() -> None:
    """Some configurations write -1 for none, and some name a token of a larger vocabulary."""
    llm = LLM(tiny("llama", eos_token_id=[-1, 5, 10**6]), "none")
    assert llm.eos_ids == {5}
    last = llm.engine.vocab_size - 1
    bias = {last: 100.0}
    result = llm.generate([IDS], SamplingParams(max_tokens=3, min_tokens=2, logit_bias=bias))[0]
    assert result.token_ids == [last] * 3


def test_one_set_of_options_may_be_given_for_each_prompt(llm: LLM) -> None:
    params = [SamplingParams(max_tokens=count, ignore_eos=True) for count in (2, 5)]
    assert [len(result.token_ids) for result in llm.generate([IDS, IDS], params)] == [2, 5]
    several = [SamplingParams(max_tokens=3, n=2, temperature=1.0, seed=1), params[0]]
    results = llm.generate([IDS, IDS], several)
    assert len(results) == 3
    assert results[0].token_ids != results[1].token_ids
    with pytest.raises(OptionError, match="2 params for 1 prompts"):
        llm.generate(IDS, params)
    for wrong in ({"max_tokens": 3}, 3, "greedy", [{"max_tokens": 3}], [None]):
        with pytest.raises(OptionError, match="params must be SamplingParams"):
            llm.generate(IDS, wrong)  # type: ignore[arg-type]


def test_samples_of_one_seed_differ_and_do_not_depend_on_the_batch(llm: LLM) -> None:
    params = SamplingParams(max_tokens=8, n=4, temperature=1.5, seed=11, ignore_eos=True)
    samples = [tuple(result.token_ids) for result in llm.generate(IDS, params)]
    assert len(set(samples)) == 4
    small = llm.using()
    small.max_batch = 1
    assert [tuple(result.token_ids) for result in small.generate(IDS, params)] == samples
    both = llm.generate([[25, 26], IDS], params)
    assert [tuple(result.token_ids) for result in both[4:]] == samples


def test_raw_logprobs_are_given_whatever_processors_do(llm: LLM) -> None:
    def shift(ids: list[int], logits: torch.Tensor) -> torch.Tensor:
        logits *= 0.5
        return logits

    params = SamplingParams(max_tokens=4, logprobs=2, ignore_eos=True)
    changed = params.model_copy(update={"logits_processors": (shift,)})
    raw, got = llm.generate(IDS, params)[0], llm.generate(IDS, changed)[0]
    assert raw.token_ids == got.token_ids
    assert raw.logprobs == got.logprobs


# -- stop strings ----------------------------------------------------------------------------------------------------

MARKED = ["one ", "<|user|>", "two ", "<|assistant|>", "<|user|>", " three", "<|end|>"]


@pytest.mark.parametrize(
    ("stop", "text"),
    [
        ("<|user|>", "one "),
        (["<|assistant|>"], "one two "),
        ("<|assistant|><|user|>", "one two "),
        ("wo <|assistant|>", "one t"),
        ("<|user|> th", "one two "),
        ("<|user|>two <|assistant|><|user|> three", "one "),
        (["three", "<|user|>"], "one "),
        (["nowhere", "ne <|user|>tw"], "o"),
        ("two  three", "one "),  # ordinary text is looked for in what is shown, as before
        ("<|end|>", "one two  three"),
        ("|user|", "one two  three"),
        ("nowhere<|user|>", "one two  three"),
    ],
)
def test_a_stop_string_that_names_a_special_token_sees_it(llm: LLM, stop: Any, text: str) -> None:
    """The model is made to write `MARKED`, token by token."""
    tokenizer = llm.tokenizer
    assert tokenizer is not None
    written = tokenizer("".join(MARKED)).input_ids
    assert tokenizer.decode(written) == "".join(MARKED)

    def dictate(ids: list[int], logits: torch.Tensor) -> torch.Tensor:
        place = len(ids) - len(IDS)
        return logits.index_fill(0, torch.tensor(written[min(place, len(written) - 1)]), 1e6)

    params = SamplingParams(max_tokens=len(written), stop=stop, logits_processors=[dictate], ignore_eos=True)
    for way in (llm, llm.plain()):
        result, stream = way.generate(IDS, params)[0], way.stream(IDS, params)
        shown = ""
        for piece in stream:
            shown += piece.text
            assert text.startswith(shown)
        assert result.text == shown == stream.result.text == text
        ended = "nowhere<" not in str(stop) and stop != "|user|"
        assert result.finish_reason == ("stop" if ended else "length")


def test_min_tokens_passes_a_special_stop_string_by(llm: LLM) -> None:
    tokenizer = llm.tokenizer
    assert tokenizer is not None
    user = tokenizer.convert_tokens_to_ids("<|user|>")
    params = SamplingParams(max_tokens=9, stop="<|user|>", logit_bias={int(user): 1e6}, min_tokens=4)  # type: ignore[arg-type]
    result = llm.generate(IDS, params)[0]
    assert (len(result.token_ids), result.finish_reason, result.text) == (4, "stop", "")


# -- who is asked for ------------------------------------------------------------------------------------------------


def test_using_changes_what_is_named_and_nothing_else(llm: LLM) -> None:
    seen: list[int] = []

    def watch(seq: Any, draft: Any, step: Any) -> None:
        seen.append(len(draft))

    first = LLM(tiny("llama"), "ngram", shape="1x1x1", accept="best_path", watch=watch)
    for twin in (first.using(), first.using(watch=lambda *_: None), first.using(accept="best_path")):
        assert twin.decoder.drafter.name == "ngram"
        assert twin.decoder.drafter is not first.decoder.drafter
        assert repr(twin.decoder.shape) == "1x1x1"
        assert twin.decoder.accept.lossy
    assert first.using("suffix").decoder.watch is watch
    assert repr(first.using("suffix").decoder.shape) == "1x1x1"
    assert first.using(shape="2x2").decoder.drafter.name == "ngram"
    assert not first.using(accept="match").decoder.accept.lossy
    plain = first.plain().decoder
    assert (plain.drafter.name, repr(plain.shape), plain.accept.lossy, plain.watch) == ("none", "1", False, None)


def test_every_error_is_a_value_error_of_one_line(llm: LLM) -> None:
    for kind in (RequestError, DeadEnd, PromptError, OptionError):
        assert issubclass(kind, TokenTreeError)
        assert issubclass(kind, ValueError)
    for wrong in WRONG:
        with pytest.raises(RequestError) as error:
            llm.generate(IDS, SamplingParams(logits_processors=[wrong]))
        assert "\n" not in str(error.value)
