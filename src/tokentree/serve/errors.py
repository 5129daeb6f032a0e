"""Errors as OpenAI's interface tells them: ``{"error": {"message", "type", "param", "code"}}``."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from http import HTTPStatus
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException

from tokentree.errors import ForkError, ModelError, OptionError, PromptError, StepError, TokenTreeError
from tokentree.serve.protocol import MOST_VALUES, fields

LOG = logging.getLogger("tokentree.serve")

BAD, UNKNOWN_KEY, NOT_FOUND, TOO_SLOW, TOO_LARGE, PACKED, TOO_MANY, GONE, BROKEN, NOT_READY, TOO_LATE = (
    400, 401, 404, 408, 413, 415, 429, 499, 500, 503, 504,
)  # fmt: skip
TYPES = {429: "rate_limit_error", 500: "server_error", 503: "server_error", 504: "timeout_error"}
CODES = {
    400: "invalid_json",  # whatever else is wrong with a request has a code of its own
    404: "not_found",
    405: "method_not_allowed",
    408: "body_timeout",
    413: "request_too_large",
    415: "compressed_body",
    500: "internal_error",
}


LONGEST, LONGEST_NAME = 500, 200  # characters of a message and of a field's name: requests choose what is in them


class ApiError(Exception):
    """What a client is told instead of an answer.

    Args:
        status: the HTTP status.
        message: one sentence.
        param: the field that is wrong.
        code: a word for programs.
        retry_after: the seconds after which it is worth asking again.
    """

    def __init__(
        self, status: int, message: str, param: str | None = None, code: str | None = None,
        retry_after: int | None = None,
    ) -> None:  # fmt: skip
        super().__init__(message)
        self.status, self.message = status, _one_line(message, LONGEST)
        self.param = None if param is None else _one_line(param, LONGEST_NAME)
        self.code = code or CODES.get(status)
        self.headers = {} if retry_after is None else {"Retry-After": str(retry_after)}
        if status == TOO_SLOW:  # the rest of the body would be taken for another request
            self.headers["Connection"] = "close"

    @property
    def body(self) -> dict[str, Any]:
        """The JSON of the answer."""
        kind = TYPES.get(self.status, "invalid_request_error")
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}

    @property
    def response(self) -> JSONResponse:
        """The answer."""
        return JSONResponse(self.body, self.status, self.headers)


def _one_line(text: str, most: int) -> str:
    """``text`` on one line, with dots in its midst where it is longer than ``most``."""
    text = " ".join(text.split("\n"))
    return text if len(text) <= most else f"{text[: most // 2]} … {text[3 - most // 2 :]}"


def api_error(error: Exception) -> ApiError:
    """What a client is told of ``error``."""
    if isinstance(error, ApiError):
        return error
    if isinstance(error, OptionError):
        return ApiError(BAD, str(error), error.option, "invalid_value")
    if isinstance(error, TokenTreeError) and not isinstance(error, StepError | ModelError | ForkError):
        return ApiError(BAD, str(error), code="invalid_value")
    if isinstance(error, TokenTreeError):
        return ApiError(BROKEN, str(error))
    LOG.error("a request failed", exc_info=error)
    return ApiError(BROKEN, "the server failed: its log says why")


@contextmanager
def blamed(param: str) -> Iterator[None]:
    """What is wrong with a prompt in this block is told of the field ``param``."""
    try:
        yield
    except PromptError as error:
        raise ApiError(BAD, str(error), param, "invalid_value") from None


def _of_validation(found: Sequence[Mapping[str, Any]]) -> ApiError:
    """Of all that is wrong, what lies deepest in the first field that is."""
    first = [one for one in found if one["loc"][:2] == found[0]["loc"][:2]]
    one = max(first, key=lambda error: len(error["loc"]))
    place, said = list(one["loc"][1:]), str(one["msg"]).removeprefix("Value error, ")
    if one["type"] == "json_invalid":
        return ApiError(BAD, f"the body is not JSON: {one['ctx']['error']}", code="invalid_json")
    if one["type"] == "half_character":
        place = list(one["ctx"]["place"])
    if one["type"] == "values":
        return ApiError(BAD, f"the body has more than {MOST_VALUES} values", code="too_many")
    if not place:
        return ApiError(BAD, "the body must be a JSON object, with the content type application/json")
    unknown = one["type"] == "extra_forbidden"
    known = fields()
    parts = [part for part in place if isinstance(part, int) or part in known]  # the others name kinds
    parts += place[-1:] * (unknown and place[-1] not in known)
    param = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in parts).lstrip(".")
    if unknown:
        return ApiError(BAD, f"{param} is not a field that this server knows", param, "unknown_field")
    if one["type"] == "missing":
        return ApiError(BAD, f"{param} is missing", param, "missing_field")
    return ApiError(BAD, f"{param}: {said[:1].lower() + said[1:]}", param, "invalid_value")


async def _answer(_: Request, error: Exception) -> JSONResponse:
    if isinstance(error, RequestValidationError):
        return _of_validation(error.errors()).response
    if isinstance(error, HTTPException):
        return of_http(error).response
    return api_error(error).response


def of_http(error: HTTPException) -> ApiError:
    """What a client is told of an ``error`` of the framework."""
    known = {
        BAD: "the body can't be read",
        NOT_FOUND: "there is no such page",
        405: "this page takes other methods",
        TOO_SLOW: "the body of the request didn't come in time",
        TOO_LARGE: "the body of the request is larger than this server takes",
    }
    told = ApiError(error.status_code, known.get(error.status_code) or HTTPStatus(error.status_code).phrase.lower())
    told.headers |= dict(error.headers or {})
    return told


def tell_errors(app: FastAPI) -> None:
    """From now on ``app`` tells every error in this form."""
    for kind in (ApiError, TokenTreeError, RequestValidationError, HTTPException, Exception):
        app.add_exception_handler(kind, _answer)
