"""What requests may say. Unknown fields are errors."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Annotated, Any, Literal

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationError,
    ValidatorFunctionWrapHandler,
    field_validator,
    model_validator,
)
from pydantic_core import PydanticCustomError

MOST_VALUES = 1 << 16  # of a body: each takes some microseconds of the one thread that answers all
FunctionName = Annotated[str, Field(max_length=64, pattern="^[a-zA-Z0-9_-]+$")]
Texts = Annotated[list[str], Field(fail_fast=True)]
Ids = Annotated[list[int], Field(fail_fast=True)]
Role = Literal["system", "developer", "user", "assistant", "tool"]


def _refused(value: Any) -> None:
    if value is not None:
        raise ValueError("this server doesn't have it: leave it out")


Missing = Annotated[None, BeforeValidator(_refused)]  # a field of OpenAI's interface that is null alone
Usual = Literal["medium"]  # what OpenAI's interface has by default: as if it was left out
Retention = Literal["in-memory", "in_memory", "24h"]


class Asked(BaseModel):
    """A part of a request. Texts are no numbers, and numbers no texts."""

    model_config = ConfigDict(extra="forbid", strict=True)


class Body(Asked):
    """A whole request. It is looked through before its fields are: they take much longer."""

    @model_validator(mode="before")
    @classmethod
    def _looked_through(cls, value: Any) -> Any:
        look_through(value)
        return value


def look_through(value: Any) -> None:
    """Looks at all values of JSON.

    Raises:
        PydanticCustomError: if there are more than `MOST_VALUES`, numbers in lists not counted, or one is a text or a
            key that can't be written in UTF-8 (it holds a lone surrogate). Its context says the ``place`` of that.
    """
    waiting: list[tuple[tuple[str | int, ...], Any]] = [((), value)]
    count = 0
    while waiting:
        place, one = waiting.pop()
        texts: Iterable[Any] = ()
        if isinstance(one, str):
            texts = (one,)
        elif isinstance(one, dict):
            texts, count = one, count + len(one)
            inner: Iterable[tuple[Any, Any]] = one.items()
        elif isinstance(one, list) and set(map(type, one)) != {int}:
            count += len(one)
            inner = enumerate(one)
        else:
            continue
        if any(map(_is_broken, texts)):
            raise PydanticCustomError("half_character", "it holds half of a character", {"place": place})
        if count > MOST_VALUES:
            raise PydanticCustomError("values", "the body has too many values", {"place": ()})
        if not isinstance(one, str):
            waiting += [((*place, key), each) for key, each in inner]


def _is_broken(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return True
    return False


class StreamOptions(Asked):
    """How a stream is written."""

    include_usage: bool | None = Field(None, description="A last chunk tells usage and metrics.")
    include_obfuscation: Literal[False] | None = None


class Speculation(Asked):
    """Another way to draft, for this request."""

    drafter: str | None = Field(None, description="A drafter's name, or several joined by '+'.")
    shape: str | None = Field(None, description="How trees grow: cost, 2x2x2, chain:4, dynamic:nodes=16, ….")


class JsonSchema(Asked):
    """A schema and its name. Texts always fit the schema, so ``strict`` changes nothing."""

    name: str = Field(max_length=64, pattern="^[a-zA-Z0-9_-]+$")
    description: str | None = None
    schema_: dict[str, Any] = Field(alias="schema")
    strict: bool | None = None


class ResponseFormat(Asked):
    """What a text has to be, as OpenAI's interface has it."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None


class StructuredRequest(Asked):
    """What a text has to be, as vLLM's interface has it: one of these."""

    json_: dict[str, Any] | str | None = Field(None, alias="json", description="A JSON schema.")
    regex: str | None = Field(None, description="A regular expression.")
    choice: Texts | None = Field(None, description="Texts, one of which is written.")
    grammar: str | None = Field(None, description="A context-free grammar in llguidance's dialect of Lark.")
    json_object: bool | None = Field(None, description="True: any JSON object.")

    @field_validator("json_", mode="wrap")
    @classmethod
    def _json_in_words(cls, value: Any, handler: ValidatorFunctionWrapHandler) -> Any:
        try:
            return handler(value)
        except ValidationError:
            raise ValueError("it must be a JSON schema, as an object or as text") from None


