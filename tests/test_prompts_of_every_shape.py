"""Whatever people hand over as a prompt or as messages is taken as what it is, or refused in one sentence."""

from __future__ import annotations

import io
from array import array
from collections import deque
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from transformers import PreTrainedTokenizerFast

from tests.conftest import shown
from tests.tiny_models import kv_engine, tiny, tiny_tokenizer
from tokentree import LLM, PromptError, Result, SamplingParams
from tokentree.inputs import Chat, read_prompt, read_prompts

FEW = SamplingParams(max_tokens=4)
TEXT, OTHER = "The quick brown", "one two three four five six"
TOKENIZER = tiny_tokenizer()
IDS, OTHERS = TOKENIZER(TEXT).input_ids, TOKENIZER(OTHER).input_ids
TURN = {"role": "user", "content": TEXT}
SAID = TOKENIZER.apply_chat_template([TURN], add_generation_prompt=True, return_dict=False)


@pytest.fixture(scope="module")
def llm() -> LLM:
    return LLM(tiny("llama", vocab_size=len(TOKENIZER)), "ngram", shape="2x1", tokenizer=TOKENIZER)


class Named(NamedTuple):
    input_ids: Any
    attention_mask: Any


def padded(side: str, kind: str | None) -> Any:
    tokenizer = tiny_tokenizer()
    tokenizer.pad_token, tokenizer.padding_side = "<|end|>", side
    return tokenizer([TEXT, OTHER], padding=True, return_tensors=kind)


ONE: dict[str, Callable[[], Any]] = {
    "text": lambda: TEXT,
    "numpy text": lambda: np.str_(TEXT),
    "ids": lambda: IDS,
    "tuple": lambda: tuple(IDS),
    "deque": lambda: deque(IDS),
    "array.array": lambda: array("i", IDS),
    "iterator": lambda: iter(IDS),
    "generator": lambda: (token for token in IDS),
    "map": lambda: map(int, IDS),
    "numpy 1-D": lambda: np.array(IDS),
    "numpy int32": lambda: np.array(IDS, np.int32),
    "numpy [1, n]": lambda: np.array([IDS]),
    "numpy integers": lambda: list(np.array(IDS)),
    "torch 1-D": lambda: torch.tensor(IDS),
    "torch int32": lambda: torch.tensor(IDS, dtype=torch.int32),
    "torch [1, n]": lambda: torch.tensor([IDS]),
    "torch integers": lambda: list(torch.tensor(IDS)),
    "mixed integers": lambda: [IDS[0], np.int64(IDS[1]), *torch.tensor(IDS[2:])],
    "nested": lambda: [IDS],
    "BatchEncoding": lambda: TOKENIZER(TEXT),
    "BatchEncoding of one": lambda: TOKENIZER([TEXT]),
    "BatchEncoding pt": lambda: TOKENIZER(TEXT, return_tensors="pt"),
    "BatchEncoding np": lambda: TOKENIZER([TEXT], return_tensors="np"),
    "its dict": lambda: dict(TOKENIZER(TEXT)),
    "a named tuple": lambda: Named(IDS, [1] * len(IDS)),
    "a named tuple, padded": lambda: Named(torch.tensor([[0, *IDS]]), torch.tensor([[0] + [1] * len(IDS)])),
    "a mask of truth values": lambda: {"input_ids": [0, *IDS], "attention_mask": [False] + [True] * len(IDS)},
    "torch's": lambda: {"input_ids": torch.tensor([[0, *IDS]]), "attention_mask": torch.tensor([[0, *IDS]]) > 0},
    "numpy's": lambda: {"input_ids": np.array([[0, *IDS]]), "attention_mask": np.array([[0, *IDS]]) > 0},
    "a mask of floats": lambda: {"input_ids": torch.tensor([IDS]), "attention_mask": torch.ones(1, len(IDS))},
    "a list of floats": lambda: {"input_ids": [0, *IDS], "attention_mask": [0.0] + [1.0] * len(IDS)},
    "a list of masks": lambda: {"input_ids": [torch.tensor(IDS)], "attention_mask": [torch.ones(len(IDS)).bool()]},
    "vLLM's text": lambda: {"prompt": TEXT},
    "vLLM's ids": lambda: {"prompt_token_ids": IDS},
    "vLLM's both": lambda: {"prompt": TEXT, "prompt_token_ids": IDS, "multi_modal_data": None},
}
SEVERAL: dict[str, Callable[[], Any]] = {
    "texts": lambda: [TEXT, OTHER],
    "tuple of texts": lambda: (TEXT, OTHER),
    "iterator of texts": lambda: iter([TEXT, OTHER]),
    "numpy texts": lambda: np.array([TEXT, OTHER]),
    "objects": lambda: np.array([TEXT, OTHER], object),
    "ids": lambda: [IDS, OTHERS],
    "tuples": lambda: (tuple(IDS), tuple(OTHERS)),
    "mixed": lambda: [TEXT, OTHERS],
    "arrays": lambda: [np.array(IDS), torch.tensor(OTHERS)],
    "arrays [1, n]": lambda: [torch.tensor([IDS]), np.array([OTHERS])],
    "BatchEncoding": lambda: TOKENIZER([TEXT, OTHER]),
    "BatchEncodings": lambda: [TOKENIZER(TEXT), TOKENIZER(OTHER, return_tensors="pt")],
    "padded left": lambda: padded("left", "pt"),
    "padded right": lambda: padded("right", "np"),
    "padded lists": lambda: padded("left", None),
    "vLLM's": lambda: [{"prompt": TEXT}, {"prompt_token_ids": OTHERS}],
    "rows": lambda: ({"prompt": text} for text in (TEXT, OTHER)),
}


