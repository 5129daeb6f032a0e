"""Where things are kept, and how they are written."""

from __future__ import annotations

import contextlib
import importlib
import os
import subprocess
import sys
from pathlib import Path

import pytest
from filelock import FileLock

import tokentree
from tests.forked import Forked
from tests.tiny_models import tiny, tiny_tokenizer
from tokentree import cache
from tokentree.cache import PART, cache_folder, intact, locked, ours, private, replacing, seal, unkept

# what two processes do at once, again and again: keep arrays, costs, a converted model and packed weights
AT_ONCE = """
import sys
from pathlib import Path
import numpy as np
import torch
import transformers
from tokentree.cache import cache_folder
from tokentree.converted import converted
from tokentree.costs import Measured, _add
from tokentree.engines.base import EngineOptions
from tokentree.loading import load_engine
from tokentree.drafters.lookup.storage import read_arrays, write_arrays

transformers.utils.logging.disable_progress_bar()
folder, model, me = Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3])

class Text:
    def save_pretrained(self, folder):
        (folder / "text").write_text("made")

for turn in range(8):
    write_arrays(folder / "memory.safetensors", {"tokens": np.full(50_000, me)})
    found = read_arrays(folder / "memory.safetensors", {"tokens": np.dtype(np.int64)})["tokens"]
    assert len(set(found.tolist())) == 1
    _add(cache_folder() / "costs.json", f"{me} {turn}", Measured(rows=[1, 2], seconds=[1.0, 2.0], per_sequence=0.0))
    (model / "config.json").touch()
    text = converted(model / "config.json", "text", Text, lambda where: (where / "text").read_text())
    assert isinstance(text, Text) or text == "made"
for turn in range(2):
    load_engine(model, EngineOptions(device=torch.device("cpu")))
"""


def test_what_two_processes_keep_at_once_is_whole(tmp_path: Path) -> None:
    model, memory = tmp_path / "model", tmp_path / "memory"
    tiny("llama", hidden_size=64, intermediate_size=96).save_pretrained(model)
    tiny_tokenizer().save_pretrained(model)
    env = {**os.environ, "TOKENTREE_CACHE": str(tmp_path / "cache"), "PYTHONWARNINGS": "error::UserWarning:tokentree"}
    both = [
        Forked([sys.executable, "-c", AT_ONCE, memory, model, str(me)], env=env, stderr=subprocess.PIPE)
        for me in range(2)
    ]
    told = [process.communicate()[1].decode() for process in both]
    assert [process.returncode for process in both] == [0, 0], "\n".join(told)
    known = (tmp_path / "cache" / "costs.json").read_text()
    assert all(f'"{me} {turn}"' in known for me in range(2) for turn in range(8))  # neither lost the other's
    left = [path.name for path in tmp_path.rglob(".*") if not path.name.endswith(".lock")]
    assert not left
    (packed,) = (tmp_path / "cache").glob("models/*/packed-bfloat16.pt")
    assert intact(packed)


@pytest.mark.parametrize(("before", "kind"), [("file", "file"), ("folder", "folder"), (None, "file"), (None, "folder")])
def test_what_is_written_takes_its_place_whole_or_not_at_all(before: str | None, kind: str, tmp_path: Path) -> None:
    target = tmp_path / "below" / "target"

    def write(path: Path, kind: str, text: str) -> None:
        if kind == "folder":
            path.mkdir(parents=True)
            path = path / "inner"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)

    def text() -> str | None:
        inner = target / "inner" if target.is_dir() else target
        return inner.read_text() if inner.exists() else None

    if before:
        write(target, before, "old")
    with contextlib.suppress(KeyboardInterrupt), replacing(target) as part:
        write(part, kind, "ha")
        raise KeyboardInterrupt
    assert text() == ("old" if before else None)
    with replacing(target) as part:
        write(part, kind, "new")
    assert text() == "new"
    assert [path.name for path in tmp_path.joinpath("below").iterdir()] == ["target"]


