"""Where a request goes: what bodies have in common, who knows it, and who is busy."""

from __future__ import annotations

import json
from typing import Any

import pytest

from tokentree.scale.beginnings import BLOCK, MARKS, PLACES, SLACK, Beginnings, marks_of, ranked


def body(**fields: Any) -> bytes:
    return json.dumps(fields).encode()


def chat(*texts: str, **more: Any) -> bytes:
    roles = ("system", "user", "assistant", "user", "assistant")
    return body(messages=[{"role": role, "content": text} for role, text in zip(roles, texts, strict=False)], **more)


def shared(one: bytes, other: bytes) -> int:
    """How many first marks are the same."""
    pairs = list(zip(marks_of(one), marks_of(other), strict=False))
    return next((count for count, (left, right) in enumerate(pairs) if left != right), len(pairs))


def test_a_later_turn_begins_as_the_turn_before() -> None:
    first, second = chat("be short", "a question"), chat("be short", "a question", "an answer", "why?")
    assert marks_of(second)[: len(marks_of(first))] == marks_of(first)
    assert len(marks_of(second)) == 4
    assert shared(first, chat("be short", "another question")) == 1
    assert shared(first, chat("be long", "a question")) == 0


def test_a_mark_depends_on_all_before_it() -> None:
    assert marks_of(chat("one", "same"))[1] != marks_of(chat("two", "same"))[1]


@pytest.mark.parametrize("fields", [{"stream": True}, {"temperature": 0.5}, {"model": "x"}, {"max_tokens": 7}])
def test_other_fields_don_t_matter(fields: dict[str, Any]) -> None:
    assert marks_of(chat("a", "b", **fields)) == marks_of(chat("a", "b"))


def test_tools_and_instructions_come_first() -> None:
    assert shared(chat("a", tools=[{"x": 1}]), chat("a")) == 0
    assert shared(body(instructions="be short", input="a"), body(instructions="be short", input="b")) == 1
    assert shared(body(input="a"), body(input=[{"role": "user", "content": "a"}])) == 1


def test_a_long_text_has_a_mark_for_each_block() -> None:
    text = "x" * (3 * BLOCK)
    assert len(marks_of(body(prompt=text + "one"))) == 4
    assert shared(body(prompt=text + "one"), body(prompt=text + "two")) == 3
    assert shared(body(prompt=list(range(200))), body(prompt=[*range(130), 9, 9])) == 4
    assert len(marks_of(body(prompt="x" * (MARKS + 5) * BLOCK))) == MARKS


@pytest.mark.parametrize(
    "wrong",
    [b"", b"{", b"[]", b"3", b"\xff", b"{}", body(prompt=None), body(messages=3), body(messages=[3, None]),
     body(messages=[{"role": 3, "content": [{}]}]), b'{"prompt": ' + b"[" * 100_000, body(prompt="\ud800")],
)  # fmt: skip
def test_a_body_that_makes_no_sense_is_no_error(wrong: bytes) -> None:
    assert isinstance(marks_of(wrong), tuple)


def test_who_knows_most_is_known() -> None:
    known, marks = Beginnings(), marks_of(chat("a", "b", "c", "d"))
    known.learn(marks[:1], "near")
    known.learn(marks[:3], "far")
    assert known.known(marks) == {"far": 3, "near": 1}
    known.forget("far")
    assert known.known(marks) == {"near": 1}
    assert len(known) == 1


def test_what_is_remembered_has_limits() -> None:
    known = Beginnings(most=3)
    for text in "abcd":
        known.learn(marks_of(body(prompt=text)), text)
    assert len(known) == 3
    assert not known.known(marks_of(body(prompt="a")))
    assert known.known(marks_of(body(prompt="d"))) == {"d": 1}
    for number in range(2 * PLACES):
        known.learn(marks_of(body(prompt="d")), str(number))
    assert (
        list(known.known(marks_of(body(prompt="d"))))
        == [str(number) for number in range(2 * PLACES)][: -PLACES - 1 : -1]
    )


MARK = marks_of(body(prompt="a"))


def test_a_request_goes_where_its_beginning_is_known() -> None:
    assert ranked({"a": 0, "b": 0, "c": 0}, {"b": 2, "c": 1}, MARK)[:2] == ["b", "c"]
    assert ranked({"a": 0, "b": SLACK}, {"b": 1}, MARK)[0] == "b"


def test_unless_that_replica_is_the_busier_one() -> None:
    assert ranked({"a": 0, "b": SLACK + 1}, {"b": 9}, MARK) == ["a", "b"]
    assert ranked({"a": 5, "b": 9, "c": 7}, {"b": 9}, MARK, slack=0) == ["a", "c", "b"]


def test_what_nobody_knows_goes_to_the_least_busy_one() -> None:
    assert ranked({"a": 2, "b": 1, "c": 2}, {}, MARK)[0] == "b"
    assert ranked({}, {}, MARK) == []


def test_ties_are_decided_alike_and_spread() -> None:
    free = {"a": 0, "b": 0, "c": 0}
    firsts = [ranked(free, {}, marks_of(body(prompt=str(number))))[0] for number in range(60)]
    again = [ranked(dict(reversed(free.items())), {}, marks_of(body(prompt=str(number))))[0] for number in range(60)]
    assert firsts == again
    assert min(map(firsts.count, free)) > 8
