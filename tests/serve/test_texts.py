"""Texts are those of `LLM.generate`, through the official client."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from tests.serve.serving import NAME, Served
from tests.tiny_models import some_tokens
from tokentree import SamplingParams
from tokentree.result import Result
from tokentree.serve.params import params_of
from tokentree.serve.protocol import CompletionRequest
from tokentree.serve.settings import Settings

PROMPT = "one two three one two"
MESSAGES: list[Any] = [{"role": "system", "content": "one"}, {"role": "user", "content": "two three"}]
# what is asked for, and the sampling options that it stands for
CASES: list[tuple[dict[str, Any], dict[str, Any]]] = [
    ({"temperature": 0}, {"temperature": 0.0}),
    ({"seed": 5}, {"temperature": 1.0, "seed": 5}),
    ({"temperature": 0.7, "top_p": 0.8, "seed": 1}, {"temperature": 0.7, "top_p": 0.8, "seed": 1}),
    (
        {"temperature": 0.7, "top_k": 9, "min_p": 0.02, "seed": 2},
        {"temperature": 0.7, "top_k": 9, "min_p": 0.02, "seed": 2},
    ),
    ({"top_k": -1, "seed": 2}, {"temperature": 1.0, "seed": 2}),
    (
        {"temperature": 0, "presence_penalty": 0.5, "frequency_penalty": 1, "repetition_penalty": 1.2},
        {"temperature": 0.0, "presence_penalty": 0.5, "frequency_penalty": 1.0, "repetition_penalty": 1.2},
    ),
    (
        {"temperature": 0, "logit_bias": {"81": 30, "9": -100}},
        {"temperature": 0.0, "logit_bias": {81: 30.0, 9: -100.0}},
    ),
    ({"temperature": 0, "stop": "e"}, {"temperature": 0.0, "stop": "e"}),
    ({"seed": 4, "stop": ["zz", "t", " "]}, {"temperature": 1.0, "seed": 4, "stop": ["zz", "t", " "]}),
    (
        {"seed": 4, "stop_token_ids": [*range(40, 160)]},
        {"temperature": 1.0, "seed": 4, "stop_token_ids": [*range(40, 160)]},
    ),
    (
        {"seed": 9, "min_tokens": 20, "ignore_eos": True},
        {"temperature": 1.0, "seed": 9, "min_tokens": 20, "ignore_eos": True},
    ),
    ({"seed": 6, "n": 3}, {"temperature": 1.0, "seed": 6, "n": 3}),
]
STANDARD = {"temperature", "top_p", "presence_penalty", "frequency_penalty", "logit_bias", "stop", "seed", "n"}


def split(asked: dict[str, Any]) -> dict[str, Any]:
    """The same for the client, which sends what it doesn't know as ``extra_body``."""
    extra = {name: value for name, value in asked.items() if name not in STANDARD}
    known = {name: value for name, value in asked.items() if name in STANDARD}
    return known | {"extra_body": extra | {"return_token_ids": True}}


def expected(served: Served, prompt: Any, **params: Any) -> list[Result]:
    return served.llm.generate(prompt, SamplingParams(**params))


def same(choices: list[Any], results: list[Result], text: Any) -> None:
    assert [choice.index for choice in choices] == list(range(len(results)))
    assert [text(choice) for choice in choices] == [result.text for result in results]
    assert [choice.token_ids for choice in choices] == [result.token_ids for result in results]
    assert [choice.finish_reason for choice in choices] == [result.finish_reason for result in results]


class Joined:
    """A choice of a stream, put together."""

    def __init__(self, index: int) -> None:
        self.index, self.text, self.token_ids, self.finish_reason = index, "", list[int](), None

    def add(self, choice: Any, text: str | None) -> None:
        assert self.finish_reason is None
        self.text += text or ""
        self.token_ids += getattr(choice, "token_ids", None) or []
        self.finish_reason = choice.finish_reason


def joined(chunks: Any, text: Any, count: int) -> list[Joined]:
    """The choices of a stream."""
    found = [Joined(index) for index in range(count)]
    for chunk in chunks:
        for choice in chunk.choices:
            found[choice.index].add(choice, text(choice))
    return found


