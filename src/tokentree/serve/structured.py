"""Where a request's grammar becomes a sampling option: ``response_format`` and ``structured_outputs``."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from tokentree.errors import OptionError
from tokentree.grammars.options import StructuredOutputs, is_deeper
from tokentree.llm import LLM
from tokentree.serve.errors import BAD, ApiError
from tokentree.serve.protocol import ResponseFormat, Sampled
from tokentree.serve.settings import Settings

LOG = logging.getLogger("tokentree.serve")
NAME = "structured_outputs: "  # how the library's own errors begin


def structured(asked: Sampled, settings: Settings) -> StructuredOutputs | None:
    """What the text of a request has to be; None: anything.

    Raises:
        ApiError: if it is asked for in a wrong way, or is larger than the server takes.
    """
    given, form = asked.structured_outputs, asked.response_format
    if given is not None and has_format(asked):
        raise ApiError(
            BAD, "structured_outputs and response_format are two ways to ask for one thing: give one of them",
            "structured_outputs", "invalid_value",
        )  # fmt: skip
    options: dict[str, Any] = {}
    if given is not None:
        options = {field.alias or name: getattr(given, name) for name, field in type(given).model_fields.items()}
        options = {name: value for name, value in options.items() if value is not None}
    elif form is not None:
        options = _options_of(form)
    if given is None and not options:
        return None
    with grammar_blamed(asked):
        wanted = StructuredOutputs.of(options)
        check_grammar(wanted, settings)
        return wanted


def has_format(asked: Sampled) -> bool:
    """Whether ``response_format`` asks for more than text."""
    return asked.response_format is not None and asked.response_format.type != "text"


def check_grammar(wanted: StructuredOutputs, settings: Settings) -> None:
    """Raises `OptionError` if a grammar is larger than the server takes."""
    kind, text = wanted.source
    if len(text) > settings.grammar_chars:
        raise OptionError(f"{NAME}{len(text)} characters are more than the {settings.grammar_chars} of this server")
    if kind == "json" and is_deeper(json.loads(text), settings.schema_levels):
        raise OptionError(f"{NAME}the JSON schema has more than the {settings.schema_levels} levels of this server")


def _options_of(form: ResponseFormat) -> dict[str, Any]:
    if (form.json_schema is not None) != (form.type == "json_schema"):
        needs = "needs json_schema" if form.type == "json_schema" else "goes without json_schema"
        raise ApiError(
            BAD, f"response_format: the type {form.type} {needs}", "response_format.json_schema", "invalid_value"
        )
    if form.json_schema is not None:
        return {"json": form.json_schema.schema_}
    return {"json_object": True} if form.type == "json_object" else {}


@contextmanager
def grammar_blamed(asked: Sampled) -> Iterator[None]:
    """What is wrong with a grammar in this block is told of the field that asked for it."""
    try:
        yield
    except OptionError as error:
        said = str(error)
        if not said.startswith(NAME.rstrip(": ")):
            raise
        if asked.structured_outputs is not None:
            field = "structured_outputs"
        else:
            field = "response_format" if has_format(asked) else "tools"
        raise ApiError(BAD, f"{field}: {said.removeprefix(NAME)}", field, "invalid_value") from None


def prepare(llm: LLM) -> None:
    """Does at once what the first grammar would wait for. Without grammars a server works as well."""
    try:
        llm.prepare_grammars()
    except OptionError as error:
        LOG.info("no request can have a grammar: %s", error)
