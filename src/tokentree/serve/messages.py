"""Messages of a request as a chat template takes them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from tokentree.serve.errors import BAD, ApiError
from tokentree.serve.protocol import Message, TextPart, ToolCall


def messages_of(messages: Sequence[Message], template: object) -> list[dict[str, Any]]:
    """The messages with content as text. A developer is the system to a ``template`` that doesn't name any.

    Raises:
        ApiError: if the arguments of a call are no JSON object.
    """
    names_developers = "developer" in str(template)
    found = []
    for number, message in enumerate(messages):
        one = message.model_dump(
            exclude_none=True, exclude={"refusal", "audio", "function_call", "annotations", "tool_calls"}
        )
        if message.tool_calls:
            one["tool_calls"] = [
                _called(call, f"messages[{number}].tool_calls[{place}]")
                for place, call in enumerate(message.tool_calls)
            ]
        one["content"] = text_of(message.content)
        if message.role == "developer" and not names_developers:
            one["role"] = "system"
        found.append(one)
    return found


def _called(call: ToolCall, param: str) -> dict[str, Any]:
    """A call as templates take it, with its arguments as an object.

    Raises:
        ApiError: if they are none.
    """
    said = call.function.arguments
    try:
        arguments = json.loads(said) if said.strip() else {}
    except (ValueError, RecursionError):
        arguments = None
    if not isinstance(arguments, dict):
        param = f"{param}.function.arguments"
        raise ApiError(BAD, f"{param}: the arguments of a call are a JSON object, as text", param, "invalid_value")
    return {"id": call.id, "type": "function", "function": {"name": call.function.name, "arguments": arguments}}


def text_of(content: str | Sequence[TextPart] | None) -> str | None:
    """The text of a content."""
    if content is None or isinstance(content, str):
        return content
    return "".join(part.text for part in content)
