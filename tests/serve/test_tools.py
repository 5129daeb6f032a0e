"""Tools: calls that a grammar forces, calls that a text has by itself, and earlier calls in messages."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from tokenizers import AddedToken
from transformers import PreTrainedTokenizerFast

from tests.serve.serving import NAME, Served, events_of, serving
from tests.tiny_models import tiny, tiny_tokenizer
from tokentree import LLM, SamplingParams, StructuredOutputs
from tokentree.grammars.compiler import _compiled
from tokentree.grammars.tokens import read
from tokentree.serve import replies
from tokentree.serve.params import params_of
from tokentree.serve.protocol import ChatRequest
from tokentree.serve.settings import Settings
from tokentree.serve.tools.asked import tools_of
from tokentree.serve.tools.formats import FORMATS
from tokentree.serve.tools.grammar import call_grammar

SCHEMA: dict[str, Any] = {
    "type": "object",
    "properties": {"city": {"enum": ["Rome", "東京"]}, "days": {"type": "integer", "minimum": 1, "maximum": 9}},
    "required": ["city", "days"],
    "additionalProperties": False,
}
TOOLS: list[Any] = [
    {"type": "function", "function": {"name": "weather", "description": "The weather.", "parameters": SCHEMA}},
    {"type": "function", "function": {"name": "now", "strict": True}},
]
MESSAGES: list[Any] = [{"role": "user", "content": "one two"}]
ASKED: dict[str, Any] = {"model": NAME, "messages": MESSAGES, "tools": TOOLS, "max_tokens": 400, "seed": 3}
KEYS = {"hermes": "arguments", "llama3": "parameters"}
SPECIAL = ["<tool_call>", "</tool_call>", "<|python_tag|>"]


def template(said: str) -> str:
    """A chat template that says how calls are written, and shows what it is told as JSON."""
    shown = "{{ message.content }}{{ message.tool_calls | tojson if message.tool_calls }}<|end|>"
    told = f"{{% if tools %}}{{{{ tools | tojson }}}}{said}{{% endif %}}"
    return f"{told}{{% for message in messages %}}<|{{{{ message.role }}}}|>{shown}{{% endfor %}}<|assistant|>"


def tokenizer_of(form: str, tags: str = "") -> PreTrainedTokenizerFast:
    """Its ``tags`` are special tokens, or "added" ones, as Qwen's; or text."""
    tokenizer = tiny_tokenizer()
    if tags == "added":
        tokenizer.add_tokens([AddedToken(tag, special=False, normalized=False) for tag in SPECIAL])
    if tags == "special":
        tokenizer.add_special_tokens({"additional_special_tokens": ["<|user|>", "<|assistant|>", *SPECIAL]})
    tokenizer.chat_template = template(FORMATS[form].begin)
    return tokenizer


def llm_of(form: str, tags: str = "") -> LLM:
    size = {"hidden_size": 64, "intermediate_size": 96, "vocab_size": 320, "max_position_embeddings": 2048}
    return LLM(tiny("llama", torch.bfloat16, **size), ["suffix", "ngram"], tokenizer=tokenizer_of(form, tags))


@pytest.fixture(scope="module", params=["hermes", "llama3", "hermes special", "llama3 special", "hermes added"])
def calling(request: pytest.FixtureRequest) -> Iterator[Served]:
    form, _, tags = request.param.partition(" ")
    with serving(llm_of(form, tags), tool_parser="auto") as served:
        yield served
        served.wait_idle()


def form_of(served: Served) -> str:
    return "hermes" if "<tool_call>" in served.llm.tokenizer.chat_template else "llama3"  # type: ignore[union-attr]


def wanted_of(served: Served, asked: dict[str, Any]) -> StructuredOutputs | None:
    """The grammar of a request."""
    tools = tools_of(
        ChatRequest(**asked), served.service.settings, served.service.tokenizer, served.service.texts.special
    )
    assert tools is not None
    return tools.wanted