class Sampled(Body):
    """What completions and chats have in common. A field that is null is left to the server."""

    model: str | None = Field(None, description="The name of the model, as /v1/models has it.")
    max_tokens: int | None = Field(None, description="The most new tokens.")
    min_tokens: int | None = Field(None, description="The text doesn't end before so many new tokens.")
    temperature: float | None = Field(None, description="0 is greedy.")
    top_p: float | None = Field(None, description="Draw from the most probable tokens whose mass reaches this.")
    top_k: int | None = Field(None, description="Draw from the k most probable tokens; 0 or -1: from all.")
    min_p: float | None = Field(None, description="Draw from tokens at least this times as probable as the best.")
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    repetition_penalty: float | None = None
    logit_bias: dict[str, float] | None = Field(None, description="Token id: number added to its logit.")
    n: int | None = Field(None, description="Samples for each prompt.")
    seed: int | None = Field(None, description="The same seed gives the same text.")
    stop: str | Texts | None = Field(None, description="Strings that end the text; they are cut off.")
    stop_token_ids: Ids | None = Field(None, description="Tokens that end the text.")
    ignore_eos: bool | None = Field(None, description="Go on behind the model's own end token.")
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    user: str | None = Field(None, description="Accepted, and not used.")
    speculation: Speculation | Literal["off"] | None = Field(None, description="Another way to draft, or none.")
    return_tree: bool | None = Field(None, description="The answer carries the tree of each step.")
    return_token_ids: bool | None = Field(None, description="The answer carries token ids.")
    response_format: ResponseFormat | None = Field(None, description="What the text has to be.")
    structured_outputs: StructuredRequest | None = Field(None, description="The same with more kinds.")

    @field_validator("speculation", mode="wrap")
    @classmethod
    def _speculation_in_words(cls, value: Any, handler: ValidatorFunctionWrapHandler) -> Any:
        try:
            return handler(value)
        except ValidationError:
            raise ValueError('it must be "off", or an object with drafter and shape') from None

    @field_validator("stop", mode="wrap")
    @classmethod
    def _stop_in_words(cls, value: Any, handler: ValidatorFunctionWrapHandler) -> Any:
        try:
            return handler(value)
        except ValidationError:
            raise ValueError("it must be a text or a list of texts") from None


class CompletionRequest(Sampled):
    """A request to /v1/completions."""

    prompt: str | Texts | Ids | Annotated[list[Ids], Field(fail_fast=True)] = Field(
        description="A text, token ids, or a list of texts or of token ids."
    )
    logprobs: int | None = Field(None, description="How many of the most probable tokens are told at each place.")
    echo: bool | None = Field(None, description="The answer begins with the prompt, and so do logprobs.")
    best_of: int | None = Field(None, description="As n: all samples are told.")
    suffix: Literal[""] | None = None

    @field_validator("prompt", mode="wrap")
    @classmethod
    def _prompt_in_words(cls, value: Any, handler: ValidatorFunctionWrapHandler) -> Any:
        try:
            return handler(value)
        except ValidationError:
            raise ValueError("it must be a text, token ids, or a list of texts or of token ids") from None


class TextPart(Asked):
    """A part of a content."""

    type: Literal["text"]
    text: str


Parts = Annotated[list[TextPart], Field(fail_fast=True)]


class Function(Asked):
    """A function that the model may call."""

    name: FunctionName
    description: str | None = None
    parameters: dict[str, Any] | None = Field(None, description="A JSON schema of its arguments; null: it has none.")
    strict: bool | None = Field(None, description="Arguments always fit the schema.")


