"""/docs: the interface on one page that needs no other one."""

from __future__ import annotations

from html import escape
from typing import Any

STYLE = (
    "body{font:15px/1.5 system-ui,sans-serif;max-width:60rem;margin:2rem auto;padding:0 1rem;color:#222;"
    "background:#fff}h2{margin-top:2rem}code{background:#eee;padding:0 .2em}table{border-collapse:collapse}"
    "td,th{text-align:left;vertical-align:top;border-bottom:1px solid #ddd;padding:.2rem .8rem .2rem 0}"
)


def docs_page(spec: dict[str, Any]) -> str:
    """HTML of an OpenAPI ``spec``: each route, and the fields of its request."""
    title = escape(f"{spec['info']['title']} {spec['info']['version']}")
    parts = [
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{title}</title>',
        f"<style>{STYLE}</style></head><body><h1>{title}</h1>",
        '<p>The same for programs: <a href="openapi.json">openapi.json</a>.</p>',
    ]
    for path, methods in spec["paths"].items():
        for method, route in methods.items():
            parts.append(f"<h2><code>{method.upper()} {escape(path)}</code></h2>")
            parts.append(f"<p>{escape(route.get('summary', ''))}. {escape(route.get('description', ''))}</p>")
            content = route.get("requestBody", {}).get("content", {})
            if "application/json" in content:
                parts.append(_table(content["application/json"]["schema"], spec["components"]["schemas"]))
    return "".join([*parts, "</body></html>"])


def _table(schema: dict[str, Any], known: dict[str, Any]) -> str:
    """The fields of a request."""
    schema = _followed(schema, known)
    needed = schema.get("required", [])
    rows = []
    for name, field in schema.get("properties", {}).items():
        told = "Needed. " * (name in needed) + field.get("description", "")
        kinds = f"<td>{escape(_kind(field))}</td>"
        rows.append(f"<tr><td><code>{escape(name)}</code></td>{kinds}<td>{escape(told)}</td></tr>")
    return f"<table><tr><th>field</th><th>type</th><th></th></tr>{''.join(rows)}</table>"


def _followed(schema: dict[str, Any], known: dict[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = known[schema["$ref"].rpartition("/")[2]] if "$ref" in schema else schema
    return found


def _kind(field: dict[str, Any]) -> str:
    """A field's type in words."""
    if "$ref" in field:
        return str(field["$ref"]).rpartition("/")[2]
    if "anyOf" in field:
        return " or ".join(dict.fromkeys(kind for one in field["anyOf"] if (kind := _kind(one)) != "null"))
    if "const" in field or "enum" in field:
        return ", ".join(map(str, field.get("enum", [field.get("const")])))
    if field.get("type") == "array":
        return f"list of {_kind(field.get('items', {}))}"
    return str(field.get("type", "anything"))
