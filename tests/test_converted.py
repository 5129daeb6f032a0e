"""What is converted once, and when it is converted again."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tokentree.converted import converted
from tokentree.errors import ModelError


class Text:
    """Something that is saved as transformers' objects are."""

    def __init__(self, text: str) -> None:
        self.text = text

    def save_pretrained(self, folder: Path) -> None:
        (folder / "text").write_text(self.text)


def _load(folder: Path) -> Text:
    if not (folder / "text").is_file():
        raise ModelError("there is no text")
    return Text((folder / "text").read_text() + ", loaded")


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("TOKENTREE_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def file(tmp_path: Path) -> Path:
    file = tmp_path / "model.gguf"
    file.write_text("weights")
    return file


def _get(file: Path, part: str = "bfloat16", text: str = "made") -> str:
    return converted(file, part, lambda: Text(text), _load).text


def test_it_is_converted_once(cache: Path, file: Path) -> None:
    assert [_get(file) for _ in range(3)] == ["made", "made, loaded", "made, loaded"]
    assert not list(cache.rglob("*.part"))


def test_parts_and_files_are_told_apart(cache: Path, file: Path, tmp_path: Path) -> None:
    other = tmp_path / "below" / "model.gguf"
    other.parent.mkdir()
    other.write_text("weights")
    assert [_get(file), _get(file, "float32"), _get(other)] == ["made"] * 3


def test_a_file_that_changed_is_converted_again_and_takes_the_old_one_s_place(cache: Path, file: Path) -> None:
    _get(file)
    file.write_text("other weights")
    assert [_get(file, text="new") for _ in range(2)] == ["new", "new, loaded"]
    assert len(list(cache.rglob("text"))) == 1


@pytest.mark.parametrize("spoil", ["text", "source.json"])
def test_what_is_spoilt_is_converted_again(cache: Path, file: Path, spoil: str) -> None:
    _get(file)
    next(cache.rglob(spoil)).unlink()
    assert [_get(file, text="new") for _ in range(2)] == ["new", "new, loaded"]


def test_another_version_of_transformers_converts_anew(cache: Path, file: Path) -> None:
    _get(file)
    source = next(cache.rglob("source.json"))
    source.write_text(json.dumps(json.loads(source.read_text()) | {"transformers": "0.1"}))
    assert _get(file) == "made"


def test_without_room_in_the_cache_it_goes_on_with_a_warning(cache: Path, file: Path) -> None:
    cache.write_text("a file where the folder should be")
    with pytest.warns(UserWarning, match="the converted model isn't kept"):
        assert _get(file) == "made"
    assert file.read_text() == "weights"


def test_what_can_t_be_converted_leaves_nothing(cache: Path, file: Path) -> None:
    def fail() -> Text:
        raise ModelError("no")

    with pytest.raises(ModelError, match="no"):
        converted(file, "bfloat16", fail, _load)
    assert not cache.exists()
