"""What is converted once, and when it is converted again."""

from __future__ import annotations

import json
import os
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


def test_another_file_of_the_same_size_and_time_is_converted_again(cache: Path, file: Path) -> None:
    _get(file)
    before = file.stat()
    for new in ("in place", "by a rename"):
        other = "".join(reversed(file.read_text()))
        written = file if new == "in place" else file.with_name("new")
        written.write_text(other)
        os.utime(written, ns=(before.st_atime_ns, before.st_mtime_ns))
        written.replace(file)
        assert file.stat().st_mtime_ns == before.st_mtime_ns
        assert [_get(file, text=new) for _ in range(2)] == [new, f"{new}, loaded"]


def test_the_same_file_at_another_time_is_not_converted_again(cache: Path, file: Path) -> None:
    _get(file)
    os.utime(file, (0, 0))
    assert _get(file) == "made, loaded"


@pytest.mark.parametrize("harm", ["", "[]", "[" * 100_000, '{"model.gguf": 1}'])
def test_digests_that_make_no_sense_are_made_again(cache: Path, file: Path, harm: str) -> None:
    _get(file)
    next(cache.rglob("digests.json")).write_text(harm)
    assert _get(file) == "made, loaded"


@pytest.mark.parametrize("harm", [b"", b"mad", None])
def test_what_is_spoilt_is_converted_again_and_told(cache: Path, file: Path, harm: bytes | None) -> None:
    _get(file)
    text = next(cache.rglob("text"))
    text.unlink() if harm is None else text.write_bytes(harm)
    with pytest.warns(UserWarning, match=r"^what is kept in .* is damaged: it is made again$"):
        assert _get(file, text="new") == "new"
    assert _get(file, text="other") == "new, loaded"


@pytest.mark.parametrize("content", [None, "", "[]", "3", '{"source": 1}'])
def test_what_doesn_t_say_where_it_is_from_is_converted_again(cache: Path, file: Path, content: str | None) -> None:
    _get(file)
    source = next(cache.rglob("source.json"))
    source.unlink() if content is None else source.write_text(content)
    assert [_get(file, text="new") for _ in range(2)] == ["new", "new, loaded"]


def test_what_belongs_to_another_user_is_not_read(
    cache: Path, file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:  # fmt: skip
    _get(file)
    monkeypatch.setattr(os, "getuid", lambda: 12345)
    with pytest.warns(UserWarning, match="the converted model isn't kept.*another user"):
        assert _get(file, text="own") == "own"


def test_another_version_of_transformers_converts_anew(cache: Path, file: Path) -> None:
    _get(file)
    source = next(cache.rglob("source.json"))
    known = json.loads(source.read_text())
    known["source"]["transformers"] = "0.1"
    source.write_text(json.dumps(known))
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
    assert [path.name for path in cache.rglob("*") if path.is_file()] == ["digests.json"]