class Tool(Asked):
    """A tool."""

    type: Literal["function"]
    function: Function


class FunctionChoice(Asked):
    """The name of a function."""

    name: FunctionName


class NamedTool(Asked):
    """The tool that has to be called."""

    type: Literal["function"]
    function: FunctionChoice


class CalledFunction(Asked):
    """What was called."""

    name: FunctionName
    arguments: str = Field(description="A JSON object, as text.")


class ToolCall(Asked):
    """A call of an earlier answer."""

    id: str
    type: Literal["function"] = "function"
    function: CalledFunction
    index: int | None = None


class Message(Asked):
    """A message of a conversation."""

    role: Role
    content: str | Parts | None = None
    name: str | None = None
    tool_calls: Annotated[list[ToolCall], Field(fail_fast=True)] | None = None
    tool_call_id: str | None = None
    # what a client sends back of an earlier answer
    refusal: None = None
    audio: None = None
    function_call: None = None
    annotations: list[Any] | None = Field(None, max_length=0)


class Prediction(Asked):
    """A text that the answer may copy from: it is drafted from, and changes no token."""

    type: Literal["content"]
    content: str | Parts


class ChatRequest(Sampled):
    """A request to /v1/chat/completions."""

    messages: Annotated[list[Message], Field(fail_fast=True)] = Field(min_length=1)
    max_completion_tokens: int | None = Field(None, description="The most new tokens.")
    logprobs: bool | None = Field(None, description="Log-probabilities of the new tokens.")
    top_logprobs: int | None = Field(None, description="How many of the most probable tokens are told at each place.")
    prediction: Prediction | None = None
    tools: Annotated[list[Tool], Field(fail_fast=True)] | None = Field(
        None, description="Functions that the model may call."
    )
    tool_choice: Literal["none", "auto", "required"] | NamedTool | None = Field(
        None, description="Whether it may call, has to call, or which function."
    )
    parallel_tool_calls: bool | None = Field(None, description="False: at most one call.")
    metadata: dict[str, str] | None = Field(None, description="Accepted, and not used.")
    store: Literal[False] | None = Field(None, description="Nothing is stored.")
    service_tier: Literal["auto", "default"] | None = None
    modalities: list[Literal["text"]] | None = None
    safety_identifier: str | None = Field(None, description="Accepted, and not used.")
    prompt_cache_key: str | None = Field(None, description="Accepted, and not used: prefixes are always looked up.")
    prompt_cache_retention: Retention | None = Field(None, description="Accepted, and not used.")
    reasoning_effort: Usual | None = None
    verbosity: Usual | None = None
    functions: list[Any] | None = Field(None, max_length=0)
    function_call: Literal["none"] | None = None
    audio: Missing = None
    moderation: Missing = None
    prompt_cache_options: Missing = None
    web_search_options: Missing = None

    @field_validator("tool_choice", mode="wrap")
    @classmethod
    def _choice_in_words(cls, value: Any, handler: ValidatorFunctionWrapHandler) -> Any:
        try:
            return handler(value)
        except ValidationError:
            raise ValueError('it must be "none", "auto", "required", or the name of a function') from None


class TokenizeRequest(Body):
    """A request to /tokenize: a text or messages."""

    model: str | None = None
    prompt: str | None = None
    messages: Annotated[list[Message], Field(fail_fast=True)] | None = None
    add_special_tokens: bool | None = Field(None, description="Whether a text gets the tokens that begin one.")
    return_token_strs: bool | None = None


class DetokenizeRequest(Body):
    """A request to /detokenize."""

    model: str | None = None
    tokens: Ids = Field(max_length=1 << 18)


def fields() -> set[str]:
    """The names of all fields of all requests."""
    kinds, found = [Asked], set[str]()
    while kinds:
        kind = kinds.pop()
        kinds += kind.__subclasses__()
        found |= {field.alias or name for name, field in kind.model_fields.items()}
    return found