def same(got: Result, expected: Result) -> None:
    assert (got.prompt_token_ids, got.token_ids) == (expected.prompt_token_ids, expected.token_ids)


@pytest.mark.parametrize("name", ONE)
def test_one_prompt_may_come_in_any_of_these_forms(llm: LLM, name: str) -> None:
    expected = llm.generate([IDS], FEW)[0]
    results = llm.generate(ONE[name](), FEW)
    assert len(results) == 1
    same(results[0], expected)
    stream = llm.stream(ONE[name](), FEW)
    assert [piece.token_id for piece in stream if piece.token_id is not None] == expected.token_ids
    assert llm._references(ONE[name]()) == [IDS]
    assert llm.sequence(ONE[name](), FEW).prompt_ids == IDS


@pytest.mark.parametrize("name", SEVERAL)
def test_several_prompts_may_come_in_any_of_these_forms(llm: LLM, name: str) -> None:
    results = llm.generate(SEVERAL[name](), FEW)
    assert [result.prompt_token_ids for result in results] == [IDS, OTHERS]
    for result, prompt in zip(results, (IDS, OTHERS), strict=True):
        same(result, llm.generate([prompt], FEW)[0])
    assert llm._references(SEVERAL[name]()) == [IDS, OTHERS]


def test_no_prompts_have_no_results(llm: LLM) -> None:
    nothing: list[Any] = [[], (), iter(()), np.zeros((0, 3), np.int64)]
    for none in nothing:
        assert llm.generate(none) == []


