"""Are texts under JSON schemas valid, and those of plain decoding? What do the masks cost?

    python benchmarks/schemas.py MODEL [--heads DIR] [--requests 200] [--max-tokens 256] [--out FILE]

Each of 20 schemas is asked for in turn, with another prompt each time: greedily, with a seed, and with a penalty. Each
text is written with trees and plainly under the same schema. It is checked by `fits`, which knows nothing of grammars.
The seconds of masks are those inside `Guide`. Exit status 1 if any text is invalid or another one than plain's.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

from rich.progress import Progress

from tokentree import LLM, Result, SamplingParams
from tokentree.grammars.guide import Guide

Schema = dict[str, Any]


def _object(**properties: Schema) -> Schema:
    return {"type": "object", "properties": properties, "required": [*properties], "additionalProperties": False}


def _text(most: int = 24, least: int = 1) -> Schema:
    return {"type": "string", "minLength": least, "maxLength": most}


def _number(least: int, most: int) -> Schema:
    return {"type": "integer", "minimum": least, "maximum": most}


def _list(items: Schema, most: int = 3, least: int = 1) -> Schema:
    return {"type": "array", "items": items, "minItems": least, "maxItems": most}


def _pattern(pattern: str) -> Schema:
    return {"type": "string", "pattern": pattern}


_TREE = _object(value=_number(0, 9), children=_list({"$ref": "#/$defs/leaf"}, 2, 0))
SCHEMAS: dict[str, Schema] = {
    "flat": _object(name=_text(), age=_number(0, 120)),
    "enum": {"enum": ["red", "green", "blue", "a longer one", 7, None, True]},
    "enums": _object(color={"enum": ["red", "green"]}, size={"enum": ["S", "M", "L", "XL"]}, sold={"type": "boolean"}),
    "nested": _object(user=_object(address=_object(city=_text(), zip=_pattern("^[0-9]{5}$")))),
    "list": _list(_text(12), 4, 2),
    "list_of_objects": _list(_object(id=_number(1, 99), tag={"enum": ["new", "old"]})),
    "date": _object(date=_pattern("^[0-9]{4}-(0[1-9]|1[0-2])-[0-3][0-9]$")),
    "email": _object(email=_pattern("^[a-z]{1,8}@[a-z]{1,8}\\.(com|org|net)$")),
    "union": {"anyOf": [_object(circle=_number(1, 9)), _object(square=_number(1, 9), unit={"enum": ["cm", "m"]})]},
    "tagged": {
        "anyOf": [
            _object(kind={"const": "cat"}, lives=_number(1, 9)),
            _object(kind={"const": "dog"}, tricks=_list(_text(10))),
        ]
    },
    "types": _object(value={"type": ["integer", "null", "boolean"]}),
    "optional": {**_object(id=_number(0, 9), note=_text(), flag={"type": "boolean"}), "required": ["id"]},
    "unicode_keys": _object(**{"имя": _text(12), "città": {"enum": ["Köln", "São Paulo", "北京"]}}),
    "unicode_text": _object(greeting=_pattern("^(Grüße|Привет|こんにちは)[ !]$")),
    "recursive": {"$defs": {"leaf": _object(value=_number(0, 9))}, **_TREE},
    "price": _object(price=_pattern("^[0-9]{1,3}\\.[0-9]{2}$"), paid={"type": ["null", "boolean"]}),
    "bounds": _object(xs=_list(_number(0, 100), 5, 3), s=_text(9, 3)),
    "long_keys": _object(customer_identification_number=_number(1, 9999), shipping_country={"enum": ["DE", "FR"]}),
    "wide": _object(**{f"field_{i}": [{"type": "boolean"}, _number(0, 9), {"type": "null"}][i % 3] for i in range(12)}),
    "call": _object(name={"const": "get_weather"}, arguments=_object(city=_text(16), unit={"enum": ["C", "F"]})),
}  # fmt: skip
PROMPTS = (
    "Write one example as JSON.", "Answer in JSON.", "Describe a customer.", "What is in the basket?", "Call the tool.",
    "Give me a record, and nothing else.", "Make up some data about an animal.", "Fill in the form.",
    "List what you know.", "Say hello.",
)  # fmt: skip
WAYS: dict[str, dict[str, Any]] = {
    "greedy": {}, "seeded": {"temperature": 0.9, "top_p": 0.95, "seed": 11}, "penalised": {"repetition_penalty": 1.1},
}  # fmt: skip
KINDS: dict[str, Callable[[Any], bool]] = {
    "object": lambda value: isinstance(value, dict), "array": lambda value: isinstance(value, list),
    "string": lambda value: isinstance(value, str), "null": lambda value: value is None,
    "boolean": lambda value: isinstance(value, bool),
    "integer": lambda value: isinstance(value, int) and not isinstance(value, bool),
    "number": lambda value: isinstance(value, int | float) and not isinstance(value, bool),
}  # fmt: skip


def fits(value: Any, schema: Schema, root: Schema | None = None) -> bool:
    """Whether ``value`` is what ``schema`` says, of the keywords that are used here."""
    root = schema if root is None else root
    if "$ref" in schema:
        return fits(value, root["$defs"][schema["$ref"].removeprefix("#/$defs/")], root)
    kinds = schema.get("type", [])
    if kinds and not any(KINDS[kind](value) for kind in ([kinds] if isinstance(kinds, str) else kinds)):
        return False
    said = json.dumps(value)
    checks = [
        "enum" not in schema or said in map(json.dumps, schema["enum"]),
        "const" not in schema or said == json.dumps(schema["const"]),
        "anyOf" not in schema or any(fits(value, one, root) for one in schema["anyOf"]),
    ]
    if isinstance(value, str):
        checks += [schema.get("minLength", 0) <= len(value) <= schema.get("maxLength", len(value))]
        checks += [re.search(schema.get("pattern", ""), value) is not None]
    if KINDS["number"](value):
        checks += [schema.get("minimum", value) <= value <= schema.get("maximum", value)]
    if isinstance(value, list):
        checks += [schema.get("minItems", 0) <= len(value) <= schema.get("maxItems", len(value))]
        checks += [fits(one, schema.get("items", {}), root) for one in value]
    if isinstance(value, dict):
        known = schema.get("properties", {})
        checks += [set(schema.get("required", ())) <= set(value)]
        checks += [schema.get("additionalProperties", True) is not False or set(value) <= set(known)]
        checks += [fits(one, known[name], root) for name, one in value.items() if name in known]
    return all(checks)


def is_valid(result: Result, schema: Schema) -> bool:
    """Whether the text of ``result`` is finished, and JSON that fits."""
    try:
        return result.finish_reason == "stop" and fits(json.loads(result.text), schema)
    except ValueError:
        return False


class Clock:
    """The seconds inside the methods of `Guide` that compute."""

    def __init__(self) -> None:
        self.seconds, self.masks = 0.0, 0
        for name in ("follow", "allowed", "forced", "completes"):
            setattr(Guide, name, self._timed(getattr(Guide, name)))
        computed = Guide._computed

        def counted(guide: Guide, path: Any) -> Any:
            self.masks += 1
            return computed(guide, path)

        Guide._computed = counted  # type: ignore[method-assign,assignment]

    def _timed(self, method: Callable[..., Any]) -> Callable[..., Any]:
        def timed(*given: Any) -> Any:
            started = time.perf_counter()
            try:
                return method(*given)
            finally:
                self.seconds += time.perf_counter() - started

        return timed


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--heads", type=Path)
    parser.add_argument("--requests", type=int, default=200)
    parser.add_argument("--max-tokens", type=int, default=256)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()

    llm = LLM(options.model, heads=options.heads)
    clock = Clock()
    ways = {"plain": llm.plain(), "tree": llm}
    invalid, different = list[list[str]](), list[list[str]]()
    figures = {name: Counter[str]() for name in ways}
    names, kinds = [*SCHEMAS], [*WAYS]
    with Progress(disable=not sys.stderr.isatty()) as bar:
        task = bar.add_task("schemas", total=options.requests)
        for turn in range(options.requests):
            name, kind = names[turn % len(names)], kinds[(turn // len(names)) % len(kinds)]
            prompt = PROMPTS[(turn + turn // len(names)) % len(PROMPTS)]
            params = SamplingParams(
                max_tokens=options.max_tokens, structured_outputs={"json": SCHEMAS[name]}, **WAYS[kind]
            )
            ids = llm.chat_prompt([{"role": "user", "content": prompt}])
            texts = dict[str, list[int]]()
            for way, model in ways.items():
                clock.seconds, clock.masks = 0.0, 0
                result = model.generate([ids], params)[0]
                texts[way] = result.token_ids
                if not is_valid(result, SCHEMAS[name]):
                    invalid.append([way, name, kind, prompt, result.finish_reason, result.text])
                metrics = result.metrics
                figures[way].update({
                    "tokens": metrics.new_tokens, "forwards": metrics.target_forwards, "masks": clock.masks,
                    "mask_microseconds": int(1e6 * clock.seconds),
                    "decode_microseconds": int(1e6 * metrics.decode_seconds),
                    **{f"accepted_{source}": count for source, count in metrics.accepted_by_source.items()},
                })  # fmt: skip
            if texts["plain"] != texts["tree"]:
                different.append([name, kind, prompt])
            bar.advance(task)
    found = {
        "requests": options.requests, "schemas": len(SCHEMAS), "invalid": invalid, "different": different,
        **{
            way: {
                **counts,
                "mask_microseconds_per_token": round(counts["mask_microseconds"] / max(1, counts["tokens"]), 1),
                "mask_share_of_decoding": round(counts["mask_microseconds"] / max(1, counts["decode_microseconds"]), 4),
                "tokens_per_forward": round(counts["tokens"] / max(1, counts["forwards"]), 2),
            }
            for way, counts in figures.items()
        },
    }  # fmt: skip
    print(json.dumps(found, indent=1, ensure_ascii=False))
    if options.out:
        options.out.write_text(json.dumps(found, indent=1, ensure_ascii=False), encoding="utf-8")
    sys.exit(bool(invalid or different))


if __name__ == "__main__":
    main()