@pytest.mark.parametrize(("asked", "params"), CASES, ids="-".join)
def test_completions(served: Served, asked: dict[str, Any], params: dict[str, Any]) -> None:
    results = expected(served, PROMPT, max_tokens=30, **params)
    create, options = served.client.completions.create, split(asked)
    whole = create(model=NAME, prompt=PROMPT, max_tokens=30, **options)
    same(whole.choices, results, lambda choice: choice.text)
    usage = whole.usage
    assert usage is not None
    assert usage.prompt_tokens == len(results[0].prompt_token_ids)
    assert usage.completion_tokens == sum(len(result.token_ids) for result in results)
    assert usage.total_tokens == usage.prompt_tokens + usage.completion_tokens
    chunks = create(model=NAME, prompt=PROMPT, max_tokens=30, stream=True, **options)
    same(joined(chunks, lambda choice: choice.text, len(results)), results, lambda choice: choice.text)


@pytest.mark.parametrize(("asked", "params"), CASES, ids="-".join)
def test_chats(served: Served, asked: dict[str, Any], params: dict[str, Any]) -> None:
    results = expected(served, served.llm.chat_prompt(MESSAGES), max_tokens=30, **params)
    create, options = served.client.chat.completions.create, split(asked)
    whole = create(model=NAME, messages=MESSAGES, max_tokens=30, **options)
    same(whole.choices, results, lambda choice: choice.message.content)
    assert {choice.message.role for choice in whole.choices} == {"assistant"}
    chunks = [*create(model=NAME, messages=MESSAGES, max_completion_tokens=30, stream=True, **options)]
    same(joined(chunks, lambda choice: choice.delta.content, len(results)), results, lambda choice: choice.text)
    assert [chunk.choices[0].delta.role for chunk in chunks[: len(results)]] == ["assistant"] * len(results)
    assert len({chunk.id for chunk in chunks}) == 1
    assert {chunk.object for chunk in chunks} == {"chat.completion.chunk"}


@pytest.mark.parametrize(
    "prompts",
    [["one", "two three", "one"], [some_tokens(5), some_tokens(20)], [some_tokens(9)]],
    ids=["texts", "ids", "one"],
)
def test_several_prompts_have_their_samples_in_a_row(served: Served, prompts: Any) -> None:
    results = expected(served, prompts, max_tokens=12, temperature=1.0, seed=2, n=2)
    options: Any = {"prompt": prompts, "max_tokens": 12, "seed": 2, "n": 2, "extra_body": {"return_token_ids": True}}
    whole = served.client.completions.create(model=NAME, **options)
    same(whole.choices, results, lambda choice: choice.text)
    assert whole.usage is not None
    assert whole.usage.prompt_tokens == sum(len(result.prompt_token_ids) for result in results[::2])
    assert [choice.prompt_token_ids for choice in whole.choices] == [one.prompt_token_ids for one in results]


def test_token_ids_are_a_prompt(served: Served) -> None:
    ids = some_tokens(7)
    results = expected(served, ids, max_tokens=16, temperature=1.0, seed=0)
    whole = served.client.completions.create(model=NAME, prompt=ids, seed=0)
    assert whole.choices[0].text == results[0].text
    assert whole.object == "text_completion"


def test_sixteen_at_once_get_the_texts_written_alone(served: Served) -> None:
    """Greedy and drawn ones, streamed and not, with prompts that begin alike."""
    jobs = [(some_tokens([1, 5, 60][i % 3], seed=i % 4), 5 + i, 0.8 * (i % 2), i) for i in range(16)]
    alone = [
        expected(served, ids, max_tokens=most, temperature=heat, seed=seed, ignore_eos=True)[0].token_ids
        for ids, most, heat, seed in jobs
    ]

    def write(number: int) -> list[int]:
        ids, most, heat, seed = jobs[number]
        options: Any = {"extra_body": {"ignore_eos": True, "return_token_ids": True}, "stream": number % 4 < 2}
        made = served.client.completions.create(
            model=NAME, prompt=ids, max_tokens=most, temperature=heat, seed=seed, **options
        )
        if number % 4 < 2:
            return joined(made, lambda choice: choice.text, 1)[0].token_ids
        found: list[int] = made.choices[0].token_ids
        return found

    with ThreadPoolExecutor(16) as pool:
        assert [*pool.map(write, range(16))] == alone


def test_without_a_seed_texts_differ(served: Served) -> None:
    texts = {served.client.completions.create(model=NAME, prompt="a", max_tokens=20).choices[0].text for _ in range(3)}
    assert len(texts) == 3


