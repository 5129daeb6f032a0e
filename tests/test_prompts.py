"""Prompt files."""

import json
from pathlib import Path

import pytest

from tokentree.errors import PromptError
from tokentree.prompts import read_prompts


def _file(folder: Path, text: str) -> Path:
    file = folder / "tasks.jsonl"
    file.write_text(text, encoding="utf-8")
    return file


def test_turns_are_a_chat_and_a_bare_prompt_is_continued(tmp_path: Path) -> None:
    lines = '{"question_id": 7, "category": "a", "turns": ["x", "y"]}\n\n{"task_id": "T/1", "prompt": "def f():"}\n'
    first, second = read_prompts(_file(tmp_path, lines))
    assert (first.name, first.category, first.turns, first.chat) == ("7", "a", ("x", "y"), True)
    assert (second.name, second.category, second.turns, second.chat) == ("T/1", "tasks", ("def f():",), False)


def test_limits_count_per_category_and_per_prompt_and_categories_take_turns(tmp_path: Path) -> None:
    lines = "".join(f'{{"category": "{c}", "turns": ["{i}", "more"]}}\n' for i, c in enumerate("aabab"))
    found = read_prompts(_file(tmp_path, lines), per_category=2, turns=1)
    assert [(entry.category, entry.turns) for entry in found] == [
        ("a", ("0",)),
        ("b", ("2",)),
        ("a", ("1",)),
        ("b", ("4",)),
    ]


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "has no prompts"),
        ('{"prompt": "a"}\nnot json\n', "line 2"),
        ("[1]\n", 'neither "turns" nor "prompt"'),
        ('{"turns": []}\n', "empty turn"),
        ('{"turns": ["a", ""]}\n', "empty turn"),
        ('{"prompt": 3}\n', "not a text"),
    ],
)
def test_a_bad_file_is_one_sentence_that_names_the_line(tmp_path: Path, text: str, says: str) -> None:
    with pytest.raises(PromptError, match=says):
        read_prompts(_file(tmp_path, text))


def test_a_file_that_is_missing_or_not_text_says_so(tmp_path: Path) -> None:
    with pytest.raises(PromptError, match="No such file"):
        read_prompts(tmp_path / "none.jsonl")
    (tmp_path / "bytes.jsonl").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(PromptError, match="UTF-8"):
        read_prompts(tmp_path / "bytes.jsonl")


LINE = "a\u2028b\u2029c\x85d\x1ce\x0cf\x0bg"  # what `str.splitlines` ends a line at


@pytest.mark.parametrize("end", ["\n", "\r\n"])
@pytest.mark.parametrize("start", ["", "\ufeff"])
@pytest.mark.parametrize("ascii_only", [True, False])
def test_lines_end_at_newlines_alone(tmp_path: Path, start: str, end: str, ascii_only: bool) -> None:
    file = tmp_path / "tasks.jsonl"
    lines = [json.dumps({"prompt": LINE + str(i), "category": LINE}, ensure_ascii=ascii_only) for i in range(3)]
    file.write_bytes((start + end.join(["", *lines, "", ""])).encode())
    found = read_prompts(file)
    assert [entry.turns for entry in found] == [(f"{LINE}{i}",) for i in range(3)]
    assert [entry.name for entry in found] == ["2", "3", "4"]
    assert {entry.category for entry in found} == {LINE}


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (rb'{"prompt": "a\ud83d"}', "a turn on line 1 .* is not UTF-8 text: it has '.ud83d' at character 1"),
        (rb'{"turns": ["a", "\udc00b"]}', "is not UTF-8 text"),
        (rb'{"prompt": "a", "category": "\ud800"}', "the id or category on line 1"),
        (b'{"prompt": "a\x00"}', "NUL bytes"),
        (b'{"prompt": "a", "id": [1]}', "has a id that is neither"),
        (b'{"prompt": "a", "category": true}', "has a category that is neither"),
        (b'{"turns": "a"}', "not a text"),
        (b'{"turns": null}', "not a text"),
        (b'{"turns": [["a"]]}', "not a text"),
        (b'{"prompt": "  "}', "empty turn"),
        (b'{"prompt": {"a": 1}}', "not a text"),
        (b'"prompt"', "neither"),
        (b"[" * 100_000, "is not JSON"),
        (b"1" * 10_000, "is not JSON"),
        (b'{"prompt": "a", "id": 1}\n{"prompt": "b", "id": "1"}', "2 prompts of the category 'tasks' have the id '1'"),
        (b'{"prompt": "\xff"}', "it is not UTF-8 text"),
        (b'\xff\xfe{\x00"\x00', "it is not UTF-8 text"),
        (b'{"prompt": "a"}\r{"prompt": "b"}', "is not JSON"),
    ],
)
def test_what_is_no_prompt_is_one_sentence(tmp_path: Path, content: bytes, says: str) -> None:
    file = tmp_path / "tasks.jsonl"
    file.write_bytes(content)
    with pytest.raises(PromptError, match=says) as raised:
        read_prompts(file)
    assert "\n" not in str(raised.value)


def test_null_is_nothing(tmp_path: Path) -> None:
    (entry,) = read_prompts(_file(tmp_path, '{"prompt": "a", "id": null, "task_id": "t", "category": null}'))
    assert (entry.name, entry.category) == ("t", "tasks")


def test_a_huge_line_is_read_and_a_folder_is_not(tmp_path: Path) -> None:
    assert len(read_prompts(_file(tmp_path, json.dumps({"prompt": "a" * 5_000_000})))[0].turns[0]) == 5_000_000
    with pytest.raises(PromptError, match="Is a directory"):
        read_prompts(tmp_path)
