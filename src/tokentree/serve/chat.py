"""/v1/chat/completions."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import Response

from tokentree.serve.answers import Answer, answer
from tokentree.serve.errors import BAD, ApiError, blamed
from tokentree.serve.logprobs import chat_logprobs
from tokentree.serve.messages import messages_of, text_of
from tokentree.serve.params import check_logprobs, check_sizes, params_of, tokens_asked
from tokentree.serve.protocol import ChatRequest
from tokentree.serve.replies import ChatCompletion, ChatCompletionChunk, told
from tokentree.serve.service import Service, service_of
from tokentree.serve.structured import structured
from tokentree.serve.tools.asked import tools_of
from tokentree.serve.tools.reader import CallPart, joined
from tokentree.serve.writing import Job, Planned, Update

router = APIRouter()


@router.post("/v1/chat/completions", summary="Answer messages", responses=told(ChatCompletion, ChatCompletionChunk))
async def chat_completions(asked: ChatRequest, request: Request) -> Response:
    """Answers a conversation, through the model's chat template."""
    service = service_of(request)
    service.check_model(asked.model)
    check_chat(asked, service)
    plan, made = partial(planned_chat, service, asked), partial(_Chat, service, asked)
    return await answer(request, service, asked, asked.n or 1, plan, made)


def check_chat(asked: ChatRequest, service: Service) -> None:
    """Raises `ApiError` if a request asks for what there isn't, as far as that is known without the model."""
    check_sizes(asked, service.settings, 1)
    check_logprobs(asked.top_logprobs, "top_logprobs", service.settings)
    if asked.top_logprobs is not None and not asked.logprobs:
        raise ApiError(BAD, "top_logprobs needs logprobs: set it to true", "top_logprobs", "invalid_value")
    if len(asked.messages) > service.settings.messages:
        most = service.settings.messages
        raise ApiError(BAD, f"messages: this server takes at most {most} messages", "messages", "too_many")
    if None not in (asked.max_tokens, asked.max_completion_tokens) and asked.max_tokens != asked.max_completion_tokens:
        raise ApiError(
            BAD, "max_tokens is another word for max_completion_tokens: give one of them", "max_tokens",
            "invalid_value",
        )  # fmt: skip


def planned_chat(service: Service, asked: ChatRequest) -> list[Planned]:
    """The prompt of a request.

    Raises:
        ApiError, OptionError: if there can be none.
    """
    llm = service.llm
    tools = tools_of(asked, service.settings, service.tokenizer, service.texts.special)
    with blamed("messages"):
        messages = messages_of(asked.messages, service.tokenizer.chat_template)
        ids = llm.chat_prompt(messages, tools.told if tools else ())
    service.check_length(ids, "messages")
    name = "max_tokens" if asked.max_completion_tokens is None else "max_completion_tokens"
    most = tokens_asked(getattr(asked, name), name, service.settings, llm.engine.info.context - len(ids))
    logprobs = (asked.top_logprobs or 0) if asked.logprobs else None
    wanted = tools.wanted if tools else structured(asked, service.settings)
    params = params_of(asked, service.settings, service.texts.special, most, logprobs, wanted)
    predicted = text_of(asked.prediction.content) if asked.prediction is not None else None
    references = [llm.prompt_ids(predicted)] if predicted else []
    return [Planned(ids, params, references, tools.reader if tools else None)]


class _Chat(Answer):
    """An answer in a chat."""

    def __init__(self, service: Service, asked: ChatRequest, job: Job) -> None:
        self._has_logprobs = bool(asked.logprobs)
        super().__init__(service, asked, job, "chatcmpl", ("chat.completion", "chat.completion.chunk"))

    @property
    def has_logprobs(self) -> bool:
        return self._has_logprobs

    def begin(self) -> list[dict[str, Any]]:
        return [self._choice(Update(choice), "delta", _message("", [])) for choice in self.job.choices]

    def at_once(self, update: Update) -> dict[str, Any]:
        return self._choice(update, "message", _message(update.text, update.calls))

    def part(self, update: Update, first: bool) -> dict[str, Any]:
        said: dict[str, Any] = {"content": update.text} if update.text else {}
        if update.calls:
            said["tool_calls"] = [_call_delta(part) for part in joined(update.calls)]
        return self._choice(update, "delta", said)

    def _choice(self, update: Update, name: str, said: dict[str, Any]) -> dict[str, Any]:
        told = self.has_logprobs and (update.tokens or name == "message")
        logprobs = chat_logprobs(update.tokens, self.service.texts) if told else None
        return {"index": update.choice.index, name: said, "logprobs": logprobs, "finish_reason": update.finish_reason}


def _message(text: str, calls: Sequence[CallPart]) -> dict[str, Any]:
    """The model's message."""
    message = {"role": "assistant", "content": text or (None if calls else ""), "refusal": None}
    if not calls:
        return message
    return message | {"tool_calls": [_call(part) for part in joined(calls)]}


def _call(part: CallPart) -> dict[str, Any]:
    return {"id": part.id, "type": "function", "function": {"name": part.name, "arguments": part.arguments}}


def _call_delta(part: CallPart) -> dict[str, Any]:
    if part.id is None:
        return {"index": part.index, "function": {"arguments": part.arguments}}
    return {"index": part.index} | _call(part)
