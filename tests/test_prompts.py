"""Prompt files."""

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
