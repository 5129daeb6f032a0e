"""Tokens that stand for words of a grammar: text, and what a grammar names."""

from __future__ import annotations

from functools import cache

import pytest
from tokenizers import AddedToken

from tests.tiny_models import tiny_tokenizer
from tokentree import OptionError, StructuredOutputs
from tokentree.grammars.compiler import Grammars
from tokentree.grammars.guide import Guide

EOS = 0


@cache
def grammars() -> Grammars:
    """Of a tokenizer with the added token <call>, which is text, and special ones."""
    tokenizer = tiny_tokenizer()
    tokenizer.add_tokens([AddedToken("<call>", special=False, normalized=False)])
    return Grammars(tokenizer)


def guide(**wanted: object) -> Guide:
    return grammars().guide(StructuredOutputs(**wanted), frozenset({EOS}))  # type: ignore[arg-type]


def id_of(token: str) -> int:
    found = grammars()._tokenizer.convert_tokens_to_ids(token)  # type: ignore[union-attr]
    assert isinstance(found, int)
    return found


def forced_text(of: Guide) -> tuple[list[int], str]:
    """The tokens that must come, without the end, and their text with special tokens written out."""
    path = of.forced([], 99)
    assert path[-1] == EOS
    return path[:-1], str(grammars()._tokenizer.decode(path[:-1]))  # type: ignore[union-attr]


def test_an_added_token_is_the_text_that_it_stands_for() -> None:
    call = id_of("<call>")
    for wanted in ({"regex": "<call>one"}, {"choice": ["<call>one"]}, {"grammar": 'start: "<call>one" // <call>'}):
        path, text = forced_text(guide(**wanted))
        assert path[0] == call
        assert text == "<call>one"
    for wanted in ({"choice": ["<call>", "two"]}, {"regex": "[<>a-z]*"}, {"grammar": "start: /<.*/"}):
        assert guide(**wanted).allows([], call)
    within = {"type": "object", "properties": {"a": {"type": "string"}}, "required": ["a"]}
    opened = guide(json=within)
    assert opened.allows(opened.forced([], 99), call)


def test_a_grammar_may_name_an_added_token() -> None:
    named = guide(grammar='start: (<call> "a")+ # don"t')
    call, a = id_of("<call>"), id_of("a")
    assert named.forced([], 2) == [call, a]
    assert not named.allows([], id_of("<"))
    assert named.allows([call, a], call)
    assert not named.allows([call], id_of("<"))
    assert named.allows([call, a], EOS)  # back and forth


@pytest.mark.parametrize(
    "wanted", [{"regex": r"<\|end\|>b"}, {"choice": ["<|user|>"]}, {"grammar": 'start: "<|end|>"'}]
)
def test_a_special_token_that_is_spelled_out_is_text(wanted: dict[str, object]) -> None:
    path, text = forced_text(guide(**wanted))
    assert min(path) > id_of("<|assistant|>")
    assert text in ("<|end|>b", "<|user|>", "<|end|>")
    assert not guide(**wanted).allows([], EOS)


def test_a_grammar_may_name_a_special_token() -> None:
    assert forced_text(guide(grammar='start: <|user|> "one"'))[0][0] == id_of("<|user|>")


@pytest.mark.parametrize(
    "wanted",
    [
        {"json": {"type": "integer", "multipleOf": 62_615_533}},
        {"json": {"allOf": [{"multipleOf": 7919}, {"multipleOf": 7907}]}},
        {"json": {"anyOf": [{"multipleOf": 0.001}, {"type": "array", "items": {"multipleOf": 1000}}]}},
        {"grammar": 'start: "a" %json {"\\u006dultipleOf": 6.2615533e7}'},
    ],
)
def test_too_many_remainders_are_refused(wanted: dict[str, object]) -> None:
    with pytest.raises(OptionError, match="multipleOf with more than 100000 remainders"):
        StructuredOutputs(**wanted)  # type: ignore[arg-type]


def test_some_remainders_are_taken() -> None:
    prices = {"type": "number", "multipleOf": 0.01, "minimum": 1, "maximum": 5}
    for schema in (prices, {"multipleOf": 2.5}, {"allOf": [prices, {"multipleOf": 1000}]}, {"multipleOf": 0}):
        StructuredOutputs(json=schema)
    assert guide(json={"type": "integer", "multipleOf": 1e5}).allows([], id_of("0"))
    with pytest.raises(OptionError, match="what follows %json in the grammar is no JSON"):
        StructuredOutputs(grammar='start: %json {"multipleOf": ')
