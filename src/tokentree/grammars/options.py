"""What a text has to be: a JSON schema, a regular expression, one of several texts, or a grammar."""

from __future__ import annotations

import json as json_of
import math
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, fields
from decimal import Decimal
from fractions import Fraction
from typing import Any

from pydantic import BaseModel

from tokentree.errors import OptionError

LARGEST = 1 << 17  # characters of a schema, an expression or a grammar: the largest ones take a second or two
MOST_QUANTIFIERS = 1000  # ?, *, +, {n} and {n,m}: time and memory grow with their square
QUANTIFIER = re.compile(r"[?*+]|\{\d")
MOST_REMAINDERS = 100_000  # a digit goes on from each remainder of a multipleOf: so many take half a second
JSON_PART = re.compile(r"%json\s*(?=\{)")
DEEPEST = 64  # levels of objects and arrays in a schema


@dataclass(frozen=True)
class StructuredOutputs:
    """What a text has to be. Exactly one of these is given.

    Args:
        json: a JSON schema, as a dict or as JSON text, or a pydantic model. Properties are written in the order in
            which the schema has them, with ", " and ": " between them and without any other white space.
            ``"x-guidance": {"whitespace_flexible": true}`` in the schema allows any white space.
        regex: a regular expression in the syntax of Rust's ``regex`` crate, which the whole text matches. There are no
            look-arounds and no back-references.
        choice: texts, one of which is written.
        grammar: a context-free grammar in llguidance's dialect of Lark, which begins at ``start``.
        json_object: True: any JSON object.

    Raises:
        OptionError: if none or several of them are given, or one isn't what it has to be. Whether a schema, an
            expression or a grammar can be compiled is known once there is a tokenizer.
    """

    json: Any = None
    regex: str | None = None
    choice: tuple[str, ...] | list[str] | None = None
    grammar: str | None = None
    json_object: bool = False

    def __post_init__(self) -> None:
        if not isinstance(self.json_object, bool):
            raise OptionError(f"structured_outputs: json_object={self.json_object!r} is neither True nor False")
        given = [one.name for one in fields(self) if self._has(one.name)]
        if len(given) != 1:
            names = "json, regex, choice, grammar, json_object"
            raise OptionError(
                f"structured_outputs takes exactly one of {names}, and has {' and '.join(given) or 'none'}"
            )
        for name in ("regex", "grammar"):
            text = getattr(self, name)
            if text is not None:
                _check_text(text, name)
                _check_quantifiers([text], name)
        if self.grammar is not None:
            _check_multiples(_schemas_in(self.grammar), "grammar")
        if self.choice is not None:
            object.__setattr__(self, "choice", _texts(self.choice))
        if self.json is not None:
            object.__setattr__(self, "json", _schema(self.json))
        if sum(map(len, self.choice or ())) > LARGEST:
            raise OptionError(f"structured_outputs: the choices have more than {LARGEST} characters")

    def _has(self, name: str) -> bool:
        value = getattr(self, name)
        return value if name == "json_object" else value is not None

    @classmethod
    def of(cls, given: Any) -> StructuredOutputs:
        """``given``, or what a mapping says by these names.

        Raises:
            OptionError: if it is neither.
        """
        if isinstance(given, cls):
            return given
        known = {one.name for one in fields(cls)}
        if not isinstance(given, dict) or not all(isinstance(name, str) for name in given):
            raise OptionError(f"structured_outputs is StructuredOutputs(...) or a dict, not {type(given).__name__}")
        if odd := sorted(set(given) - known):
            raise OptionError(f"structured_outputs has no {odd[0]}: it takes one of {', '.join(sorted(known))}")
        return cls(**given)

    @property
    def source(self) -> tuple[str, str]:
        """The kind of grammar ("json", "regex" or "lark"), and its text."""
        if self.grammar is not None:
            return "lark", self.grammar
        if self.regex is not None:
            return "regex", self.regex
        if self.choice is not None:
            return "regex", "|".join(f"({''.join(map(_literal, text))})" for text in self.choice)
        return "json", '{"type": "object"}' if self.json_object else self.json


def _literal(char: str) -> str:
    """An expression that matches ``char`` alone."""
    return char if char.isascii() and char.isalnum() else f"\\x{{{ord(char):x}}}"