def streamed(chunks: Any) -> tuple[str, list[dict[str, Any]], str | None]:
    """Content, calls and finish reason of the first choice of a stream."""
    content, calls, reason = "", list[dict[str, Any]](), None
    for chunk in chunks:
        for choice in chunk.choices:
            content += choice.delta.content or ""
            for part in choice.delta.tool_calls or []:
                if part.index == len(calls):  # the name comes first
                    assert part.id.startswith("call_")
                    assert part.type == "function"
                    calls.append({"name": part.function.name, "arguments": part.function.arguments})
                else:
                    assert part.index == len(calls) - 1
                    assert part.id is part.function.name is None
                    calls[-1]["arguments"] += part.function.arguments
            reason = choice.finish_reason or reason
    return content, calls, reason


def told(message: Any) -> tuple[str, list[dict[str, Any]]]:
    calls = message.tool_calls or []
    assert all(call.type == "function" for call in calls)
    assert len({call.id for call in calls}) == len(calls)
    return message.content or "", [{"name": call.function.name, "arguments": call.function.arguments} for call in calls]


@pytest.mark.parametrize(
    "more",
    [
        {"tool_choice": "required", "parallel_tool_calls": False},
        {"tool_choice": "required", "logprobs": True},
        {"tool_choice": {"type": "function", "function": {"name": "weather"}}},
        {"tool_choice": {"type": "function", "function": {"name": "now"}}},
    ],
    ids=["one", "several", "weather", "now"],
)
def test_a_call_is_forced(calling: Served, more: dict[str, Any]) -> None:
    """Its ids are those of `LLM.generate` under the same grammar."""
    asked = ASKED | more
    prompt = calling.llm.chat_prompt(MESSAGES, [told_tool(tool) for tool in TOOLS])
    params = SamplingParams(
        max_tokens=400, seed=3, temperature=1.0, structured_outputs=wanted_of(calling, asked)
    )  # fmt: skip
    expected = calling.llm.generate([prompt], params)[0]
    create = calling.client.chat.completions.create
    whole = create(**asked, extra_body={"return_token_ids": True}).choices[0]
    assert whole.token_ids == expected.token_ids
    content, calls = told(whole.message)
    assert content == ""
    assert whole.message.content is None
    chosen = more["tool_choice"]
    names = ("weather", "now") if chosen == "required" else (chosen["function"]["name"],)
    for call in calls:
        arguments = json.loads(call["arguments"])
        assert call["name"] in names
        if call["name"] == "weather":
            assert arguments["city"] in ("Rome", "東京")
            assert 1 <= arguments["days"] <= 9
        else:
            assert arguments == {}
    assert len(calls) == 1 or more == {"tool_choice": "required", "logprobs": True}
    reason = "tool_calls" if chosen == "required" else "stop"
    assert whole.finish_reason == (reason if expected.finish_reason == "stop" else "length")
    assert streamed(create(**asked, stream=True)) == (content, calls, whole.finish_reason)


def told_tool(tool: dict[str, Any]) -> dict[str, Any]:
    """What a template is told of one of `TOOLS`."""
    function = tool["function"]
    schema = function.get("parameters", {"type": "object", "properties": {}})
    told = {"name": function["name"], "description": function.get("description", ""), "parameters": schema}
    return {"type": "function", "function": told}


