"""What a request came to."""

from __future__ import annotations

from dataclasses import dataclass

from tokentree.errors import TokenTreeError
from tokentree.metrics import Metrics
from tokentree.sequence import FinishReason, TokenLogprobs


@dataclass(frozen=True)
class Result:
    """One decoded text.

    Args:
        text: the output, without special tokens, and without what a stop string cut off.
        token_ids: all tokens of the output.
        finish_reason: "stop" (a stop rule), "length" (a limit), "timeout", "interrupted" (the caller stopped), "error".
        logprobs: per token, if the request asked for them.
        metrics: counts and times of the request.
        prompt_token_ids: the tokens of the prompt.
        score: with beam search, the text's log-probability, divided by its length to the power of the length penalty.
        error: the error that ended the request, with the finish reason "error". Either the request couldn't begin, or
            its rules failed behind the tokens that are there.
        prompt_logprobs: per token of the prompt, if the request asked for them. That of the first one is None: nothing
            comes before it. They are as far as the prompt was read.
    """

    text: str
    token_ids: list[int]
    finish_reason: FinishReason
    logprobs: list[TokenLogprobs] | None
    metrics: Metrics
    prompt_token_ids: list[int]
    score: float | None = None
    error: TokenTreeError | None = None
    prompt_logprobs: list[TokenLogprobs | None] | None = None
