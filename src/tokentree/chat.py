"""Messages, and the template that makes a prompt of them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from tokentree.errors import PromptError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Message = dict[str, Any]
ROLES = ("system", "user", "assistant", "tool", "developer")  # others are for templates that name them
FORM = '[{"role": "user", "content": "…"}]'


def is_message(given: Any) -> bool:
    """Whether this is a message rather than a prompt: a mapping with a role, or an object with role and content."""
    if isinstance(given, Mapping):
        return "role" in given or ("content" in given and "input_ids" not in given)
    return hasattr(given, "role") and hasattr(given, "content")


def read_messages(given: Any) -> list[Message]:
    """A conversation as templates take it: mappings and objects with role and content, whose content is text. Parts of
    text are joined.

    Raises:
        PromptError: if it is none, with the number of the message that is wrong.
    """
    if isinstance(given, Mapping) and "messages" in given:
        given = given["messages"]
    if isinstance(given, str | bytes):
        raise PromptError(f"chat takes messages, {FORM}, and not a text: use generate for one")
    if is_message(given):
        given = [given]
    if not isinstance(given, Iterable) or isinstance(given, Mapping | set | frozenset):
        raise PromptError(f"chat takes messages, {FORM}, and not {type(given).__name__}")
    messages = [_message(one, number) for number, one in enumerate(given, start=1)]
    if not messages:
        raise PromptError(f"there is no message: give at least one, {FORM}")
    return messages


def chat_ids(
    tokenizer: PreTrainedTokenizerBase | None, messages: list[Message], tools: Sequence[Mapping[str, Any]] = ()
) -> list[int]:
    """The token ids of ``messages`` in the tokenizer's template, open for the model's answer.

    Args:
        tools: what the model may call, ``{"type": "function", "function": {…}}`` each; the template tells it of them.

    Raises:
        PromptError: if there is no template, or it refuses the messages.
    """
    if tokenizer is None or not tokenizer.chat_template:
        raise PromptError(
            "this model's tokenizer has no chat template: give a plain prompt instead, or use a model that was made "
            "for chats, often called -Instruct or -chat"
        )
    template = template_of(tokenizer, bool(tools))
    for number, message in enumerate(messages, start=1):
        role = message["role"]
        if role not in ROLES and f"'{role}'" not in template and f'"{role}"' not in template:
            raise PromptError(f"message {number} has the unknown role {role!r}: use {', '.join(ROLES)}")
    ids = _applied(tokenizer, _seen_by(tokenizer, messages, tools), tools, tokenize=True)
    return [int(token) for token in ids]


def template_of(tokenizer: PreTrainedTokenizerBase, with_tools: bool = False) -> str:
    """The chat template that is used: of several, the one for tools or the default.

    Raises:
        PromptError: if none is the default.
    """
    template = tokenizer.chat_template or ""
    if isinstance(template, str):
        return template
    if with_tools and "tool_use" in template:
        return str(template["tool_use"])
    if "default" not in template:
        raise PromptError(
            f"this model's tokenizer has the chat templates {', '.join(sorted(template))} and no default: set the "
            "tokenizer's chat_template to one of them"
        )
    return str(template["default"])


def _seen_by(
    tokenizer: PreTrainedTokenizerBase, messages: list[Message], tools: Sequence[Mapping[str, Any]]
) -> list[Message]:
    """``messages`` with text as parts, if the template sees it only there: it is told by what the last one says."""
    said = messages[-1]["content"].strip()
    if said in _applied(tokenizer, messages, tools, tokenize=False):
        return messages
    parts: list[Message] = [one | {"content": [{"type": "text", "text": one["content"]}]} for one in messages]
    try:
        return parts if said in _applied(tokenizer, parts, tools, tokenize=False) else messages
    except PromptError:
        return messages


def _applied(
    tokenizer: PreTrainedTokenizerBase, messages: list[Message], tools: Sequence[Mapping[str, Any]], tokenize: bool
) -> Any:
    from jinja2 import TemplateError

    try:
        return tokenizer.apply_chat_template(
            messages, tools=[dict(tool) for tool in tools] or None, add_generation_prompt=True, tokenize=tokenize,
            return_dict=False,
        )  # fmt: skip
    except (TemplateError, TypeError, ValueError, LookupError, AttributeError, ArithmeticError, RuntimeError) as error:
        said = (str(error).splitlines() or [type(error).__name__])[0]
        raise PromptError(f"the model's chat template refuses these messages: {said}") from None


def _message(given: Any, number: int) -> Message:
    what = f"message {number}"
    if isinstance(given, Mapping):
        message = dict(given)
    elif is_message(given):
        message = {"role": given.role, "content": given.content}
        if calls := getattr(given, "tool_calls", None):
            message["tool_calls"] = calls
    else:
        raise PromptError(f"{what} is {_called(given)}: write {FORM[1:-1]}")
    role = message.get("role")
    if not isinstance(role, str) or not role:
        raise PromptError(f"{what} has no role: write {FORM[1:-1]}")
    message["content"] = _content(message, what)
    return message


def _content(message: Message, what: str) -> str:
    content = message.get("content")
    if content is None and message.get("tool_calls"):
        return ""
    if isinstance(content, list | tuple):
        content = "".join(_part(part, what) for part in content)
    if not isinstance(content, str):
        told = "no content" if content is None else f"{_called(content)} for content"
        raise PromptError(f"{what} has {told}: it must be text")
    return whole(content, f"content of {what}")


def _part(part: Any, what: str) -> str:
    """The text of a part of a content."""
    if isinstance(part, str):
        return part
    if not isinstance(part, Mapping) or not isinstance(part.get("type"), str):
        raise PromptError(f'{what} has a part that is {_called(part)}: write {{"type": "text", "text": "…"}}')
    if part["type"] != "text":
        raise PromptError(f"{what} has a part of the type {part['type']!r}: this library reads text alone")
    if not isinstance(part.get("text"), str):
        raise PromptError(f"{what} has a part of the type 'text' without text")
    return str(part["text"])


def whole(text: str, what: str) -> str:
    """``text``, if all of its characters are whole.

    Raises:
        PromptError: if there is half of one (a lone surrogate).
    """
    try:
        text.encode()
    except UnicodeEncodeError as error:
        half = ascii(text[error.start])
        raise PromptError(f"the {what} holds half of a character, {half} at {error.start}: it is not text") from None
    return str(text)


def _called(given: Any) -> str:
    return "None" if given is None else f"of the type {type(given).__name__}"
