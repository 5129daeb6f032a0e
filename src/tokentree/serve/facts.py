"""Routes that tell about the server and its model: models, tokens, version, health, metrics."""

from __future__ import annotations

from importlib.metadata import version
from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse, PlainTextResponse, Response
from prometheus_client import CONTENT_TYPE_LATEST

from tokentree.serve.errors import BAD, NOT_FOUND, NOT_READY, ApiError, blamed
from tokentree.serve.messages import messages_of
from tokentree.serve.protocol import DetokenizeRequest, TokenizeRequest
from tokentree.serve.replies import ERRORS, Detokenized, Model, Models, Tokenized, Version, told
from tokentree.serve.service import Service, service_of

router = APIRouter()


@router.head("/health", include_in_schema=False)
@router.get("/health", summary="Whether the server answers", response_class=Response)
async def health() -> Response:
    """Answers at once, also while the model is being loaded."""
    return Response()


@router.head("/ready", include_in_schema=False)
@router.get("/ready", summary="Whether requests are taken", response_class=Response, responses=ERRORS)
async def ready(request: Request) -> Response:
    """The status is 200, or 503 while the model is being loaded and at the end."""
    service = service_of(request)
    if service.state == "draining":
        raise ApiError(NOT_READY, "the server is shutting down", code="shutting_down")
    assert service.backends
    return Response()


@router.get("/version", summary="The version of the server", responses=told(Version), response_model=None)
async def server_version() -> dict[str, str]:
    """The version of tokentree."""
    return {"version": version("tokentree")}


@router.get("/metrics", summary="Figures for Prometheus", response_class=PlainTextResponse, responses=ERRORS)
async def metrics(request: Request) -> Response:
    """All figures, in Prometheus' text format."""
    return Response(service_of(request).metrics.scrape(), media_type=CONTENT_TYPE_LATEST)


@router.get("/v1/models", summary="The models", responses=told(Models), response_model=None)
async def models(request: Request) -> dict[str, Any]:
    """The one model that is served."""
    return {"object": "list", "data": [_model(service_of(request))]}


@router.get("/v1/models/{name:path}", summary="A model", responses=told(Model), response_model=None)
async def model(name: str, request: Request) -> dict[str, Any]:
    """The model of that name."""
    service = service_of(request)
    if name != service.settings.model_name:
        raise ApiError(NOT_FOUND, f"there is no model {name!r} here: see /v1/models", "model", "model_not_found")
    return _model(service)


def _model(service: Service) -> dict[str, Any]:
    return {
        "id": service.settings.model_name,
        "object": "model",
        "created": service.created,
        "owned_by": "tokentree",
        "max_model_len": service.llm.engine.info.context,
    }


@router.post("/tokenize", summary="Texts to tokens", responses=told(Tokenized))
def tokenize(asked: TokenizeRequest, request: Request) -> Response:
    """The tokens of a text, or of messages in the chat template."""
    service = service_of(request)
    service.check_model(asked.model)
    tokenizer = service.tokenizer
    if (asked.prompt is None) == (asked.messages is None):
        raise ApiError(BAD, "give either prompt or messages", "prompt", "invalid_value")
    if asked.messages is not None:
        if asked.add_special_tokens is not None:
            raise ApiError(
                BAD, "add_special_tokens is for a text: messages have those of the template", "add_special_tokens",
                "invalid_value",
            )  # fmt: skip
        with blamed("messages"):
            ids = service.llm.chat_prompt(messages_of(asked.messages, tokenizer.chat_template))
    else:
        special = asked.add_special_tokens is not False
        ids = list(tokenizer(asked.prompt, add_special_tokens=special).input_ids)
    names = {"token_strs": [service.texts.text(token) for token in ids]} if asked.return_token_strs else {}
    return JSONResponse({"count": len(ids), "max_model_len": service.llm.engine.info.context, "tokens": ids} | names)


@router.post("/detokenize", summary="Tokens to a text", responses=told(Detokenized))
def detokenize(asked: DetokenizeRequest, request: Request) -> Response:
    """The text of tokens, special ones included."""
    service = service_of(request)
    service.check_model(asked.model)
    size = service.llm.engine.vocab_size
    if wrong := [token for token in asked.tokens if not 0 <= token < size]:
        raise ApiError(BAD, f"tokens: {wrong[0]} is outside the vocabulary of {size}", "tokens", "invalid_value")
    return JSONResponse({"prompt": str(service.tokenizer.decode(asked.tokens))})
