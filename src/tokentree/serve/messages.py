"""Messages of a request as a chat template takes them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from tokentree.serve.protocol import Message, TextPart


def messages_of(messages: Sequence[Message], template: object) -> list[dict[str, Any]]:
    """The messages with content as text. A developer is the system to a ``template`` that doesn't name any."""
    names_developers = "developer" in str(template)
    found = []
    for message in messages:
        one = message.model_dump(exclude_none=True, exclude={"refusal", "audio", "function_call", "annotations"})
        one["content"] = text_of(message.content)
        if message.role == "developer" and not names_developers:
            one["role"] = "system"
        found.append(one)
    return found


def text_of(content: str | Sequence[TextPart] | None) -> str | None:
    """The text of a content."""
    if content is None or isinstance(content, str):
        return content
    return "".join(part.text for part in content)
