"""The tools of a request."""

from __future__ import annotations

from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from tokentree.chat import template_of
from tokentree.grammars.options import StructuredOutputs, is_deeper
from tokentree.serve.errors import BAD, ApiError
from tokentree.serve.protocol import ChatRequest, NamedTool, Tool
from tokentree.serve.settings import Settings
from tokentree.serve.structured import check_grammar, has_format, structured
from tokentree.serve.tools.formats import Format, format_of
from tokentree.serve.tools.grammar import call_grammar
from tokentree.serve.tools.reader import CallReader

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

NOTES = ("description", "title", "$comment")
NOTHING: dict[str, Any] = {"type": "object", "properties": {}, "additionalProperties": False}


@dataclass(frozen=True)
class Tools:
    """What a text may call.

    Args:
        form: how it is written.
        told: what the chat template gets.
        names: the functions.
        wanted: the grammar of the text, if it has one.
        forced: whether the text is calls and nothing else.
        named: whether one function was named, which has to be called. As in OpenAI's interface the text then ends with
            the finish reason "stop".
        hidden: tags of ``form`` that are special tokens, by their ids.
    """

    form: Format
    told: list[dict[str, Any]]
    names: list[str]
    wanted: StructuredOutputs | None
    forced: bool
    named: bool
    hidden: Mapping[int, str]

    def reader(self) -> CallReader:
        """What reads a text's calls."""
        reason: Literal["stop", "tool_calls"] = "stop" if self.named else "tool_calls"
        return CallReader(self.form, self.names, self.hidden, self.forced, reason)


def tools_of(
    asked: ChatRequest, settings: Settings, tokenizer: PreTrainedTokenizerBase, special: Mapping[str, int]
) -> Tools | None:
    """The tools of a request; None if there are none, or none may be called.

    Args:
        special: how special tokens are written, and their ids.

    Raises:
        ApiError: if there can be no such calls.
        OptionError: if a grammar of them is too large.
    """
    tools, choice = asked.tools or [], asked.tool_choice or "auto"
    if not tools:
        _check_none(asked)
        return None
    _check(tools, settings)
    if choice == "none":
        return None
    if asked.structured_outputs is not None:
        field = "structured_outputs"
        raise ApiError(BAD, f"{field} goes with tools only if tool_choice is none", field, "unsupported")
    form = _form(tokenizer, settings)
    may_call = _chosen(tools, choice) if isinstance(choice, NamedTool) else tools
    names = [tool.function.name for tool in may_call]
    added = {entry.content for entry in tokenizer.added_tokens_decoder.values()}
    content = structured(asked, settings) if has_format(asked) else None
    wanted = _grammar(form, may_call, asked, added, content)
    if wanted is not None:
        check_grammar(wanted, settings)
    hidden = {special[tag]: tag for tag in (form.begin, form.end) if tag in special}
    return Tools(
        form, [_told(tool) for tool in tools], names, wanted, choice != "auto", isinstance(choice, NamedTool), hidden
    )


def _check_none(asked: ChatRequest) -> None:
    for name, value in (("tool_choice", asked.tool_choice), ("parallel_tool_calls", asked.parallel_tool_calls)):
        if value not in (None, "none"):
            raise ApiError(BAD, f"{name} is for requests with tools", name, "invalid_value")


def _check(tools: Sequence[Tool], settings: Settings) -> None:
    if len(tools) > settings.tools:
        raise ApiError(BAD, f"tools: this server takes at most {settings.tools}", "tools", "too_many")
    seen = set[str]()
    for number, tool in enumerate(tools):
        name, schema = tool.function.name, tool.function.parameters or {}
        param = f"tools[{number}].function"
        if name in seen:
            raise ApiError(BAD, f"{param}.name: {name} is there twice", f"{param}.name", "invalid_value")
        seen.add(name)
        if schema.get("type", "object") != "object":
            said = "arguments are an object, so the type of their schema is object"
        elif is_deeper(schema, settings.schema_levels):
            said = f"the schema has more than the {settings.schema_levels} levels of this server"
        else:
            continue
        raise ApiError(BAD, f"{param}.parameters: {said}", f"{param}.parameters", "invalid_value")


def _form(tokenizer: PreTrainedTokenizerBase, settings: Settings) -> Format:
    template = template_of(tokenizer, with_tools=True)
    form = format_of(template, settings.tool_parser) if "tools" in template else None
    if form is None:
        said = "the model's chat template has no tools" if "tools" not in template else (
            "how this model calls tools isn't known from its chat template: the server's option --tool-parser says it"
        )  # fmt: skip
        raise ApiError(BAD, f"tools: {said}", "tools", "unsupported")
    return form


def _chosen(tools: Sequence[Tool], choice: NamedTool) -> list[Tool]:
    found = [tool for tool in tools if tool.function.name == choice.function.name]
    if not found:
        raise ApiError(
            BAD, f"tool_choice: there is no tool {choice.function.name}", "tool_choice.function.name", "invalid_value"
        )
    return found


def _grammar(
    form: Format, tools: Sequence[Tool], asked: ChatRequest, added: Container[str],
    content: StructuredOutputs | None,
) -> StructuredOutputs | None:  # fmt: skip
    """The grammar of a text that has to call, has to call strictly, or may call only once; or that is ``content`` if it
    doesn't call."""
    forced, several = asked.tool_choice not in (None, "auto"), asked.parallel_tool_calls is not False
    if isinstance(asked.tool_choice, NamedTool):
        several = False
    if not forced and content is None and several and not any(tool.function.strict for tool in tools):
        return None
    schemas = {
        tool.function.name: _arguments(tool) if forced or tool.function.strict else {"type": "object"}
        for tool in tools
    }  # fmt: skip
    answer = None if forced or content is None else content.source[1]
    return StructuredOutputs(grammar=call_grammar(form, schemas, added, forced, several, answer))


def _arguments(tool: Tool) -> dict[str, Any]:
    schema = tool.function.parameters
    return NOTHING if schema is None else {"type": "object"} | _without_notes(schema)


def _without_notes(schema: Any) -> Any:
    """``schema`` without what is said to readers: a grammar has limits, and this changes nothing."""
    if isinstance(schema, list):
        return [_without_notes(one) for one in schema]
    if not isinstance(schema, dict):
        return schema
    return {
        name: value if name in ("const", "enum") else _without_notes(value) for name, value in schema.items()
        if not (name in NOTES and isinstance(value, str))
    }  # fmt: skip


def _told(tool: Tool) -> dict[str, Any]:
    """A tool as templates take it."""
    function = tool.function
    told: dict[str, Any] = {"name": function.name, "description": function.description or ""}
    schema = {"type": "object", "properties": {}} if function.parameters is None else function.parameters
    return {"type": "function", "function": told | {"parameters": schema}}
