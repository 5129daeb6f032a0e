"""What a request to /v1/responses may say."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Discriminator, Field, Tag, ValidationError, ValidatorFunctionWrapHandler, field_validator

from tokentree.serve.protocol import (
    Asked,
    Body,
    FunctionChoice,
    FunctionName,
    JsonSchema,
    Missing,
    Retention,
    Speculation,
    Usual,
)

Status = Literal["in_progress", "completed", "incomplete"]


class Part(Asked):
    """A part of a content."""

    type: Literal["input_text", "output_text"]
    text: str
    annotations: list[Any] | None = Field(None, max_length=0)
    logprobs: list[Any] | None = Field(None, max_length=0)


Parts = Annotated[list[Part], Field(fail_fast=True)]


class MessageItem(Asked):
    """A message."""

    type: Literal["message"] = "message"
    role: Literal["system", "developer", "user", "assistant"]
    content: str | Parts
    id: str | None = None
    status: Status | None = None


class CallItem(Asked):
    """A call of an earlier answer."""

    type: Literal["function_call"]
    call_id: str
    name: FunctionName
    arguments: str
    id: str | None = None
    status: Status | None = None


class ResultItem(Asked):
    """What a call gave."""

    type: Literal["function_call_output"]
    call_id: str
    output: str | Parts
    id: str | None = None
    status: Status | None = None


KINDS = {"message": "a message", "function_call": "a call", "function_call_output": "a result"}


def _kind(item: Any) -> str | None:
    """Which kind of item this is: what has no type is a message."""
    kind = item.get("type", "message") if isinstance(item, dict) else getattr(item, "type", None)
    return KINDS.get(kind) if isinstance(kind, str) else None


Item = Annotated[
    Annotated[MessageItem, Tag("a message")]
    | Annotated[CallItem, Tag("a call")]
    | Annotated[ResultItem, Tag("a result")],
    Discriminator(
        _kind, custom_error_type="item", custom_error_message="it must be a message, a function_call or its output"
    ),
]


class FlatTool(Asked):
    """A function that the model may call."""

    type: Literal["function"]
    name: FunctionName
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class FlatNamedTool(FunctionChoice):
    """The tool that has to be called."""

    type: Literal["function"]


class Format(JsonSchema):
    """What the text has to be; the other fields belong to the type json_schema."""

    type: Literal["text", "json_object", "json_schema"]
    name: str | None = Field(None, max_length=64, pattern="^[a-zA-Z0-9_-]+$")  # type: ignore[assignment]
    schema_: dict[str, Any] | None = Field(None, alias="schema")  # type: ignore[assignment]


class TextOptions(Asked):
    """How the text is written."""

    format: Format | None = None
    verbosity: Usual | None = None


class Reasoning(Asked):
    """How the model reasons: as it does."""

    effort: Usual | None = None
    summary: Missing = None
    generate_summary: Missing = None


class ObfuscationOptions(Asked):
    """How a stream is written."""

    include_obfuscation: Literal[False] | None = None


class ResponsesRequest(Body):
    """A request to /v1/responses. A field that is null is left to the server."""

    model: str | None = Field(None, description="The name of the model, as /v1/models has it.")
    input: str | Annotated[list[Item], Field(fail_fast=True)] = Field(
        description="A text, or messages, calls and their results."
    )
    instructions: str | None = Field(None, description="A first message of the system.")
    max_output_tokens: int | None = Field(None, description="The most new tokens.")
    temperature: float | None = Field(None, description="0 is greedy.")
    top_p: float | None = Field(None, description="Draw from the most probable tokens whose mass reaches this.")
    top_k: int | None = Field(None, description="Draw from the k most probable tokens; 0 or -1: from all.")
    min_p: float | None = Field(None, description="Draw from tokens at least this times as probable as the best.")
    seed: int | None = Field(None, description="The same seed gives the same text.")
    speculation: Speculation | Literal["off"] | None = Field(None, description="Another way to draft, or none.")
    text: TextOptions | None = None
    tools: Annotated[list[FlatTool], Field(fail_fast=True)] | None = Field(
        None, description="Functions that the model may call."
    )
    tool_choice: Literal["none", "auto", "required"] | FlatNamedTool | None = None
    parallel_tool_calls: bool | None = Field(None, description="False: at most one call.")
    stream: bool | None = None
    stream_options: ObfuscationOptions | None = None
    metadata: dict[str, str] | None = Field(None, description="Told again in the answer.")
    user: str | None = Field(None, description="Accepted, and not used.")
    safety_identifier: str | None = Field(None, description="Accepted, and not used.")
    prompt_cache_key: str | None = Field(None, description="Accepted, and not used: prefixes are always looked up.")
    store: bool | None = Field(None, description="false: nothing is stored.")
    previous_response_id: str | None = Field(None, description="null: nothing is stored.")
    background: Literal[False] | None = None
    truncation: Literal["disabled"] | None = None
    service_tier: Literal["auto", "default"] | None = None
    include: list[str] | None = Field(None, max_length=0)
    max_tool_calls: int | None = Field(None, description="Accepted, and not used: the server calls no tools itself.")
    prompt_cache_retention: Retention | None = Field(None, description="Accepted, and not used.")
    reasoning: Reasoning | None = None
    top_logprobs: Literal[0] | None = None
    access_programs: Missing = None
    background_options: Missing = None
    context_management: Missing = None
    conversation: Missing = None
    image: Missing = None
    moderation: Missing = None
    prompt: Missing = None
    prompt_cache_options: Missing = None

    @field_validator("tool_choice", mode="wrap")
    @classmethod
    def _choice_in_words(cls, value: Any, handler: ValidatorFunctionWrapHandler) -> Any:
        try:
            return handler(value)
        except ValidationError:
            raise ValueError('it must be "none", "auto", "required", or the name of a function') from None

    @field_validator("store")
    @classmethod
    def _stores_nothing(cls, value: bool | None) -> bool | None:
        if value:
            raise ValueError("this server stores no responses: leave it out, or set it to false")
        return value

    @field_validator("previous_response_id")
    @classmethod
    def _knows_none(cls, value: str | None) -> None:
        if value is not None:
            raise ValueError("this server stores no responses: send the whole conversation as input")
