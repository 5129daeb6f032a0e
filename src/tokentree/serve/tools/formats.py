"""How a text calls a function."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Format:
    """The form of a call, ``{"name": "…", "arguments": {…}}`` with something around it.

    Args:
        begin: what stands before the JSON.
        end: what stands behind it.
        space: white space between these and the JSON, as templates show it.
        arguments: the key of the arguments.
        between: what separates two calls.
        bare: whether a call needs no ``begin`` where a text begins, and behind another call.
    """

    begin: str
    end: str
    space: str
    arguments: str
    between: str
    bare: bool


FORMATS = {
    "hermes": Format("<tool_call>", "</tool_call>", "\n", "arguments", "\n", bare=False),
    "llama3": Format("<|python_tag|>", "", "", "parameters", "; ", bare=True),
}
AUTO = "auto"


def format_of(template: str, name: str = AUTO) -> Format | None:
    """The format of that ``name``; by default the one that a chat ``template`` speaks of, or None."""
    if name != AUTO:
        return FORMATS[name]
    if "<tool_call>" in template and "<function=" not in template:  # that is another one, in XML
        return FORMATS["hermes"]
    if "<|python_tag|>" in template or '"parameters": dictionary' in template:
        return FORMATS["llama3"]
    return None
