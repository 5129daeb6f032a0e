"""A request's fields as sampling options."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from tokentree.grammars.options import StructuredOutputs
from tokentree.sampling import SamplingParams
from tokentree.serve.errors import BAD, ApiError
from tokentree.serve.protocol import Sampled
from tokentree.serve.settings import Settings

PASSED = (
    "temperature", "top_p", "top_k", "min_p", "presence_penalty", "frequency_penalty", "repetition_penalty", "n",
    "seed", "min_tokens", "ignore_eos",
)  # fmt: skip
TOKEN_ID = re.compile("0|[1-9][0-9]{0,9}")  # one way to write each, so that no two keys are one token
STANDARD = {"temperature": 1.0}  # as OpenAI's interface has it; the others are those of `SamplingParams`


def params_of(
    asked: Sampled, settings: Settings, special: Mapping[str, int], max_tokens: int, logprobs: int | None,
    wanted: StructuredOutputs | None = None, prompt_logprobs: int | None = None,
) -> SamplingParams:  # fmt: skip
    """The sampling options of a request.

    Args:
        special: how special tokens are written, and their ids.
        max_tokens: the most new tokens.
        logprobs: how many of the most probable tokens are told at each place.
        wanted: what the text has to be.
        prompt_logprobs: as ``logprobs``, of the prompt.

    Raises:
        ApiError, OptionError: if a value can't be honoured.
    """
    given = {name: value for name in PASSED if (value := getattr(asked, name)) is not None}
    if given.get("top_k") == -1:
        given["top_k"] = 0
    stops, ends = _stops(asked, settings, special)
    options: dict[str, Any] = {
        "max_tokens": max_tokens, "logprobs": logprobs, "stop": stops, "stop_token_ids": ends,
        "logit_bias": _bias(asked, settings), "timeout": settings.request_timeout,
        "structured_outputs": wanted, "prompt_logprobs": prompt_logprobs,
    }  # fmt: skip
    options |= STANDARD | dict(settings.defaults) | given
    return SamplingParams(**options)


def check_sizes(asked: Sampled, settings: Settings, prompts: int) -> None:
    """Raises `ApiError` if a request asks for more than the server gives."""
    if prompts > settings.prompts:
        raise _too_many("prompt", prompts, settings.prompts, "prompts")
    if (asked.n or 1) > settings.n:
        raise _too_many("n", asked.n or 1, settings.n, "samples")
    if asked.stream_options is not None and not asked.stream:
        raise ApiError(BAD, "stream_options is for streams: set stream", "stream_options", "invalid_value")


def tokens_asked(asked: int | None, name: str, settings: Settings, otherwise: int, least: int = 1) -> int:
    """The most new tokens of a text: those ``asked`` for as ``name``, or ``otherwise``, within the server's limit.

    Raises:
        ApiError: if more are asked for, or less than ``least``.
    """
    limit = settings.max_tokens
    if asked is None:
        return max(1, otherwise if limit is None else min(otherwise, limit))
    if limit is not None and asked > limit:
        raise _too_many(name, asked, limit, "new tokens")
    if asked < least:
        raise ApiError(BAD, f"{name}={asked}: it must be at least {least}", name, "invalid_value")
    return asked


def check_logprobs(count: int | None, name: str, settings: Settings) -> int | None:
    """``count``, or an `ApiError` if it is out of range."""
    if count is not None and not 0 <= count <= settings.top_logprobs:
        raise ApiError(BAD, f"{name}={count}: it must be 0 to {settings.top_logprobs}", name, "invalid_value")
    return count


def _stops(asked: Sampled, settings: Settings, special: Mapping[str, int]) -> tuple[tuple[str, ...], tuple[int, ...]]:
    """Stop strings and stop tokens. What is exactly one special token becomes that token."""
    stops = [asked.stop] if isinstance(asked.stop, str) else asked.stop or []
    ids = asked.stop_token_ids or []
    for name, given, most in (("stop", stops, settings.stops), ("stop_token_ids", ids, settings.named_tokens)):
        if len(given) > most:
            raise _too_many(name, len(given), most, "of them")
    longest = max(map(len, stops), default=0)
    if longest > settings.stop_chars:
        raise _too_many("stop", longest, settings.stop_chars, "characters")
    strings = tuple(stop for stop in stops if stop not in special)
    return strings, (*ids, *(special[stop] for stop in stops if stop in special))


def _bias(asked: Sampled, settings: Settings) -> dict[int, float]:
    given = asked.logit_bias or {}
    if len(given) > settings.named_tokens:
        raise _too_many("logit_bias", len(given), settings.named_tokens, "tokens")
    if not all(map(TOKEN_ID.fullmatch, given)):
        raise ApiError(BAD, "logit_bias: its keys must be token ids", "logit_bias", "invalid_value")
    return {int(token): bias for token, bias in given.items()}


def _too_many(name: str, count: int, most: int, what: str) -> ApiError:
    return ApiError(
        BAD, f"{name}: {count} {what} are asked for, and this server takes at most {most}", name, "too_many"
    )
