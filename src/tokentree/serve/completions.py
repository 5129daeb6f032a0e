"""/v1/completions."""

from __future__ import annotations

from functools import partial
from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import Response

from tokentree.serve.answers import Answer, answer
from tokentree.serve.errors import BAD, ApiError, blamed
from tokentree.serve.logprobs import completion_logprobs, of_prompt, of_written
from tokentree.serve.params import check_logprobs, check_sizes, params_of, tokens_asked
from tokentree.serve.protocol import CompletionRequest
from tokentree.serve.replies import Completion, told
from tokentree.serve.service import Service, service_of
from tokentree.serve.structured import structured
from tokentree.serve.writing import Job, Planned, Update

router = APIRouter()
SHORT = 16  # new tokens where none are asked for, as in OpenAI's interface

Prompts = list[str] | list[list[int]]


@router.post("/v1/completions", summary="Continue prompts", responses=told(Completion, Completion))
async def completions(asked: CompletionRequest, request: Request) -> Response:
    """Continues each prompt ``n`` times."""
    service = service_of(request)
    service.check_model(asked.model)
    prompts = _prompts(asked)
    check_sizes(asked, service.settings, len(prompts))
    check_logprobs(asked.logprobs, "logprobs", service.settings)
    if asked.best_of not in (None, asked.n or 1):
        raise ApiError(BAD, "best_of: all samples are told here, so it can only be n", "best_of", "unsupported")
    plan, made = partial(_planned, service, asked, prompts), partial(_Completion, service, asked, prompts)
    return await answer(request, service, asked, len(prompts) * (asked.n or 1), plan, made)


def _prompts(asked: CompletionRequest) -> Prompts:
    """The prompts that ``prompt`` holds.

    Raises:
        ApiError: if it holds none.
    """
    given: Any = asked.prompt
    several = isinstance(given, list) and (not given or not isinstance(given[0], int))
    prompts: Prompts = given if several else [given]
    if not prompts or not all(prompts):
        raise ApiError(BAD, "prompt is empty: give at least one token", "prompt", "invalid_value")
    return prompts


def _planned(service: Service, asked: CompletionRequest, prompts: Prompts) -> list[Planned]:
    scored = asked.logprobs if asked.echo else None
    if scored is not None and not service.llm.engine.info.scores_prompts:
        raise ApiError(BAD, "echo: the engine gives no logprobs of a prompt here", "echo", "unsupported")
    most = tokens_asked(asked.max_tokens, "max_tokens", service.settings, SHORT, 1 if scored is None else 0)
    wanted = structured(asked, service.settings)
    params = params_of(asked, service.settings, service.texts.special, most, asked.logprobs, wanted, scored)
    with blamed("prompt"):
        plans = [Planned(service.llm.prompt_ids(prompt), params) for prompt in prompts]
    for planned in plans:
        service.check_length(planned.ids, "prompt")
    return plans


class _Completion(Answer):
    """A completion."""

    def __init__(self, service: Service, asked: CompletionRequest, prompts: Prompts, job: Job) -> None:
        self._count, self._echoes = asked.logprobs, bool(asked.echo)
        super().__init__(service, asked, job, "cmpl", ("text_completion", "text_completion"))
        decode = service.tokenizer.decode
        shown = [one if isinstance(one, str) else str(decode(one)) for one in prompts] if asked.echo else []
        self._before = shown or [""] * len(prompts)

    @property
    def has_logprobs(self) -> bool:
        return self._count is not None

    def at_once(self, update: Update) -> dict[str, Any]:
        return self.part(update, first=True)

    def part(self, update: Update, first: bool) -> dict[str, Any]:
        before, texts, logprobs = self._before[update.choice.prompt], self.service.texts, None
        if self.has_logprobs:
            told = of_written(update.tokens, texts, len(before))
            if first and self._echoes:
                told = [*of_prompt(update.choice.seq, before, texts), *told]
            logprobs = completion_logprobs(told, texts)
        return {
            "index": update.choice.index,
            "text": before * first + update.text,
            "logprobs": logprobs,
            "finish_reason": update.finish_reason,
        }
