"""Where a request's grammar becomes a sampling option: ``response_format`` and ``structured_outputs``."""

from __future__ import annotations

from typing import Any

from tokentree.serve.errors import BAD, ApiError
from tokentree.serve.protocol import Sampled


def structured(asked: Sampled) -> dict[str, Any]:
    """The sampling options that the grammar of a request asks for.

    Raises:
        ApiError: for a grammar that this server doesn't know.
    """
    if asked.response_format is not None and asked.response_format != {"type": "text"}:
        raise ApiError(
            BAD, 'response_format: this server knows {"type": "text"} alone', "response_format", "unsupported"
        )
    if asked.structured_outputs is not None:
        raise ApiError(BAD, "structured_outputs: this server has no grammars", "structured_outputs", "unsupported")
    return {}
