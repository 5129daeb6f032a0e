"""A request to /v1/responses as a request of a chat."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from tokentree.serve.errors import BAD, ApiError
from tokentree.serve.protocol import (
    CalledFunction,
    ChatRequest,
    Function,
    FunctionChoice,
    JsonSchema,
    Message,
    NamedTool,
    ResponseFormat,
    TextPart,
    Tool,
    ToolCall,
)
from tokentree.serve.responses.protocol import (
    CallItem,
    FlatNamedTool,
    Format,
    MessageItem,
    Part,
    ResponsesRequest,
    ResultItem,
)

SAME = (
    "model", "temperature", "top_p", "top_k", "min_p", "seed", "speculation", "parallel_tool_calls", "stream",
)  # fmt: skip
FIELDS = {"messages": "input", "max_completion_tokens": "max_output_tokens", "response_format": "text.format"}


def chat_of(asked: ResponsesRequest) -> ChatRequest:
    """The request of a chat that means the same.

    Raises:
        ApiError: if there is nothing to answer, or a format lacks its schema.
    """
    messages = _messages(asked)
    if not messages:
        raise ApiError(BAD, "input is empty: give at least one message", "input", "invalid_value")
    tools, choice = asked.tools or [], asked.tool_choice
    functions = [
        Function(name=tool.name, description=tool.description, parameters=tool.parameters, strict=tool.strict)
        for tool in tools
    ]
    form = asked.text.format if asked.text is not None else None
    return ChatRequest(
        messages=messages, max_completion_tokens=asked.max_output_tokens,
        tools=[Tool(type="function", function=function) for function in functions],
        tool_choice=_named(choice) if isinstance(choice, FlatNamedTool) else choice,
        response_format=_format(form) if form is not None else None,
        **{name: getattr(asked, name) for name in SAME},
    )  # fmt: skip


def _named(choice: FlatNamedTool) -> NamedTool:
    return NamedTool(type="function", function=FunctionChoice(name=choice.name))


def _messages(asked: ResponsesRequest) -> list[Message]:
    """The conversation. Calls that follow one another are one message."""
    found = [] if asked.instructions is None else [Message(role="system", content=asked.instructions)]
    if isinstance(asked.input, str):
        return [*found, Message(role="user", content=asked.input)]
    for item in asked.input:
        if isinstance(item, MessageItem):
            found.append(Message(role=item.role, content=_parts(item.content)))
        elif isinstance(item, ResultItem):
            found.append(Message(role="tool", content=_parts(item.output), tool_call_id=item.call_id))
        elif found and found[-1].role == "assistant":
            found[-1].tool_calls = [*(found[-1].tool_calls or []), _call(item)]
        else:
            found.append(Message(role="assistant", tool_calls=[_call(item)]))
    return found


def _call(item: CallItem) -> ToolCall:
    return ToolCall(id=item.call_id, function=CalledFunction(name=item.name, arguments=item.arguments))


def _parts(content: str | Sequence[Part]) -> str | list[TextPart]:
    return content if isinstance(content, str) else [TextPart(type="text", text=part.text) for part in content]


def _format(given: Format) -> ResponseFormat:
    schema = None
    if given.type == "json_schema":
        if given.name is None or given.schema_ is None:
            raise ApiError(BAD, "text.format needs a name and a schema", "text.format", "missing_field")
        schema = JsonSchema(
            name=given.name, schema=given.schema_, description=given.description, strict=given.strict
        )  # fmt: skip
    elif given.name is not None or given.schema_ is not None:
        raise ApiError(BAD, f"text.format: the type {given.type} has no schema", "text.format", "invalid_value")
    return ResponseFormat(type=given.type, json_schema=schema)


@contextmanager
def told_of_fields() -> Iterator[None]:
    """What is wrong with a chat in this block is told of the field here that means the same."""
    try:
        yield
    except ApiError as error:
        param = error.param or ""
        if param.startswith("messages["):  # numbers of messages are none of items
            error.message = error.message.replace(f"{param}: ", "")
        name = next((name for name in FIELDS if param.startswith(name)), None)
        if name is not None:
            error.message, error.param = error.message.replace(name, FIELDS[name]), FIELDS[name]
        elif param.startswith("tool"):
            error.message = error.message.replace(".function", "")
            error.param = param.replace(".function", "")
        raise