@pytest.mark.parametrize(
    ("given", "says"),
    [
        (None, "None"),
        (5, "of the type int"),
        (1.5, "of the type float"),
        (True, "of the type bool"),
        (np.int64(4), "of the type int64"),
        (b"hi", "of the type bytes: decode it"),
        (bytearray(b"hi"), "bytearray"),
        (memoryview(b"hi"), "memoryview"),
        ({1, 2, 3}, "a set has no order"),
        (frozenset([1]), "a set has no order"),
        (Path("prompt.txt"), "Path"),
        (io.StringIO("hi"), "StringIO"),
        (object(), "of the type object"),
        (len, "builtin_function"),
        ([1.5, 2.0], "1.5 is no token id"),
        ([1, 2.0], "2.0 is no token id"),
        ([True, False], "True is no token id"),
        ([1, None], "None is no token id"),
        ([1, "a"], "'a' is no token id"),
        (["a", 1], "'a' is no token id"),
        (["a", None], "prompt 2 must be text, .* and this is None"),
        ([b"ab"], "bytes"),
        ([[[1, 2], [3, 4]]], r"\[1, 2\] is no token id"),
        ([["a", "b"]], "'a' is no token id"),
        ([{1, 2}], "a set has no order"),
        (np.array([1.0, 2.0]), "float64 is no type of token ids"),
        (np.array([True, False]), "bool is no type of token ids"),
        (np.array(5), r"an array of shape \[\]"),
        (np.zeros((1, 2, 3), np.int64), r"an array of shape \[1, 2, 3\]"),
        (np.array([b"a"]), "no token id|bytes|is no type"),
        (torch.tensor([1.0]), "float32 is no type of token ids"),
        (torch.tensor([1.0]).bfloat16(), "bfloat16 is no type"),
        (torch.tensor([True]), "bool is no type"),
        (torch.tensor([1j]), "complex64 is no type"),
        (torch.tensor(7), r"an array of shape \[\]"),
        (torch.tensor([5, 0, 6]).to_sparse(), "the values of this tensor can't be read: give a dense one"),
        (torch.zeros(3, dtype=torch.long, device="meta"), "can't be read: give a dense one"),
        ({"input_ids": [5], "attention_mask": torch.zeros(1, device="meta")}, "attention_mask .* can't be read"),
        ({"input_ids": [5], "attention_mask": ["x"]}, "must have 0 or 1 for each token, and not 'x'"),
        ([torch.tensor(1.5)], "is no token id"),
        ([np.float64(1.5)], "is no token id"),
        ({"text": "hi"}, "this dict has text"),
        ({}, "this dict has nothing"),
        ({"input_ids": IDS, "pixel_values": torch.zeros(1)}, "comes with pixel_values: this library reads text alone"),
        ({"prompt": "hi", "multi_modal_data": {"image": 1}}, "comes with multi_modal_data"),
        ({"prompt_embeds": torch.zeros(1, 2)}, "this dict has prompt_embeds"),
        ({"prompt": None}, "this dict has prompt"),
        ({"prompt": ["a", "b"]}, "'a' is no token id"),
        ({"input_ids": IDS, "attention_mask": [1]}, "has not the form of its input_ids"),
        ({"input_ids": [5, 6, 7], "attention_mask": [1, 0, 1]}, "hides tokens in its midst"),
        ({"input_ids": [5.5]}, "5.5 is no token id"),
        ({"input_ids": "abc"}, "must be text"),
        ("\ud83d", r"the prompt holds half of a character, '\\ud83d' at 0"),
        ("ab\udc00c", r"half of a character, '\\udc00' at 2"),
        (["a", "\ud83d"], "the prompt 2 holds half of a character"),
        ("", "the prompt is empty"),
        ([""], "the prompt is empty"),
        ([[]], "the prompt is empty"),
        (np.array([]), "the prompt is empty"),
        (torch.tensor([]), "the prompt is empty"),
        (torch.zeros(1, 0, dtype=torch.long), "the prompt is empty"),
        ({"input_ids": []}, "the prompt is empty"),
        ({"input_ids": [5, 6], "attention_mask": [0, 0]}, "the prompt is empty"),
        ([5, -1], "outside the vocabulary"),
        ([5, 10**30], "outside the vocabulary"),
        (np.array([2**62]), "outside the vocabulary"),
    ],
    ids=shown,
)
def test_what_is_no_prompt_is_refused_in_one_sentence(llm: LLM, given: Any, says: str) -> None:
    with pytest.raises(PromptError, match=says) as error:
        llm.generate(given, FEW)
    assert "\n" not in str(error.value)
    if given is not None:
        with pytest.raises(PromptError):
            llm.generate("ok", FEW, reference=given)
    if not isinstance(given, list) or len(given) == 1:
        with pytest.raises(PromptError):
            llm.stream(given, FEW)
    assert not kv_engine(llm)._kv


def test_a_stream_is_of_one_prompt(llm: LLM) -> None:
    for several in ([TEXT, OTHER], TOKENIZER([TEXT, OTHER]), [IDS, OTHERS], torch.tensor([IDS, IDS])):
        with pytest.raises(PromptError):
            llm.stream(several, FEW)  # type: ignore[arg-type]


