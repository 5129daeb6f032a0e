"""Folders of trainings in which a file is missing, damaged or something else: gone on with, or told in a sentence; and
nothing that was there is lost."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file

from tests.conftest import all_pairs, shown
from tests.tiny_models import tiny, tiny_tokenizer
from tokentree import LLM
from tokentree.errors import TokenTreeError
from tokentree.train.job import MADE, check_folder
from tokentree.train.loop import Recipe
from tokentree.train.run import Trained, train_medusa
from tokentree.train.run_eagle import train_eagle


class World:
    """Trainings of two kinds, each finished, and interrupted in its midst."""

    def __init__(self, folder: Path) -> None:
        small = tiny("llama", vocab_size=300, max_position_embeddings=96)
        self.llm = LLM(small, tokenizer=tiny_tokenizer(), max_batch=4)
        self.folders = {(kind, stage): folder / kind / stage for kind in ("medusa", "eagle") for stage in STAGES}
        for (kind, stage), out in self.folders.items():
            self.train(kind, out, stop_after=2 if stage == "interrupted" else None)
            for name in MADE if stage == "interrupted" else ():
                (out / name).unlink(missing_ok=True)

    def train(self, kind: str, out: Path, **options: Any) -> Trained:
        options |= {"tokens": 120, "console": Console(file=StringIO())}
        if kind == "eagle":
            recipe = Recipe(batch_size=2, epochs=1, evaluate_every=1)
            return train_eagle(self.llm, "tiny", "self", out, recipe, unroll=1, version=1, **options)
        recipe = Recipe(batch_size=32, epochs=1, evaluate_every=1)
        return train_medusa(self.llm, "tiny", "self", out, recipe, num_heads=1, **options)


STAGES = ("finished", "interrupted")


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return World(tmp_path_factory.mktemp("trainings"))


def as_folder(file: Path) -> None:
    file.unlink()
    file.mkdir()
    (file / "mine").write_text("mine")


DAMAGE: dict[str, Callable[[Path], Any]] = {
    "missing": lambda file: file.unlink(), "empty": lambda file: file.write_bytes(b""),
    "half": lambda file: file.write_bytes(file.read_bytes()[: file.stat().st_size // 2]),
    "zeros": lambda file: file.write_bytes(bytes(file.stat().st_size)),
    "other": lambda file: file.write_text("[1]"), "a folder": as_folder,
}  # fmt: skip
DAMAGED = "is damaged"
TOLD: dict[str, dict[str, str]] = {  # of a file's damage, what is told; else the training goes on
    "settings.json": {"missing": "holds config.json already"},
    "about.json": dict.fromkeys(("empty", "half", "zeros", "other"), r"about\.json' is damaged.*remove it if"),
    "checkpoint.pt": dict.fromkeys(("empty", "half", "zeros", "other"), r"checkpoint\.pt' is damaged: remove it"),
    "texts.jsonl": dict.fromkeys(("empty", "zeros", "other"), "doesn't hold what a model wrote"),
}
SETTINGS = dict.fromkeys(("empty", "half", "zeros", "other"), r"settings\.json' is damaged, .* or begin anew")


@pytest.mark.parametrize(("stage", "kind"), all_pairs(STAGES, ["medusa", "eagle"]), ids=shown)
def test_each_file_damaged_in_turn(world: World, kind: str, stage: str, tmp_path: Path) -> None:
    before, whole = world.folders[kind, stage], load_file(world.folders[kind, "finished"] / "model.safetensors")
    files = [file.relative_to(before) for file in before.rglob("*") if file.is_file() and "events" not in str(file)]
    assert len(files) == (9 if stage == "finished" else 6)
    for file in files:
        for damage, spoil in DAMAGE.items():
            if file.name == ".lock":
                continue
            out = tmp_path / "out"
            shutil.copytree(before, out)
            spoil(out / file)
            left = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
            told = TOLD.get(file.name, {}) | (SETTINGS if file.name == "settings.json" else {})
            reason = told.get(
                damage, "Is a directory|it is a folder|holds config.json" if damage == "a folder" else None
            )
            if file.name == "texts-begun.jsonl" or (file.name, stage, damage) == (
                "settings.json",
                "interrupted",
                "missing",
            ):
                reason = None
            if reason is None:
                world.train(kind, out)
                made = load_file(out / "model.safetensors")
                assert all(torch.equal(made[name], whole[name]) for name in whole), (file, damage)
            else:
                with pytest.raises(TokenTreeError, match=reason) as error:
                    world.train(kind, out)
                assert "\n" not in str(error.value)
                lost = [path for path in left if not path.is_file() or path.stat().st_size < len(left[path])]
                assert not lost, (file, damage)
            shutil.rmtree(out)


def test_force_begins_anew_where_settings_are_damaged(world: World, tmp_path: Path) -> None:
    shutil.copytree(world.folders["medusa", "finished"], tmp_path / "out")
    (tmp_path / "out" / "work" / "settings.json").write_text("{")
    world.train("medusa", tmp_path / "out", force=True)
    world.train("medusa", tmp_path / "out")


@pytest.mark.parametrize("part", ["work", "work/hidden", "work/events"])
def test_files_where_folders_belong_are_told(world: World, part: str, tmp_path: Path) -> None:
    shutil.copytree(world.folders["medusa", "interrupted"], tmp_path / "out")
    shutil.rmtree(tmp_path / "out" / part)
    (tmp_path / "out" / part).write_text("mine")
    with pytest.raises(TokenTreeError, match=r"^can't write .*: (File exists|Not a directory)$"):
        world.train("medusa", tmp_path / "out")
    assert (tmp_path / "out" / part).read_text() == "mine"


def test_a_name_that_no_folder_can_have_is_told(tmp_path: Path) -> None:
    with pytest.raises(TokenTreeError, match=r"^can't write .*: File name too long$"):
        check_folder(tmp_path / ("x" * 300))


@pytest.mark.skipif(os.geteuid() != 0 or sys.platform != "linux", reason="mounts a small file system")
def test_a_disk_that_can_only_be_read_is_told_and_left_alone(world: World, tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "tmpfs", str(disk)], check=False).returncode:
        pytest.skip("file systems can't be mounted here")
    try:
        for stage in STAGES:
            shutil.copytree(world.folders["medusa", stage], disk / stage)
        subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
        for out in (disk / "finished", disk / "interrupted", disk / "new"):
            with pytest.raises(TokenTreeError, match=r"^can't write .*: Read-only file system$"):
                world.train("medusa", out)
        for work in (disk / "interrupted" / "work", disk / "new"):
            with pytest.raises(TokenTreeError, match=r"^can't write .*: Read-only file system$"):
                world.train("medusa", tmp_path / "out", work=work)
    finally:
        subprocess.run(["umount", str(disk)], check=True)