def test_a_prompt_is_echoed(served: Served) -> None:
    for prompt in (PROMPT, some_tokens(5)):
        shown = prompt if isinstance(prompt, str) else served.llm.tokenizer.decode(prompt)  # type: ignore[union-attr]
        options: Any = {"model": NAME, "prompt": prompt, "temperature": 0, "max_tokens": 6}
        plain = served.client.completions.create(**options).choices[0].text
        assert served.client.completions.create(**options, echo=True).choices[0].text == f"{shown}{plain}"
        chunks = served.client.completions.create(**options, echo=True, stream=True)
        assert joined(chunks, lambda choice: choice.text, 1)[0].text == f"{shown}{plain}"


def test_a_stop_string_that_is_one_special_token_is_that_token(served: Served) -> None:
    asked = CompletionRequest(prompt="a", stop=["b", "<|user|>"], stop_token_ids=[7])
    params = params_of(asked, Settings(NAME), served.service.texts.special, 5, None)
    assert params.stop == ("b",)
    end = served.llm.tokenizer.convert_tokens_to_ids("<|user|>")  # type: ignore[union-attr]
    assert params.stop_token_ids == (7, end)
    bias = {str(end): 7.0}
    results = expected(
        served, PROMPT, max_tokens=60, temperature=1.0, seed=1, stop_token_ids=[end], logit_bias={end: 7.0}, stop="zz"
    )
    assert results[0].finish_reason == "stop"
    assert results[0].token_ids[-1] == end
    whole = served.client.completions.create(
        model=NAME, prompt=PROMPT, max_tokens=60, seed=1, stop=["zz", "<|user|>"], logit_bias=bias,  # type: ignore[arg-type]
        extra_body={"return_token_ids": True},
    )  # fmt: skip
    same(whole.choices, results, lambda choice: choice.text)


def test_messages_of_all_roles_and_parts(served: Served) -> None:
    asked: Any = [
        {"role": "developer", "content": [{"type": "text", "text": "on"}, {"type": "text", "text": "e"}]},
        {"role": "user", "content": "two", "name": "me"},
        {"role": "assistant", "content": "three", "refusal": None, "annotations": []},
        {"role": "tool", "content": "four", "tool_call_id": "1"},
        {"role": "user", "content": "five"},
    ]
    known = [("system", "one"), ("user", "two"), ("assistant", "three"), ("tool", "four"), ("user", "five")]
    ids = served.llm.chat_prompt([{"role": role, "content": text} for role, text in known])
    results = expected(served, ids, max_tokens=8, temperature=0.0)
    whole = served.client.chat.completions.create(model=NAME, messages=asked, temperature=0, max_tokens=8)
    assert whole.choices[0].message.content == results[0].text
    assert whole.usage is not None
    assert whole.usage.prompt_tokens == len(ids)


def test_a_chat_goes_on_to_the_end_of_the_context(served: Served) -> None:
    whole = served.client.chat.completions.create(
        model=NAME, messages=MESSAGES, seed=1, extra_body={"ignore_eos": True}
    )
    assert whole.usage is not None
    assert whole.usage.total_tokens == served.llm.engine.info.context
    assert whole.choices[0].finish_reason == "length"


def test_a_prediction_is_drafted_from_and_changes_nothing(served: Served) -> None:
    options: Any = {"model": NAME, "messages": MESSAGES, "temperature": 0, "max_tokens": 40}
    options["extra_body"] = {"ignore_eos": True, "speculation": {"drafter": "ngram", "shape": "chain:4"}}
    plain = served.client.chat.completions.create(**options)
    text = plain.choices[0].message.content
    for content in (text, [{"type": "text", "text": text}]):
        prediction: Any = {"type": "content", "content": f"one two three {content if content is text else text}"}
        predicted = served.client.chat.completions.create(**options, prediction=prediction)
        assert predicted.choices[0].message.content == text


def test_fields_that_change_nothing_are_taken(served: Served) -> None:
    options: Any = {"model": NAME, "messages": MESSAGES, "temperature": 0, "max_tokens": 4}
    plain = served.client.chat.completions.create(**options).choices[0].message.content
    more = served.client.chat.completions.create(
        **options, user="me", metadata={"a": "b"}, store=False, service_tier="auto", modalities=["text"], tools=[],
        response_format={"type": "text"}, tool_choice="none",
    )  # fmt: skip
    assert more.choices[0].message.content == plain
    null = dict.fromkeys(("top_p", "stop", "seed", "n", "logit_bias", "stream_options", "tools", "response_format"))
    answer = served.post("/v1/chat/completions", options | null)
    assert answer.json()["choices"][0]["message"]["content"] == plain
