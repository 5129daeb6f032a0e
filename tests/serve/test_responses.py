"""/v1/responses, through the official client: chats in another form."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest

from tests.serve.serving import NAME, Served, events_of, serving, slowed
from tests.serve.test_tools import SCHEMA, call_text, llm_of, said_by, told_tool
from tokentree import SamplingParams
from tokentree.serve import replies

TOOL: dict[str, Any] = {"type": "function", "name": "weather", "parameters": SCHEMA, "strict": False}
FUNCTION: dict[str, Any] = {"type": "function", "function": {"name": "weather", "parameters": SCHEMA}}
ASKED: dict[str, Any] = {"model": NAME, "input": "one two", "max_output_tokens": 20, "extra_body": {"seed": 3}}
FORM: dict[str, Any] = {"format": {"type": "json_schema", "name": "a", "schema": SCHEMA, "strict": True}}


@pytest.fixture(scope="module")
def calling() -> Iterator[Served]:
    with serving(llm_of("hermes")) as served:
        yield served
        served.wait_idle()


def expected(served: Served, messages: Any, tools: Any = (), **params: Any) -> Any:
    ids = served.llm.chat_prompt(messages, tools)
    options = {"max_tokens": 20, "seed": 3, "temperature": 1.0} | params
    return served.llm.generate([ids], SamplingParams(**options))[0]


def final_of(events: list[Any]) -> Any:
    """What a stream ends with; its events tell the same, item by item."""
    assert [event.sequence_number for event in events] == [*range(len(events))]
    assert [event.type for event in events[:2]] == ["response.created", "response.in_progress"]
    final = events[-1].response
    assert events[-1].type == f"response.{final.status}"
    texts: dict[int, str] = {}
    done: dict[int, Any] = {}
    ids: dict[int, str] = {}
    for event in events[2:-1]:
        place = event.output_index
        assert place not in done
        if event.type == "response.output_item.added":
            assert place == len(texts)
            assert event.item.status == "in_progress"
            texts[place], ids[place] = "", event.item.id
        elif event.type.endswith(".delta"):
            assert event.delta
            texts[place] += event.delta
        elif event.type == "response.output_text.done":
            assert event.text == texts[place]
        elif event.type == "response.content_part.done":
            assert event.part.text == texts[place]
        elif event.type == "response.function_call_arguments.done":
            assert event.arguments == texts[place]
        elif event.type == "response.output_item.done":
            done[place] = event.item
        else:
            assert event.type == "response.content_part.added"
            assert event.part.text == ""
        if not event.type.startswith("response.output_item"):
            assert event.item_id == ids[place]
    assert [done[place] for place in sorted(done)] == final.output
    assert [item.id for item in final.output] == [ids[place] for place in sorted(ids)]
    return final


def both(served: Served, **asked: Any) -> tuple[Any, Any]:
    """The answer at once, and that of a stream."""
    return served.client.responses.create(**asked), final_of([*served.client.responses.create(**asked, stream=True)])


def said(response: Any) -> list[tuple[str, ...]]:
    """What a response holds, without its ids."""
    return [
        ("text", item.content[0].text) if item.type == "message" else ("call", item.name, item.arguments)
        for item in response.output
    ]


@pytest.mark.parametrize(
    ("more", "messages"),
    [
        ({}, [{"role": "user", "content": "one two"}]),
        ({"instructions": "three"}, [{"role": "system", "content": "three"}, {"role": "user", "content": "one two"}]),
        (
            {
                "input": [
                    {"role": "developer", "content": "one"},
                    {
                        "role": "user",
                        "content": [{"type": "input_text", "text": "tw"}, {"type": "input_text", "text": "o"}],
                    },
                    {
                        "type": "message",
                        "id": "msg_1",
                        "status": "completed",
                        "role": "assistant",
                        "content": [{"type": "output_text", "text": "three", "annotations": [], "logprobs": []}],
                    },
                    {"role": "user", "content": "four"},
                ]
            },
            [
                {"role": "system", "content": "one"},
                {"role": "user", "content": "two"},
                {"role": "assistant", "content": "three"},
                {"role": "user", "content": "four"},
            ],
        ),
    ],
    ids=["text", "instructions", "messages"],
)
def test_texts_are_those_of_the_library(served: Served, more: dict[str, Any], messages: Any) -> None:
    result = expected(served, messages)
    for response in both(served, **ASKED | more):
        assert response.output_text == result.text
        assert response.status == ("incomplete" if result.finish_reason == "length" else "completed")
        assert response.usage.input_tokens == len(result.prompt_token_ids)
        assert response.usage.output_tokens == len(result.token_ids)
        assert response.id.startswith("resp_")
        assert response.model == NAME
        assert response.max_output_tokens == 20
        assert response.store is False


def test_sampling_options(served: Served) -> None:
    result = expected(served, [{"role": "user", "content": "one two"}], temperature=0.7, top_p=0.8)
    for response in both(served, **ASKED, temperature=0.7, top_p=0.8):
        assert response.output_text == result.text
        assert (response.temperature, response.top_p) == (0.7, 0.8)
    assert expected(served, [{"role": "user", "content": "one two"}]).text != result.text


def test_an_incomplete_text_says_why(served: Served) -> None:
    for response in both(served, **ASKED | {"max_output_tokens": 2}):
        assert response.status == "incomplete"
        assert response.incomplete_details.reason == "max_output_tokens"
        assert response.output[0].status == "incomplete"


@pytest.mark.parametrize(
    "form", [FORM["format"], {"type": "json_object"}, {"type": "text"}], ids=lambda one: one["type"]
)
def test_formats(calling: Served, form: dict[str, Any]) -> None:
    kinds: dict[str, Any] = {"json_schema": {"json": SCHEMA}, "json_object": {"json_object": True}}
    messages = [{"role": "user", "content": "one two"}]
    result = expected(calling, messages, max_tokens=100, structured_outputs=kinds.get(form["type"]))
    for response in both(calling, **ASKED | {"max_output_tokens": 100, "text": {"format": form}}):
        assert response.output_text == result.text
        assert response.text.format.type == form["type"]


def test_a_call_is_forced(calling: Served) -> None:
    asked = ASKED | {"max_output_tokens": 100, "tools": [TOOL], "tool_choice": "required", "parallel_tool_calls": False}
    whole, final = both(calling, **asked)
    assert said(whole) == said(final)
    (item,) = whole.output
    assert item.call_id.startswith("call_")
    assert item.name == "weather"
    assert json.loads(item.arguments)["city"] in ("Rome", "東京")
    named = asked | {"tool_choice": {"type": "function", "name": "weather"}}
    assert said(both(calling, **named)[0]) == said(whole)


def test_content_and_calls(calling: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    call = call_text(calling, "weather", '{"city": "Rome"}')
    called = ("call", "weather", '{"city": "Rome"}')
    for text, items in (
        (f"Let me see. {call}\n{call}", [("text", "Let me see. "), called, called]),
        (f"{call} so", [called, ("text", " so")]),
        (f"a {call} so", [("text", "a  so"), called]),
    ):
        said_by(calling, monkeypatch, text)
        for speculation in ({}, {"speculation": "off"}):
            asked = ASKED | {"max_output_tokens": 300, "tools": [TOOL], "extra_body": speculation}
            whole, final = both(calling, **asked)
            assert said(whole) == said(final) == items
            assert {item.status for item in whole.output} == {"completed"}


def test_earlier_calls_and_their_results(calling: Served) -> None:
    call = {"type": "function_call", "call_id": "call_1", "name": "weather", "arguments": '{"city": "Rome"}'}
    given: list[Any] = [
        {"role": "user", "content": "one"},
        call | {"id": "fc_1", "status": "completed"},
        call | {"call_id": "call_2"},
        {"type": "function_call_output", "call_id": "call_1", "output": "sunny"},
        {"type": "function_call_output", "call_id": "call_2", "output": [{"type": "input_text", "text": "rainy"}]},
    ]
    calls = [
        {"id": f"call_{i}", "type": "function", "function": {"name": "weather", "arguments": {"city": "Rome"}}}
        for i in (1, 2)
    ]
    messages = [
        given[0],
        {"role": "assistant", "content": "", "tool_calls": calls},
        {"role": "tool", "tool_call_id": "call_1", "content": "sunny"},
        {"role": "tool", "tool_call_id": "call_2", "content": "rainy"},
    ]
    tools = [told_tool(FUNCTION)]
    answer = calling.client.responses.create(**ASKED | {"input": given, "tools": [TOOL], "tool_choice": "auto"})
    assert answer.output_text == expected(calling, messages, tools).text
    assert answer.usage is not None
    assert answer.usage.input_tokens == len(calling.llm.chat_prompt(messages, tools))


def test_what_was_answered_is_an_input_again(calling: Served) -> None:
    asked = ASKED | {"max_output_tokens": 100, "tools": [TOOL]}
    first = calling.client.responses.create(**asked, tool_choice="required", parallel_tool_calls=False)
    call: Any = first.output[0]
    result: Any = {"type": "function_call_output", "call_id": call.call_id, "output": "sunny"}
    second = calling.client.responses.create(**asked | {"input": [{"role": "user", "content": "a"}, call, result]})
    third = [{"role": "user", "content": "a"}, *second.output, {"role": "user", "content": "b"}]
    assert calling.client.responses.create(**asked | {"input": third}).output


def test_the_client_s_own_stream(calling: Served) -> None:
    asked = {**ASKED, "max_output_tokens": 100, "tools": [TOOL], "tool_choice": "required"}
    asked["parallel_tool_calls"] = False
    with calling.client.responses.stream(**asked) as stream:
        final: Any = stream.get_final_response()
    assert said(final) == said(calling.client.responses.create(**asked))


def test_answers_have_the_form_that_the_interface_tells(calling: Served) -> None:
    body = {"input": "one", "max_output_tokens": 20, "tools": [TOOL], "tool_choice": "required", "text": None}
    replies.ResponseReply.model_validate(calling.post("/v1/responses", body).json())
    answer = calling.post("/v1/responses", body | {"stream": True})
    assert "[DONE]" not in answer.text
    events = [replies.ResponseEvent.model_validate(event) for event in events_of(answer)]
    named = [line.removeprefix("event: ") for line in answer.text.splitlines() if line.startswith("event: ")]
    assert named == [event.type for event in events]


def test_an_error_in_a_stream_is_an_event() -> None:
    llm = llm_of("hermes")
    slowed(llm, 0.2)
    with serving(llm, request_timeout=0.3) as served:
        *others, last = served.client.responses.create(model=NAME, input="one", stream=True)
    assert others[0].type == "response.created"
    assert last.type == "error"
    assert last.code == "timeout"


WRONG: list[tuple[dict[str, Any], str]] = [
    ({"input": None}, "input"),
    ({"input": []}, "input"),
    ({"input": 5}, "input"),
    ({"input": [5]}, "input[0]"),
    ({"input": [{"type": "reasoning"}]}, "input[0]"),
    ({"input": [{"role": "tool", "content": "a"}]}, "input[0].role"),
    ({"input": [{"role": "user", "content": [{"type": "input_image"}]}]}, "input[0].content[0].type"),
    ({"input": [{"type": "function_call", "call_id": "a", "name": "a"}]}, "input[0].arguments"),
    ({"input": [{"type": "function_call", "call_id": "a", "name": "a", "arguments": "["}]}, "input"),
    ({"input": "a b " * 2000}, "input"),
    ({"max_output_tokens": 0}, "max_output_tokens"),
    ({"temperature": -1}, "temperature"),
    ({"model": "gpt-4"}, "model"),
    ({"store": True}, "store"),
    ({"previous_response_id": "resp_1"}, "previous_response_id"),
    ({"conversation": "a"}, "conversation"),
    ({"background": True}, "background"),
    ({"include": ["message.output_text.logprobs"]}, "include"),
    ({"reasoning": {"effort": "low"}}, "reasoning.effort"),
    ({"truncation": "auto"}, "truncation"),
    ({"text": {"format": {"type": "json_schema", "name": "a"}}}, "text.format"),
    ({"text": {"format": {"type": "text", "name": "a"}}}, "text.format"),
    ({"text": {"format": {"type": "json_schema", "name": "a", "schema": {"not": {}}}}}, "text.format"),
    ({"text": {"verbosity": "low"}}, "text.verbosity"),
    ({"tools": [{"type": "web_search"}]}, "tools[0].type"),
    ({"tools": [TOOL, TOOL]}, "tools[1].name"),
    ({"tools": [TOOL], "tool_choice": {"type": "function", "name": "b"}}, "tool_choice.name"),
    ({"tool_choice": "required"}, "tool_choice"),
    ({"messages": []}, "messages"),
    ({"n": 2}, "n"),
]


@pytest.mark.parametrize(("wrong", "param"), WRONG, ids=str)
def test_what_is_wrong_is_named(calling: Served, wrong: dict[str, Any], param: str) -> None:
    error = calling.refused("/v1/responses", {"input": "a"} | wrong, 404 if param == "model" else 400)
    assert error["param"] == param
    for word in ("messages", "max_completion_tokens", "response_format", "function."):
        assert word not in error["message"] or word in wrong
