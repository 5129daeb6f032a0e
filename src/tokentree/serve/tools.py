"""Where tools come in: what a template is told of them, and what a text calls."""

from __future__ import annotations

from typing import Any

from tokentree.serve.errors import BAD, ApiError
from tokentree.serve.protocol import ChatRequest


def check_tools(asked: ChatRequest) -> None:
    """Raises `ApiError` if a request asks for tools, which this server doesn't know."""
    for name, harmless in (("tools", ([],)), ("tool_choice", ("none",)), ("parallel_tool_calls", ())):
        value = getattr(asked, name)
        if value is not None and value not in harmless:
            raise ApiError(BAD, f"{name}: this server knows no tools", name, "unsupported")
    for number, message in enumerate(asked.messages):
        if message.tool_calls:
            param = f"messages[{number}].tool_calls"
            raise ApiError(BAD, f"{param}: this server knows no tools", param, "unsupported")


def message_of(text: str) -> dict[str, Any]:
    """The message that a model's ``text`` is."""
    return {"role": "assistant", "content": text, "refusal": None}
