"""/v1/responses."""

from __future__ import annotations

from functools import partial

from fastapi import APIRouter, Request
from fastapi import Response as HttpResponse

from tokentree.serve.answers import answer
from tokentree.serve.chat import check_chat, planned_chat
from tokentree.serve.replies import ResponseEvent, ResponseReply, told
from tokentree.serve.responses.answer import Response
from tokentree.serve.responses.chats import chat_of, told_of_fields
from tokentree.serve.responses.protocol import ResponsesRequest
from tokentree.serve.service import service_of

router = APIRouter()


@router.post("/v1/responses", summary="Answer an input", responses=told(ResponseReply, ResponseEvent, last=""))
async def responses(asked: ResponsesRequest, request: Request) -> HttpResponse:
    """Answers a text or a conversation, through the model's chat template. Nothing is stored."""
    service = service_of(request)
    service.check_model(asked.model)
    with told_of_fields():
        chat = chat_of(asked)
        check_chat(chat, service)
        plan, made = partial(planned_chat, service, chat), partial(Response, service, asked)
        return await answer(request, service, chat, 1, plan, made)
