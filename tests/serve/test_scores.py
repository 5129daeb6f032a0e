"""Completions that echo their prompt tell its log-probabilities too, as lm-evaluation-harness asks for them."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest

from tests.serve.serving import NAME, Served
from tests.tiny_models import some_tokens
from tokentree import SamplingParams
from tokentree.result import Result
from tokentree.sequence import TokenLogprobs
from tokentree.serve.logprobs import of_prompt
from tokentree.serve.tokens import TokenTexts

PROMPTS: list[Any] = ["one two  thrée ∑ four", some_tokens(30, seed=2)]


def known(served: Served, prompt: Any, **params: Any) -> Result:
    options = SamplingParams(temperature=1.0, seed=3, logprobs=2, prompt_logprobs=2, **params)
    return served.llm.generate([prompt], options)[0]


def joined(chunks: Any, count: int) -> list[tuple[str, dict[str, list[Any]]]]:
    """The text and the log-probabilities of each choice, whether they come at once or in parts."""
    texts, told = [""] * count, [dict[str, list[Any]]() for _ in range(count)]
    for chunk in chunks:
        for choice in chunk.choices:
            texts[choice.index] += choice.text
            for name, values in choice.logprobs.model_dump().items():
                told[choice.index].setdefault(name, []).extend(values)
    return [*zip(texts, told, strict=True)]


def asked(served: Served, stream: bool, count: int = 1, **options: Any) -> list[tuple[str, dict[str, list[Any]]]]:
    made: Any = served.client.completions.create(
        model=NAME, echo=True, logprobs=2, seed=3, stream=stream, **options
    )  # fmt: skip
    return joined(made if stream else [made], count)


def check(served: Served, said: tuple[str, dict[str, list[Any]]], expected: Result, shown: str) -> None:
    text, told = said
    assert expected.prompt_logprobs is not None
    assert expected.logprobs is not None
    entries: list[TokenLogprobs | None] = [*expected.prompt_logprobs, *expected.logprobs]
    assert text == f"{shown}{expected.text}"
    assert told["token_logprobs"] == [one and one.logprob for one in entries]
    assert told["top_logprobs"][0] is None
    for one, name, top in zip(entries[1:], told["tokens"][1:], told["top_logprobs"][1:], strict=True):
        assert one is not None
        assert top[name] == one.logprob
        assert sorted(top.values()) == sorted({one.token: one.logprob, **one.top}.values())
    offsets, texts = told["text_offset"], TokenTexts(served.service.tokenizer)
    assert offsets == sorted(offsets)
    for token, offset in zip(expected.prompt_token_ids, offsets, strict=False):
        part = texts.text(token)
        assert "\ufffd" in part or shown[offset : offset + len(part)] == part
    assert all(offset >= len(shown) for offset in offsets[len(expected.prompt_token_ids) :])


def shown_of(served: Served, prompt: Any) -> str:
    return prompt if isinstance(prompt, str) else str(served.service.tokenizer.decode(prompt))


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("most", [0, 1, 12])
def test_echo_with_logprobs(served: Served, stream: bool, most: int) -> None:
    for prompt in PROMPTS:
        said = asked(served, stream, prompt=prompt, max_tokens=most)
        check(served, said[0], known(served, prompt, max_tokens=most), shown_of(served, prompt))


@pytest.mark.parametrize("stream", [False, True])
def test_several_prompts_and_samples(served: Served, stream: bool) -> None:
    prompts = [some_tokens(20, seed=4), some_tokens(3, seed=5)]
    said = asked(served, stream, 4, prompt=prompts, max_tokens=5, n=2)
    options = SamplingParams(temperature=1.0, seed=3, logprobs=2, prompt_logprobs=2, max_tokens=5, n=2)
    for one, expected in zip(said, served.llm.generate(prompts, options), strict=True):
        check(served, one, expected, shown_of(served, expected.prompt_token_ids))


def test_a_prompt_alone_is_counted_and_has_no_new_token(served: Served) -> None:
    before = served.http.get("/metrics").text
    made = served.client.completions.create(model=NAME, prompt="one two", max_tokens=0, echo=True, logprobs=0)
    choice, usage = made.choices[0], made.usage
    assert usage is not None
    assert (choice.text, choice.finish_reason, usage.completion_tokens) == ("one two", "length", 0)
    name = "vllm:prompt_tokens_total{"
    counts = [
        float(line.split()[-1])
        for text in (before, served.http.get("/metrics").text)
        for line in text.splitlines()
        if line.startswith(name)
    ]
    assert counts[-1] - (counts[0] if len(counts) > 1 else 0) == usage.prompt_tokens


def test_what_is_refused(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    body = {"prompt": "a", "max_tokens": 0}
    for more in ({}, {"echo": True}, {"logprobs": 1}):
        assert served.refused("/v1/completions", body | more)["param"] == "max_tokens"
    both = {"echo": True, "logprobs": 21}
    assert served.refused("/v1/completions", body | both)["param"] == "logprobs"
    assert served.refused("/v1/completions", body | both | {"logprobs": 1, "max_tokens": -1})["param"] == "max_tokens"
    info = dataclasses.replace(served.llm.engine.info, scores_prompts=False)
    monkeypatch.setattr(type(served.llm.engine), "info", info)
    error = served.refused("/v1/completions", {"prompt": "a", "echo": True, "logprobs": 1})
    assert (error["param"], error["code"]) == ("echo", "unsupported")


def test_a_special_token_before_the_text_has_no_room_in_it(served: Served) -> None:
    texts = served.service.texts
    special = next(iter(texts.special.values()))
    ids = [special, *served.llm.prompt_ids("one two")]
    seq = served.llm.sequence(ids, SamplingParams(prompt_logprobs=0))
    seq.prompt_logprobs *= len(ids)
    assert [one.offset for one in of_prompt(seq, "one two", texts)][:2] == [0, 0]
    whole = f"{texts.text(special)}one two"
    assert [one.offset for one in of_prompt(seq, whole, texts)][:2] == [0, len(texts.text(special))]