def _check_text(text: Any, name: str) -> None:
    if not isinstance(text, str):
        raise OptionError(f"structured_outputs: {name} is a text, not {type(text).__name__}")
    if not text:
        raise OptionError(f"structured_outputs: {name} is empty")
    if len(text) > LARGEST:
        raise OptionError(f"structured_outputs: {name} has {len(text)} characters, and {LARGEST} is the most")
    if any("\ud800" <= char <= "\udfff" for char in text):
        raise OptionError(f"structured_outputs: {name} holds half of a character")


def _check_quantifiers(expressions: Iterable[str], name: str) -> None:
    count = sum(len(QUANTIFIER.findall(text)) for text in expressions)
    if count > MOST_QUANTIFIERS:
        raise OptionError(f"structured_outputs: {name} has {count} quantifiers, and {MOST_QUANTIFIERS} is the most")


def _check_multiples(schemas: Iterable[Any], name: str) -> None:
    """Refuses ``multipleOf`` that together have too many remainders, counted in the last decimal place of any."""
    found = [value for schema in schemas for part in _objects(schema) for value in [part.get("multipleOf")]]
    numbers = [value for value in found if isinstance(value, int | float) and not isinstance(value, bool)]
    steps = [Decimal(repr(number)).normalize() for number in numbers if number > 0]
    places = max((-int(step.as_tuple().exponent) for step in steps), default=0)
    if math.lcm(*(int(Fraction(step) * 10 ** max(0, places)) for step in steps)) > MOST_REMAINDERS:
        raise OptionError(
            f"structured_outputs: {name} has multipleOf with more than {MOST_REMAINDERS} remainders together"
        )


def _schemas_in(grammar: str) -> list[Any]:
    """The JSON schemas in a grammar."""
    decoder = json_of.JSONDecoder(parse_constant=_refuse_constant)
    try:
        return [decoder.raw_decode(grammar, found.end())[0] for found in JSON_PART.finditer(grammar)]
    except (ValueError, RecursionError) as error:
        said = str(error).splitlines()[0]
        raise OptionError(f"structured_outputs: what follows %json in the grammar is no JSON: {said}") from None


def _objects(schema: Any) -> Iterator[dict[str, Any]]:
    """The objects in a schema."""
    waiting = [schema]
    while waiting:
        value = waiting.pop()
        if isinstance(value, dict):
            waiting += value.values()
            yield value
        elif isinstance(value, list):
            waiting += value


def _expressions(schema: Any) -> Iterator[str]:
    """The regular expressions in a schema."""
    for part in _objects(schema):
        if isinstance(pattern := part.get("pattern"), str):
            yield pattern
        if isinstance(patterns := part.get("patternProperties"), dict):
            yield from patterns


def _texts(choice: Any) -> tuple[str, ...]:
    if isinstance(choice, str) or not isinstance(choice, list | tuple) or not choice:
        raise OptionError("structured_outputs: choice is a list of at least one text")
    for text in choice:
        _check_text(text, "a choice")
    return tuple(choice)


def _schema(schema: Any) -> str:
    """A JSON schema as text."""
    if isinstance(schema, type) and issubclass(schema, BaseModel):
        schema = schema.model_json_schema()
    if isinstance(schema, str):
        _check_text(schema, "json")
        try:
            schema = json_of.loads(schema, parse_constant=_refuse_constant)
        except (ValueError, RecursionError) as error:
            raise OptionError(f"structured_outputs: json is no JSON: {str(error).splitlines()[0]}") from None
    if schema is True:  # any value
        schema = {}
    if schema is False:
        raise OptionError("structured_outputs: the JSON schema allows no value")
    if not isinstance(schema, dict):
        raise OptionError(f"structured_outputs: a JSON schema is an object, not {type(schema).__name__}")
    if is_deeper(schema, DEEPEST):
        raise OptionError(f"structured_outputs: the JSON schema has more than {DEEPEST} levels")
    try:
        text = json_of.dumps(schema, ensure_ascii=False, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise OptionError(f"structured_outputs: the schema can't be written as JSON: {error}") from None
    _check_text(text, "json")
    known = json_of.loads(text)
    _check_quantifiers(_expressions(known), "the JSON schema")
    _check_multiples([known], "the JSON schema")
    return text


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is no JSON")


def is_deeper(value: Any, levels: int) -> bool:
    """Whether objects and arrays lie in one another on more than so many levels."""
    layer = {id(value): value}
    for _ in range(levels + 1):
        nested = [one for one in layer.values() if isinstance(one, dict | list | tuple)]
        layer = {id(inner): inner for one in nested for inner in (one.values() if isinstance(one, dict) else one)}
        if not nested:
            return False
    return any(isinstance(one, dict | list | tuple) for one in layer.values())
