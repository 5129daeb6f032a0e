"""Content and calls in a text, however it is cut into pieces."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tokentree.serve.tools.formats import FORMATS, format_of
from tokentree.serve.tools.reader import CallPart, CallReader, joined

NAMES = ["look_up", "add"]
Read = tuple[str, list[tuple[str | None, str]]]


def call(name: str = "add", arguments: str = '{"a": 1}', key: str = "arguments") -> str:
    return f'{{"name": "{name}", "{key}": {arguments}}}'


def tagged(text: str) -> str:
    return f"<tool_call>\n{text}\n</tool_call>"


def read(form: str, pieces: list[str], hidden: dict[int, str] | None = None) -> Read:
    reader = CallReader(FORMATS[form], NAMES, hidden or {})
    parts: list[str | CallPart] = []
    for piece in pieces:
        parts += reader.feed(piece)
    parts += reader.feed("", last=True)
    assert reader.feed("", last=True) == []
    calls = [part for part in parts if not isinstance(part, str)]
    for number in range(reader.calls):
        first, *others = [part for part in calls if part.index == number]
        assert first.id is not None
        assert first.id.startswith("call_")
        assert first.name is not None
        assert all(part.id is part.name is None for part in others)
    assert len({part.id for part in calls if part.id}) == reader.calls
    whole = joined(calls)
    assert [part.index for part in whole] == [*range(reader.calls)]
    return "".join(part for part in parts if isinstance(part, str)), [(part.name, part.arguments) for part in whole]


ODD = '{"a": "}<tool_call>\\"{</tool_call>", "b": [{}, []]}'
HERMES: list[tuple[str, Read]] = [
    ("", ("", [])),
    ("hello <b>", ("hello <b>", [])),
    (" \n", (" \n", [])),
    (tagged(call()), ("", [("add", '{"a": 1}')])),
    (f"Let me see. {tagged(call())}", ("Let me see. ", [("add", '{"a": 1}')])),
    (f"\n{tagged(call())}\n{tagged(call('look_up', '{}'))}\n", ("", [("add", '{"a": 1}'), ("look_up", "{}")])),
    (f"{tagged(call())} and", (" and", [("add", '{"a": 1}')])),
    (f"<tool_call>{call(key='parameters')}</tool_call>", ("", [("add", '{"a": 1}')])),
    (tagged(call(arguments=ODD)), ("", [("add", ODD)])),
    (tagged('{"arguments": {"a": 1}, "name": "add"}'), ("", [("add", '{"a": 1}')])),
    (tagged('{"name": "add", "arguments": {"a": 1}, "id": 3}'), ("", [("add", '{"a": 1}')])),
    # a model's mistakes: a brace is missing, a tag is, the text is cut off
    (f"<tool_call>{call()[:-1]}</tool_call>x", ("x", [("add", '{"a": 1}')])),
    (f"<tool_call>{call()[:-2]}</tool_call>x", ("x", [("add", '{"a": 1')])),
    (f"<tool_call>{call()}", ("", [("add", '{"a": 1}')])),
    (f"<tool_call>{call()[:-4]}", ("", [("add", '{"a":')])),
    # no calls
    (f"a {tagged(call('mul'))}", (f"a {tagged(call('mul'))}", [])),
    (tagged("hello"), (tagged("hello"), [])),
    (tagged('{"name": "add"}'), (tagged('{"name": "add"}'), [])),
    (tagged('{"name": "add", "arguments": "a"}'), (tagged('{"name": "add", "arguments": "a"}'), [])),
    (tagged('{"name": ["add"], "arguments": {}}'), (tagged('{"name": ["add"], "arguments": {}}'), [])),
    (tagged('{"city": "here"}'), (tagged('{"city": "here"}'), [])),
    ('<tool_call>{"name": "ad', ('<tool_call>{"name": "ad', [])),
    (f"<tool_call><tool_call>{call()}", ("<tool_call>", [("add", '{"a": 1}')])),
    (f'<tool_call>{{"name": "x{tagged(call())}', (f'<tool_call>{{"name": "x{tagged(call())}', [])),
    (call(), (call(), [])),
    ("<tool_cal", ("<tool_cal", [])),
]
LLAMA: list[tuple[str, Read]] = [
    (call(key="parameters"), ("", [("add", '{"a": 1}')])),
    (f" \n{call()}", ("", [("add", '{"a": 1}')])),
    (f"{call()}; {call('look_up', '{}')}", ("", [("add", '{"a": 1}'), ("look_up", "{}")])),
    (f"{call()}\n{call()}", ("", [("add", '{"a": 1}')] * 2)),
    (f"<|python_tag|>{call()}", ("", [("add", '{"a": 1}')])),
    (f"Now: <|python_tag|>{call()}", ("Now: ", [("add", '{"a": 1}')])),
    (f"Now: {call()}", (f"Now: {call()}", [])),
    ("<|python_tag|>print(1)", ("<|python_tag|>print(1)", [])),
    (call("mul"), (call("mul"), [])),
    ('{"answer": 5} and {', ('{"answer": 5} and {', [])),
    ("{", ("{", [])),
    ("  hello; {", ("  hello; {", [])),
    ('{"type": "function", "name": "add", "parameters": {"a": 1}}', ("", [("add", '{"a": 1}')])),
]
CASES = [("hermes", *one) for one in HERMES] + [("llama3", *one) for one in LLAMA]


@pytest.mark.parametrize(("form", "text", "expected"), CASES, ids=str)
def test_a_text_at_once_and_by_letters(form: str, text: str, expected: Read) -> None:
    assert read(form, [text]) == expected
    assert read(form, [*text]) == expected


ATOMS = [
    "<tool_call>", "</tool_call>", "<|python_tag|>", "{", "}", '"name"', ": ", ", ", '"add"', '"arguments"', "[", "\\",
    '"', " ", "\n", ";", "<", "a", call(), tagged(call()), '{"name": "add", "arguments": {',
]  # fmt: skip


@settings(max_examples=300, deadline=None)
@given(st.lists(st.sampled_from(ATOMS), max_size=12), st.sampled_from([*FORMATS]), st.data())
def test_pieces_change_nothing(atoms: list[str], form: str, data: Any) -> None:
    text = "".join(atoms)
    cuts = sorted(data.draw(st.sets(st.integers(0, len(text)), max_size=6)))
    pieces = [text[i:j] for i, j in zip([0, *cuts], [*cuts, len(text)], strict=True)]
    assert read(form, pieces) == read(form, [text])
    content, calls = read(form, [text])
    if not calls:
        assert content == text


def test_arguments_come_as_they_are_written() -> None:
    reader = CallReader(FORMATS["hermes"], NAMES, {})
    told = [reader.feed(piece) for piece in ("<tool_call>", '{"name": "add", ', '"arguments": {', '"a": ', "1}", "}")]
    assert [len(parts) for parts in told] == [0, 0, 2, 1, 1, 0]
    begin = told[2][0]
    assert isinstance(begin, CallPart)
    assert (begin.name, begin.arguments) == ("add", "")


def test_json_that_is_no_call_is_told_at_once() -> None:
    reader = CallReader(FORMATS["llama3"], NAMES, {})
    assert "".join(map(str, reader.feed('{"answer": '))) == '{"answer": '


def test_tags_that_are_special_tokens_are_shown_in_no_content() -> None:
    hidden = {5: "<tool_call>", 6: "</tool_call>"}
    assert read("hermes", ["a", "<tool_call>", call(), "</tool_call>"], hidden) == ("a", [("add", '{"a": 1}')])
    assert read("hermes", ["a", "<tool_call>", "b", "</tool_call>"], hidden) == ("ab", [])


def test_a_long_text_takes_no_long_time() -> None:
    for text in ("<tool_call>{" * 4000, '<tool_call>{"name": "' * 3000, "<tool_call>" + " " * 50_000, "{" * 50_000):
        assert read("hermes", [text[i : i + 8] for i in range(0, len(text), 8)]) == (text, [])


def test_templates_tell_the_format() -> None:
    assert format_of('… <tool_call>\n{"name": …') is FORMATS["hermes"]
    assert format_of("… <tool_call>\n<function=…") is None
    assert format_of("… <|python_tag|> …") is FORMATS["llama3"]
    assert format_of('… {"name": function name, "parameters": dictionary of …') is FORMATS["llama3"]
    assert format_of("… tools …") is None
    assert format_of("… tools …", "llama3") is FORMATS["llama3"]


def test_arguments_of_a_call_in_another_order_are_json() -> None:
    _, calls = read("hermes", [tagged('{"arguments": {"ä": "\\u00e4"}, "name": "add"}')])
    assert json.loads(calls[0][1]) == {"ä": "ä"}


NO_CALLS = ['{"name": "Al"', '{"name":5', '{"name": "adder"', f'{{"name": "{"a" * 65}', '{"size": ']


@pytest.mark.parametrize("begin", NO_CALLS)
def test_json_that_is_no_call_is_told_as_soon_as_that_is_certain(begin: str) -> None:
    reader = CallReader(FORMATS["llama3"], NAMES, {})
    told = [part for char in begin for part in reader.feed(char)]
    assert "".join(map(str, told)) == begin
    more = CallReader(FORMATS["llama3"], NAMES, {})
    assert more.feed('{"name": "add", ') == more.feed('"parameters": ') == []
    assert len(more.feed('{"a')) == 2