def test_without_a_tokenizer_ids_alone_are_prompts() -> None:
    bare = LLM(tiny("llama"), "none")
    assert len(bare.generate(torch.tensor([[5, 6, 7]]), FEW)) == 1
    for given in (TEXT, [TURN], {"prompt": TEXT}):
        with pytest.raises(PromptError):
            bare.generate(given, FEW)


def test_prompts_are_read_once_and_stay_as_they_are() -> None:
    ids = torch.tensor([IDS])
    assert read_prompt(ids) == IDS
    assert read_prompts(ids) == [IDS]
    assert ids.tolist() == [IDS]
    found = read_prompts([TURN])
    assert isinstance(found[0], Chat)
    assert found[0].messages == [TURN]
    assert found[0].messages[0] is not TURN


# -- messages --------------------------------------------------------------------------------------------------------

PARTS = [{"type": "text", "text": "The quick"}, {"type": "text", "text": " brown"}]
MESSAGES: dict[str, Any] = {
    "list": [TURN],
    "tuple": (TURN,),
    "one": TURN,
    "request": {"messages": [TURN]},
    "object": [SimpleNamespace(role="user", content=TEXT)],
    "parts": [{"role": "user", "content": PARTS}],
    "texts as parts": [{"role": "user", "content": ("The quick", " brown")}],
}


@pytest.mark.parametrize("name", MESSAGES)
def test_messages_may_come_in_any_of_these_forms(llm: LLM, name: str) -> None:
    given = MESSAGES[name]
    assert llm.chat_prompt(given) == SAID
    assert llm.chat_prompt(iter(given) if isinstance(given, list) else given) == SAID  # type: ignore[arg-type]
    assert llm.chat(given, FEW).prompt_token_ids == SAID
    assert llm.generate(given, FEW)[0].prompt_token_ids == SAID
    assert llm.stream(given, FEW).result.prompt_token_ids == SAID


def test_several_conversations_are_several_prompts(llm: LLM) -> None:
    later = [TURN, {"role": "assistant", "content": "Hello"}, {"role": "user", "content": "A tree"}]
    several: list[Any] = [[TURN], later, {"messages": [TURN]}, "A tree"]
    results = llm.generate(several, FEW)
    assert [result.prompt_token_ids for result in results] == [
        SAID, llm.chat_prompt(later), SAID, TOKENIZER("A tree").input_ids,
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("messages", "says"),
    [
        ([], "there is no message"),
        (None, "not NoneType"),
        (3, "not int"),
        ("Hello", "and not a text: use generate"),
        (b"Hello", "and not a text"),
        ({"text": "hi"}, "not dict"),
        ({1, 2}, "not set"),
        (["Hello"], "message 1 is of the type str"),
        ([TURN, None], "message 2 is None"),
        ([("user", "hi")], "message 1 is of the type tuple"),
        ([[TURN]], "message 1 is of the type list"),
        ([{"content": "hi"}], "message 1 has no role"),
        ([{"role": None, "content": "hi"}], "message 1 has no role"),
        ([{"role": 3, "content": "hi"}], "message 1 has no role"),
        ([{"role": "usr", "content": "hi"}], "unknown role 'usr': use system, user, assistant, tool, developer"),
        ([{"role": "user"}], "message 1 has no content"),
        ([{"role": "user", "content": None}], "message 1 has no content"),
        ([TURN, {"role": "assistant", "content": 5}], "message 2 has of the type int for content"),
        ([{"role": "user", "content": b"hi"}], "for content: it must be text"),
        ([{"role": "user", "content": {"type": "text", "text": "hi"}}], "of the type dict for content"),
        ([{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}], "a part of the type 'image_url'"),
        ([{"role": "user", "content": [{"type": "input_audio"}]}], "'input_audio': this library reads text alone"),
        ([{"role": "user", "content": [{"text": "hi"}]}], "has a part that is of the type dict"),
        ([{"role": "user", "content": [3]}], "has a part that is of the type int"),
        ([{"role": "user", "content": [{"type": "text"}]}], "of the type 'text' without text"),
        ([{"role": "user", "content": "\ud83d"}], "content of message 1 holds half of a character"),
        ([{"role": "user", "content": [{"type": "text", "text": "\ud83d"}]}], "half of a character"),
    ],
    ids=shown,
)
def test_what_are_no_messages_is_refused_in_one_sentence(llm: LLM, messages: Any, says: str) -> None:
    for way in (llm.chat, llm.chat_prompt):
        with pytest.raises(PromptError, match=says) as error:
            way(messages)
        assert "\n" not in str(error.value)


