"""What answers say, for those who read the interface. Answers are made elsewhere; tests hold them to this."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict

Status = Literal["in_progress", "completed", "incomplete"]
FinishReason = Literal["stop", "length", "tool_calls"]


class Reply(BaseModel):
    """A part of an answer."""

    model_config = ConfigDict(extra="forbid", strict=True)


class Error(Reply):
    """Why there is no answer."""

    message: str
    type: str
    param: str | None
    code: str | None


class ErrorReply(Reply):
    """Any error."""

    error: Error


class CachedTokens(Reply):
    """Tokens of the prompt whose KV was there already."""

    cached_tokens: int


class Usage(Reply):
    """Tokens."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: CachedTokens


class SpeculativeDecoding(Reply):
    """What speculation gained."""

    mean_acceptance_length: float
    draft_acceptance_rate: float
    acceptance_histogram: dict[str, int]
    num_spec_steps: int
    num_accepted_draft_tokens: int
    num_draft_tokens: int
    accepted_by_drafter: dict[str, int]


class RequestMetrics(Reply):
    """Figures of one request."""

    speculative_decoding: SpeculativeDecoding


class Node(Reply):
    """A token of a tree."""

    token: int
    text: str
    parent: int
    log_prob: float
    drafters: list[str]
    accepted: bool


class Bonus(Reply):
    """The token that the model added itself."""

    token: int
    text: str


class Tree(Reply):
    """What one step drafted."""

    nodes: list[Node]
    bonus: Bonus


class Choice(Reply):
    """One text, or a part of it."""

    index: int
    finish_reason: FinishReason | None
    token_ids: list[int] | None = None
    prompt_token_ids: list[int] | None = None
    trees: list[Tree] | None = None


class CompletionLogprobs(Reply):
    """Log-probabilities, a list with an entry for each token. The first token of a prompt has none."""

    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float] | None]
    text_offset: list[int]


class CompletionChoice(Choice):
    """One text of a completion, or a part of it."""

    text: str
    logprobs: CompletionLogprobs | None


class Answered(Reply):
    """What all answers have. In a part of an answer ``usage`` and ``metrics`` are those of the last one."""

    id: str
    created: int
    model: str
    usage: Usage | None = None
    metrics: RequestMetrics | None = None


class Completion(Answered):
    """The answer of /v1/completions; when streaming, each event."""

    object: Literal["text_completion"]
    choices: list[CompletionChoice]


class TopLogprob(Reply):
    """The log-probability of a token."""

    token: str
    logprob: float
    bytes: list[int]


class TokenLogprob(TopLogprob):
    """That of a token of the text, and the most probable ones at its place."""

    top_logprobs: list[TopLogprob]


class ChatLogprobs(Reply):
    """Log-probabilities."""

    content: list[TokenLogprob]
    refusal: None


class Called(Reply):
    """What is called."""

    name: str | None = None
    arguments: str


class Call(Reply):
    """A call of a function. In a stream its first part has ``id``, ``type`` and the name, and each a piece of the
    arguments."""

    index: int | None = None
    id: str | None = None
    type: Literal["function"] | None = None
    function: Called


class ReplyMessage(Reply):
    """The model's message."""

    role: Literal["assistant"]
    content: str | None
    refusal: None
    tool_calls: list[Call] | None = None


class Delta(Reply):
    """A part of it; the first one has the role."""

    role: Literal["assistant"] | None = None
    content: str | None = None
    refusal: None = None
    tool_calls: list[Call] | None = None


class ChatChoice(Choice):
    """One answer."""

    message: ReplyMessage
    logprobs: ChatLogprobs | None


class ChatPart(Choice):
    """A part of one answer."""

    delta: Delta
    logprobs: ChatLogprobs | None


class ChatCompletion(Answered):
    """The answer of /v1/chat/completions."""

    object: Literal["chat.completion"]
    choices: list[ChatChoice]


class ChatCompletionChunk(Answered):
    """When streaming, each event of it."""

    object: Literal["chat.completion.chunk"]
    choices: list[ChatPart]


class OutputText(Reply):
    """The text of a message."""

    type: Literal["output_text"]
    text: str
    annotations: list[Any]
    logprobs: list[Any]


class OutputMessage(Reply):
    """A message of a response."""

    type: Literal["message"]
    id: str
    role: Literal["assistant"]
    status: Status
    content: list[OutputText]


class OutputCall(Reply):
    """A call of a response."""

    type: Literal["function_call"]
    id: str
    call_id: str
    name: str
    arguments: str
    status: Status


class OutputTokens(Reply):
    """Tokens of the text that aren't told."""

    reasoning_tokens: int


class ResponseUsage(Reply):
    """Tokens."""

    input_tokens: int
    input_tokens_details: CachedTokens
    output_tokens: int
    output_tokens_details: OutputTokens
    total_tokens: int


class IncompleteDetails(Reply):
    """Why a response isn't whole."""

    reason: Literal["max_output_tokens"]


class ResponseReply(Reply):
    """The answer of /v1/responses."""

    id: str
    object: Literal["response"]
    created_at: int
    status: Status
    error: None
    incomplete_details: IncompleteDetails | None
    instructions: str | None
    max_output_tokens: int | None
    model: str
    output: list[OutputMessage | OutputCall]
    parallel_tool_calls: bool
    temperature: float
    top_p: float
    tool_choice: str | dict[str, str]
    tools: list[dict[str, Any]]
    text: dict[str, Any]
    metadata: dict[str, str]
    store: Literal[False]
    previous_response_id: None
    background: Literal[False]
    truncation: Literal["disabled"]
    user: str | None
    usage: ResponseUsage | None
    metrics: RequestMetrics | None


class ResponseEvent(Reply):
    """When streaming, each event of it; the other fields are those that OpenAI's interface has for its type."""

    model_config = ConfigDict(extra="allow")

    type: str
    sequence_number: int
    response: ResponseReply | None = None


class Model(Reply):
    """A model that is served."""

    id: str
    object: Literal["model"]
    created: int
    owned_by: str
    max_model_len: int


class Models(Reply):
    """All of them."""

    object: Literal["list"]
    data: list[Model]


class Tokenized(Reply):
    """The tokens of a text."""

    count: int
    max_model_len: int
    tokens: list[int]
    token_strs: list[str] | None = None


class Detokenized(Reply):
    """The text of tokens."""

    prompt: str


class Version(Reply):
    """The version of tokentree."""

    version: str


ERRORS: dict[int | str, dict[str, Any]] = {
    "4XX": {"model": ErrorReply, "description": "The request can't be honoured."},
    "5XX": {"model": ErrorReply, "description": "The server can't answer, or not now."},
}


def told(whole: type[Reply], part: type[Reply] | None = None, last: str = "[DONE]") -> dict[int | str, dict[str, Any]]:
    """What a route answers: ``whole``, events that are ``part`` each, or errors."""
    found: dict[str, Any] = {"model": whole, "description": whole.__doc__}
    if part is not None:
        schema = {
            "description": f"Events, each a {part.__name__}, or an error.{f' The last one is {last}.' if last else ''}",
            "type": "object",
            "properties": {name: {"type": "string"} for name in ("event", "data")},
            "required": ["data"],
        }
        found["content"] = {"text/event-stream": {"schema": schema}}
    return {200: found, **ERRORS}
