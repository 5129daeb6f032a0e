"""What a server is told, and its limits."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Settings:
    """The settings of a server.

    Args:
        model_name: what requests call the model, and the label ``model_name`` of metrics.
        defaults: sampling options of requests that name none, such as those of a model's ``generation_config.json``.
        keys: a request must show one of them. None: nobody must.
        max_batch: the most texts that are decoded together.
        max_queue: the most texts that wait. More requests get the status 429.
        request_timeout: the seconds after which a request ends with the status 504. None: no limit.
        stall_timeout: the seconds after which a connection is ended whose client reads nothing, and the seconds that a
            client has to send a body.
        max_tokens: the most new tokens of a text. None: as many as the context holds.
        prompt_tokens: the most tokens of a prompt. None: as many as the context holds.
        body_bytes: the size of the largest body of a request.
        n: the most samples of a prompt.
        prompts: the most prompts of a request.
        messages: the most messages of a request.
        stops, stop_chars: the most stop strings, and their longest length.
        top_logprobs: the most tokens whose log-probabilities are told at each place.
        named_tokens: the most tokens that a request may bias, or end at.
        grammar_chars: the most characters of a grammar, and of the schemas of all tools together.
        schema_levels: the most levels of a JSON schema.
        tools: the most tools of a request.
        tool_parser: how the model calls tools: auto (as its chat template tells it to), hermes or llama3.
        twins: the most ways of speculation, beside the server's own, that are kept ready at a time.
        tree_nodes: the most nodes of a tree that a request may ask for.
        cors_origins: web pages from these origins may use the server.
        log_prompts: whether prompts and texts are logged.
    """

    model_name: str
    defaults: Mapping[str, float] = field(default_factory=dict)
    keys: tuple[str, ...] = ()
    max_batch: int = 8
    max_queue: int = 64
    request_timeout: float | None = 600.0
    stall_timeout: float = 60.0
    max_tokens: int | None = None
    prompt_tokens: int | None = None
    body_bytes: int = 4 << 20
    n: int = 16
    prompts: int = 64
    messages: int = 1024
    stops: int = 16
    stop_chars: int = 256
    top_logprobs: int = 20
    named_tokens: int = 1024
    grammar_chars: int = 1 << 16
    schema_levels: int = 32
    tools: int = 128
    tool_parser: str = "auto"
    twins: int = 4
    tree_nodes: int = 128
    cors_origins: tuple[str, ...] = ()
    log_prompts: bool = False
