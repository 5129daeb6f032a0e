"""Grammars of texts that call functions, in llguidance's dialect of Lark."""

from __future__ import annotations

import json
import re
from collections.abc import Container, Mapping
from typing import Any

from tokentree.serve.tools.formats import Format

# as `StructuredOutputs` has it: all that isn't content is certain
SPACING = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}
ANY = "/(.|\\n)*/"


def call_grammar(
    form: Format, functions: Mapping[str, Mapping[str, Any]], added: Container[str], forced: bool, several: bool,
    answer: str | None = None,
) -> str:  # fmt: skip
    """A grammar of texts with calls.

    Args:
        functions: names, and the JSON schemas of their arguments.
        added: how tokens are written that a tokenizer takes whole. A tag among them comes as that token.
        forced: whether the text is calls and nothing else. Otherwise it may be any text, with calls or without.
        several: whether there may be more than one call.
        answer: a JSON schema, as text, of a text that doesn't call. What does is then calls and nothing else.
    """

    def tag(written: str) -> str:
        return "" if not written else written if written in added else json.dumps(written)

    rules, bodies = list[str](), list[str]()
    for number, (name, schema) in enumerate(functions.items()):
        # in the pieces that JSON has: the longest piece is taken, so others would leave an answer in JSON no way
        head = (form.space + "{", '"name"', ": ", json.dumps(name), ", ", json.dumps(form.arguments), ": ")
        tail = f"{json.dumps('}' + form.space)} {tag(form.end)}"
        bodies.append(f"{' '.join(map(json.dumps, head))} arguments_{number} {tail}")
        rules.append(f"arguments_{number}: %json {_spaced(schema)}")
    begin = "" if form.bare else tag(form.begin)
    more = f"({json.dumps(form.between)} {begin} body)*" if several else ""
    rules += [f"body: {' | '.join(bodies)}", f"calls: {begin} body {more}"]
    if answer is not None:
        return "\n".join([f"start: {_first(form, added)} calls | answer", f"answer: %json {_spaced(answer)}", *rules])
    return "\n".join([*(["start: calls"] if forced else _around(form, added, several)), *rules])


def _spaced(schema: Mapping[str, Any] | str) -> str:
    """A JSON schema as text, with our spacing unless it says another."""
    return json.dumps({"x-guidance": SPACING} | dict(json.loads(schema) if isinstance(schema, str) else schema))


def _first(form: Format, added: Container[str]) -> str:
    """What may stand before the first call where calls need nothing before them."""
    return f"{form.begin}?" if form.bare and form.begin in added else ""


def _around(form: Format, added: Container[str], several: bool) -> list[str]:
    """The rules of a text around calls."""
    text = f"& ~/(.|\\n)*{re.escape(form.begin)}(.|\\n)*/"
    if form.bare:  # a text with calls begins with one
        return [f"start: OTHER | {_first(form, added)} calls", f"OTHER: /\\s*([^{{\\s](.|\\n)*)?/ {text}"]
    rules = ["start: (before body)* OTHER" if several else "start: OTHER | before body", f"OTHER: {ANY} {text}"]
    if form.begin in added:
        return [*rules, f"before: ANY {form.begin}", f"ANY: {ANY} {text}"]
    return [*rules, f"before[lazy]: /(.|\\n)*{re.escape(form.begin)}/"]