TEMPLATES: list[tuple[Any, str]] = [
    ("{{ raise_exception('System role not supported') }}", "refuses these messages: System role not supported"),
    ("{{ messages[7].content }}", "refuses these messages"),
    ("{{ messages[0].content + 5 }}", "refuses these messages"),
    ("{% if %}", "refuses these messages"),
    ("{{ 1 / 0 }}", "refuses these messages"),
    ("{{ messages[0].nowhere.at.all }}", "refuses these messages"),
    ({"rag": "x", "tool_use": "y"}, "has the chat templates rag, tool_use and no default"),
    (None, "no chat template: give a plain prompt instead, or use a model that was made for chats"),
    ("", "no chat template"),
]


def templated(template: Any) -> LLM:
    llm = object.__new__(LLM)
    llm.tokenizer = tiny_tokenizer()
    llm.tokenizer.chat_template = template
    return llm


@pytest.mark.parametrize(("template", "says"), TEMPLATES, ids=shown)
def test_a_template_that_is_missing_or_refuses_is_told_of_in_one_sentence(template: Any, says: str) -> None:
    llm = templated(template)
    with pytest.raises(PromptError, match=says) as error:
        llm.chat_prompt([TURN])
    assert "\n" not in str(error.value)


def test_a_template_that_sees_text_as_parts_alone_gets_parts() -> None:
    """As those of vision models are: of a text they would take nothing, without a word."""
    part = "{% for c in m['content'] if c['type'] == 'text' %}{{ c['text'] }}{% endfor %}"
    llm = templated("{% for m in messages %}" + part + "{% endfor %}")
    assert llm.chat_prompt([TURN]) == IDS
    assert llm.chat_prompt([{"role": "user", "content": PARTS}]) == IDS


def test_a_template_may_know_roles_of_its_own_and_answers_may_hold_calls_alone() -> None:
    llm = templated("{% for m in messages if m.role == 'critic' or m.tool_calls %}{{ m.content }}{% endfor %}A tree")
    calls = {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "f", "arguments": {}}}]}
    expected = TOKENIZER(TEXT + "A tree").input_ids
    assert llm.chat_prompt([{"role": "critic", "content": TEXT}, calls]) == expected
    named = templated({"default": "{{ messages[0].content }}", "tool_use": "no"})
    assert named.chat_prompt([TURN]) == IDS


def test_references_may_be_none_and_hold_whole_characters_alone(llm: LLM) -> None:
    expected = llm.generate([IDS], FEW)[0]
    for reference in (None, (), [], TEXT, [TEXT, OTHERS]):
        same(llm.generate([IDS], FEW, reference=reference)[0], expected)
    with pytest.raises(PromptError, match=r"the reference holds half of a character"):
        llm.generate([IDS], FEW, reference="\ud83d")
    with pytest.raises(PromptError, match=r"the reference 2 holds half of a character"):
        llm.stream([IDS], FEW, reference=["ok", "\ud83d"])


def test_the_tokenizer_of_a_processor_will_do_and_so_will_a_name(tmp_path: Path) -> None:
    TOKENIZER.save_pretrained(tmp_path)
    model = tiny("llama", vocab_size=len(TOKENIZER))
    model.config.save_pretrained(tmp_path)
    for given in (SimpleNamespace(tokenizer=TOKENIZER), tmp_path, str(tmp_path)):
        llm = LLM(model, "none", tokenizer=given)  # type: ignore[arg-type]
        assert isinstance(llm.tokenizer, PreTrainedTokenizerFast)
        assert llm.generate(TEXT, FEW)[0].prompt_token_ids == IDS