def said_by(served: Served, monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    """From now on the model says ``text``."""
    added = {entry.content for entry in served.service.tokenizer.added_tokens_decoder.values()}
    rules = list[str]()
    while text:  # added tokens are written as tokens
        tag = next((tag for tag in SPECIAL if tag in added and text.startswith(tag)), "")
        plain = "" if tag else text[: min((at for tag in added if (at := text.find(tag)) > 0), default=len(text))]
        rules.append(tag or json.dumps(plain, ensure_ascii=False))
        text = text[len(tag or plain) :]

    def forced(*args: Any) -> SamplingParams:
        wanted = StructuredOutputs(grammar=f"start: {' '.join(rules)}")
        return params_of(*args).model_copy(update={"structured_outputs": wanted})

    monkeypatch.setattr("tokentree.serve.chat.params_of", forced)


def call_text(served: Served, name: str, arguments: str) -> str:
    form = form_of(served)
    begin, end = FORMATS[form].begin, FORMATS[form].end
    return f'{begin}{{"name": "{name}", "{KEYS[form]}": {arguments}}}{end}'


def test_a_text_calls_by_itself(calling: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = '{"city": "東京", "days": 2}'
    calls = [{"name": "weather", "arguments": arguments}, {"name": "weather", "arguments": "{}"}]
    text = f"Let me see: {call_text(calling, 'weather', arguments)}\n{call_text(calling, 'weather', '{}')}"
    said_by(calling, monkeypatch, text)
    asked = {**ASKED, "tools": TOOLS[:1]}
    create = calling.client.chat.completions.create
    whole = create(**asked, n=2)
    for choice in whole.choices:
        assert told(choice.message) == ("Let me see: ", calls)
        assert choice.finish_reason == "tool_calls"
    assert streamed(create(**asked, stream=True)) == ("Let me see: ", calls, "tool_calls")
    chunks = [*create(**asked, stream=True, extra_body={"speculation": "off"})]  # token by token
    assert streamed(chunks) == ("Let me see: ", calls, "tool_calls")
    pieces = [
        part.function.arguments
        for chunk in chunks
        for part in chunk.choices[0].delta.tool_calls or []
        if part.function is not None
    ]
    assert len([piece for piece in pieces if piece]) > 8
    with calling.client.chat.completions.stream(**asked) as stream:
        final = stream.get_final_completion().choices[0]
    assert told(final.message) == ("Let me see: ", calls)


def test_a_text_that_is_cut_off_has_a_part_of_a_call(calling: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    said_by(calling, monkeypatch, call_text(calling, "weather", '{"city": "Rome, Rome, Rome"}'))
    asked = {**ASKED, "tools": TOOLS[:1]}
    tokens = calling.client.chat.completions.create(**asked).usage.completion_tokens
    asked["max_tokens"] = tokens - 20
    whole = calling.client.chat.completions.create(**asked).choices[0]
    content, calls = told(whole.message)
    assert whole.finish_reason == "length"
    assert content == ""
    assert '{"city": "Rome, Rome, Rome"}'.startswith(calls[0]["arguments"])
    assert calls[0]["arguments"]


def test_a_forced_call_that_is_cut_off_leaves_no_content(calling: Served) -> None:
    create = calling.client.chat.completions.create
    asked = ASKED | {"tool_choice": "required"}
    for most in (1, 2, 5):
        whole = create(**asked | {"max_tokens": most}).choices[0]
        assert told(whole.message) == ("", [])
        assert whole.finish_reason == "length"
        assert streamed(create(**asked | {"max_tokens": most}, stream=True)) == ("", [], "length")


@pytest.mark.parametrize("name", ["snow", "weather "])
def test_what_looks_like_a_call_stays_content(calling: Served, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    text = call_text(calling, name, '{"city": "Rome"}')
    said_by(calling, monkeypatch, text)
    for tag in calling.service.texts.special:
        text = text.replace(tag, "")
    asked = {**ASKED, "tools": TOOLS[:1]}
    choice = calling.client.chat.completions.create(**asked).choices[0]
    assert told(choice.message) == (text, [])
    assert choice.finish_reason == "stop"
    assert streamed(calling.client.chat.completions.create(**asked, stream=True)) == (text, [], "stop")


def test_without_a_choice_calls_are_text(calling: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    """As if there were no tools."""
    text = call_text(calling, "weather", "{}")
    said_by(calling, monkeypatch, text)
    for tag in calling.service.texts.special:
        text = text.replace(tag, "")
    whole = calling.client.chat.completions.create(**ASKED, tool_choice="none")
    assert told(whole.choices[0].message) == (text, [])
    assert whole.usage is not None
    assert whole.usage.prompt_tokens == len(calling.llm.chat_prompt(MESSAGES))


def test_answers_have_the_form_that_the_interface_tells(calling: Served) -> None:
    body = ASKED | {"tool_choice": "required", "logprobs": True, "n": 2, "return_token_ids": True}
    replies.ChatCompletion.model_validate(calling.post("/v1/chat/completions", body).json())
    for event in events_of(calling.post("/v1/chat/completions", body | {"stream": True})):
        assert event is None or replies.ChatCompletionChunk.model_validate(event)


def test_earlier_calls_are_told_to_the_template(calling: Served) -> None:
    call = {"id": "call_1", "type": "function", "function": {"name": "weather", "arguments": '{"city": "Rome"}'}}
    result = {"role": "tool", "tool_call_id": "call_1", "content": "sunny"}
    asked: list[Any] = [*MESSAGES, {"role": "assistant", "content": None, "tool_calls": [call]}, result]
    known = {"id": "call_1", "type": "function", "function": {"name": "weather", "arguments": {"city": "Rome"}}}
    ids = calling.llm.chat_prompt(
        [*MESSAGES, {"role": "assistant", "content": "", "tool_calls": [known]}, result],
        [told_tool(tool) for tool in TOOLS[:1]],
    )
    answer = calling.client.chat.completions.create(
        model=NAME, messages=asked, tools=TOOLS[:1], max_tokens=1, extra_body={"return_token_ids": True}
    )
    assert answer.choices[0].prompt_token_ids == ids  # type: ignore[attr-defined]
    tokenizer = calling.llm.tokenizer
    assert tokenizer is not None
    assert '"description": "The weather."' in str(tokenizer.decode(ids))


# -- grammars --------------------------------------------------------------------------------------------------------

FUNCTIONS = {"weather": SCHEMA, "now": {"type": "object"}}
# of each kind of grammar, by (forced, several): whether it takes a text
KINDS = [(True, True), (True, False), (False, True), (False, False)]
TEXTS: list[tuple[str, str, str]] = [
    ("hermes", "", "0011"),
    ("hermes", "CALL", "1111"),
    ("hermes", "CALL\nCALL", "1010"),
    ("hermes", "hello", "0011"),
    ("hermes", "hello CALL", "0011"),
    ("hermes", "hello CALL hello", "0010"),
    ("hermes", "BAD", "0000"),
    ("hermes", "hello BAD", "0000"),
    ("hermes", "<tool_call>hello", "0000"),
    ("hermes", "<tool", "0011"),
    ("llama3", "", "0011"),
    ("llama3", "CALL", "1111"),
    ("llama3", "CALL; CALL", "1010"),
    ("llama3", "hello", "0011"),
    ("llama3", " hello {", "0011"),
    ("llama3", "BAD", "0000"),
    ("llama3", " {", "0000"),
    ("llama3", "<|python_tag|>BAD", "0000"),
]


@pytest.mark.parametrize("tags", ["", "special", "added"])
@pytest.mark.parametrize(("form", "text", "taken"), TEXTS)
def test_grammars(form: str, text: str, taken: str, tags: str) -> None:
    tokenizer = tokenizer_of(form, tags)
    for word, arguments in (("CALL", '{"city": "Rome", "days": 2}'), ("BAD", '{"city": "Bern", "days": 2}')):
        shape, key = FORMATS[form], KEYS[form]
        begin = "" if shape.bare else shape.begin + shape.space
        written = f'{begin}{{"name": "weather", "{key}": {arguments}}}{shape.space}{shape.end}'
        text = text.replace(word, written)
    known = {entry.content for entry in tokenizer.added_tokens_decoder.values()}
    tokens, ids = read(tokenizer), tokenizer(text, add_special_tokens=False).input_ids
    for (forced, several), expected in zip(KINDS, taken, strict=True):
        matcher = _compiled("lark", call_grammar(FORMATS[form], FUNCTIONS, known, forced, several), tokens)
        fits = matcher.validate_tokens(ids) == len(ids) and matcher.consume_tokens(ids) and matcher.is_accepting()
        assert fits == (expected == "1"), (forced, several)


@pytest.mark.parametrize(
    ("more", "has"),
    [
        ({"tools": TOOLS[:1]}, False),
        ({"tools": TOOLS[:1], "parallel_tool_calls": True, "tool_choice": "auto"}, False),
        ({"tools": TOOLS[:1], "parallel_tool_calls": False}, True),
        ({"tools": TOOLS}, True),
        ({"tools": TOOLS[:1], "tool_choice": "required"}, True),
    ],
)
def test_a_text_that_may_be_anything_has_no_grammar(more: dict[str, Any], has: bool) -> None:
    asked = ChatRequest(messages=MESSAGES, **more)
    tools = tools_of(asked, Settings(NAME), tokenizer_of("hermes"), {})
    assert tools is not None
    assert (tools.wanted is not None) == has


# -- what is refused -------------------------------------------------------------------------------------------------

WRONG: list[tuple[dict[str, Any], str]] = [
    ({"tools": [{"type": "web_search"}]}, "tools[0].type"),
    ({"tools": [{"type": "function", "function": {"name": "a b"}}]}, "tools[0].function.name"),
    ({"tools": [{"type": "function", "function": {"name": "a", "more": 1}}]}, "tools[0].function.more"),
    ({"tools": [*TOOLS, TOOLS[0]]}, "tools[2].function.name"),
    (
        {"tools": [{"type": "function", "function": {"name": "a", "parameters": {"type": "array"}}}]},
        "tools[0].function.parameters",
    ),
    (
        {"tools": [{"type": "function", "function": {"name": f"f{i}"}} for i in range(129)]},
        "tools",
    ),
    (
        {
            "tools": [{"type": "function", "function": {"name": "a", "parameters": {"not": {}}}}],
            "tool_choice": "required",
        },
        "tools",
    ),
    ({"tool_choice": "perhaps"}, "tool_choice"),
    ({"tool_choice": {"type": "function", "function": {"name": "snow"}}}, "tool_choice.function.name"),
    ({"tool_choice": {"type": "allowed_tools"}}, "tool_choice"),
    ({"structured_outputs": {"regex": "a"}}, "structured_outputs"),
    ({"tool_choice": "required", "ignore_eos": True}, "tools"),
    (
        {
            "messages": [
                *MESSAGES,
                {"role": "assistant", "tool_calls": [{"id": "a", "function": {"name": "a", "arguments": "[1]"}}]},
            ]
        },
        "messages[1].tool_calls[0].function.arguments",
    ),
]


@pytest.mark.parametrize(("wrong", "param"), WRONG, ids=str)
def test_what_is_wrong_is_named(calling: Served, wrong: dict[str, Any], param: str) -> None:
    assert calling.refused("/v1/chat/completions", ASKED | wrong)["param"] == param


def test_content_has_a_format_where_nothing_is_called(calling: Served) -> None:
    schema: dict[str, Any] = {"type": "object", "properties": {"ok": {"type": "boolean"}}, "required": ["ok"]}
    schema["additionalProperties"] = False
    form = {"type": "json_schema", "json_schema": {"name": "a", "schema": schema}}
    asked = ASKED | {"response_format": form, "parallel_tool_calls": False}
    seen = set[str]()
    for seed in range(12):
        bodies = [asked | {"seed": seed, "speculation": way} for way in (None, "off")]
        choices = [calling.post("/v1/chat/completions", body).json()["choices"][0] for body in bodies]
        message, reason = choices[0]["message"], choices[0]["finish_reason"]
        assert [choice["message"]["content"] for choice in choices] == [message["content"]] * 2
        if message["content"]:
            assert reason == "stop"
            assert list(json.loads(message["content"])) == ["ok"]
        else:
            assert reason in ("tool_calls", "length")  # arguments that aren't strict may have no end
            assert len(message.get("tool_calls", [])) == (reason == "tool_calls" or "tool_calls" in message)
        seen.add(reason)
        if seen >= {"stop", "tool_calls"}:
            break
    else:
        pytest.fail(f"all texts end for the same reason: {seen}")
    forced = calling.post("/v1/chat/completions", asked | {"tool_choice": "required"}).json()["choices"][0]
    assert forced["message"]["content"] is None
    assert forced["finish_reason"] == "tool_calls"


@pytest.mark.parametrize(
    ("form", "parser", "said"),
    [("{{ tools }}", "auto", "--tool-parser"), ("no", "auto", "has no tools"), ("no", "hermes", "has no tools")],
)
def test_a_template_that_knows_no_tools(form: str, parser: str, said: str) -> None:
    llm = llm_of("hermes")
    assert llm.tokenizer is not None
    llm.tokenizer.chat_template = form
    with serving(llm, tool_parser=parser) as served:
        error = served.refused("/v1/chat/completions", ASKED)
        assert error["param"] == "tools"
        assert said in error["message"]