def test_a_lock_keeps_other_threads_and_processes_out(tmp_path: Path) -> None:
    wait = (
        "import sys; from pathlib import Path; from tokentree.cache import locked\nwith locked(Path(sys.argv[1])): pass"
    )
    with locked(tmp_path / "a"):
        other = Forked([sys.executable, "-c", wait, tmp_path / "a"])
        with pytest.raises(subprocess.TimeoutExpired):
            other.wait(2)
    assert other.wait(30) == 0


@pytest.mark.filterwarnings("ignore:what is kept")
@pytest.mark.parametrize("size", [0, 1, PART - 1, PART, PART + 1, 2 * PART + 5])
def test_a_seal_notices_every_change(size: int, tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_bytes(os.urandom(size))
    seal(file)
    assert intact(file)
    for at in {0, size // 2, max(0, size - 1), size, size + 31}:
        with file.open("r+b") as changed:
            changed.seek(at)
            byte = changed.read(1)
            changed.seek(at)
            changed.write(bytes([byte[0] ^ 4]))
        assert not intact(file)
        with file.open("r+b") as changed:
            changed.seek(at)
            changed.write(byte)
    assert intact(file)
    with file.open("ab") as longer:
        longer.write(b"x")
    assert not intact(file)


def test_damage_is_told_once_until_the_file_changes(tmp_path: Path) -> None:
    file = tmp_path / "file"
    for content in (b"x" * 40, b"x" * 50):
        file.write_bytes(content)
        with pytest.warns(UserWarning, match=r"^what is kept in .* is damaged: it is made again$") as told:
            found = [intact(file), intact(file)]
        assert (found, len(told)) == ([False, False], 1)


def test_folders_are_this_user_s_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert private(tmp_path / "a" / "b").stat().st_mode & 0o777 == 0o700
    assert (tmp_path / "a").stat().st_mode & 0o777 == 0o700
    assert not ours(tmp_path / "none")
    monkeypatch.setattr(os, "getuid", lambda: 12345)
    with pytest.raises(PermissionError, match="belongs to another user"):
        private(tmp_path / "a")


def test_a_user_without_a_home_has_no_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("TOKENTREE_CACHE", "XDG_CACHE_HOME", "HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(os.path, "expanduser", lambda path: path)  # as where the user is unknown
    with pytest.raises(OSError, match="Not a directory"):
        private(cache_folder())


def test_what_hides_behind_an_import_is_shown(tmp_path: Path) -> None:
    (tmp_path / "coverage").mkdir()  # numba imports what has this name, and reads its version
    command = [sys.executable, "-c", "from tokentree import LLM"]
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, check=False)
    assert "cannot import name" not in done.stderr
    assert done.returncode == 0 or "coverage" in done.stderr


def test_a_dependency_s_attribute_error_is_not_taken_for_a_missing_name(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(name: str) -> object:
        raise AttributeError(f"module 'coverage' has no attribute 'types', for {name}")

    monkeypatch.setattr(tokentree, "import_module", broken)
    with pytest.raises(ImportError, match="module 'coverage' has no attribute 'types'") as caught:
        _ = tokentree.Decoder
    assert isinstance(caught.value.__cause__, AttributeError)
    assert not hasattr(importlib.import_module("tokentree"), "Nothing")


@pytest.mark.parametrize("folder", ["x" * 300, "loop/below", "file/below"])
def test_that_nothing_can_be_kept_is_told_wherever_that_is(folder: str, tmp_path: Path) -> None:
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    (tmp_path / "file").touch()
    with pytest.raises(OSError) as error:  # noqa: PT011
        private(tmp_path / folder)
    with pytest.warns(UserWarning, match="made again at each start: [^:]*$"):
        unkept("what is made isn't", tmp_path / folder, error.value)


def test_a_lock_that_another_holds_for_ever_is_not_waited_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:  # fmt: skip
    """As a process does that was stopped."""
    monkeypatch.setattr(cache, "PATIENCE", 0.1)
    held = FileLock(tmp_path / ".target.lock")
    with held, pytest.raises(OSError, match="could not be acquired"), locked(tmp_path / "target"):
        pass
