"""Compiled code that is kept, and belongs to its sources."""

from __future__ import annotations

import ast
import inspect
import os
import re
import shutil
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from tests import forked
from tests.forked import Forked
from tests.test_layers import MODULES, SOURCE, _imports
from tokentree import jit
from tokentree.jit import KeptCode, compiled_folder, imported, njit
from tokentree.tree import Ints

# calls a loop of `growing.py` into which one of `tree.py` is compiled
TAKE = """
import numpy as np
from tokentree.growing import planted, take_marked
print(take_marked(*planted(7, 2), np.ones(1, np.bool_), 1)[2:], sum(take_marked.stats.cache_hits.values()))
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("TOKENTREE_COMPILED", str(tmp_path / "kernels"))
    jit._used.cache_clear()
    return tmp_path / "kernels"


def running(source: Path, program: str, **env: str) -> subprocess.CompletedProcess[str]:
    """``program`` with the package that lies in ``source``, or is to run when it comes to that."""
    everything = {**os.environ, "PYTHONPATH": str(source), "PYTHONDONTWRITEBYTECODE": "1", **env}
    return subprocess.run([sys.executable, "-c", program], env=everything, capture_output=True, text=True, check=False)


def fresh() -> Callable[[int], int]:
    """A function that nothing has compiled yet."""

    def twice(x: int) -> int:
        return 2 * x

    return njit(cache=True)(twice)


def test_a_kernel_that_another_file_s_holds_is_compiled_again_once_its_source_changes(
    folder: Path, tmp_path: Path
) -> None:  # fmt: skip
    shutil.copytree(SOURCE, tmp_path / "src" / "tokentree", ignore=shutil.ignore_patterns("__pycache__"))
    other = tmp_path / "src" / "tokentree" / "tree.py"
    before = other.read_text()
    after = before.replace("is_chain, depths[0] = True, 0", "is_chain, depths[0] = False, 0")
    assert after != before

    def says() -> tuple[str, int]:
        done = running(tmp_path / "src", TAKE)
        assert not done.stderr
        numbers, hits = done.stdout.rsplit(maxsplit=1)
        return numbers, int(hits)

    first = says()
    other.write_text(after)
    changed = says()
    assert changed[1] == 0
    assert changed[0] != first[0]
    other.write_text(before)
    assert says() == (first[0], 1)  # as it was kept at first


def test_all_that_a_file_imports_counts() -> None:
    names = {path: name for name, path in MODULES.items()}
    for name, path in MODULES.items():
        direct = {MODULES[part] for part in _imports(ast.parse(path.read_text())) if part}
        assert direct <= imported([path]), name
    steps = {names[path] for path in imported([MODULES["engines.cpu.step_loops"]])}
    kernels = {f"kernels.{name}" for name in ("rowwise", "bfloat16", "threads", "attention")}
    assert steps >= {*kernels, "engines.cpu.step_loops", "jit"}
    assert "cli.main" not in steps
    rates = {names[path] for path in imported([MODULES["shapes.rates"]])}  # modules of packages, and not the packages
    assert {"draft", "growing"} < rates
    assert not {"", "llm"} & rates


def test_all_compiled_code_is_kept_here() -> None:
    own = re.compile(
        r"from numba import .*\b(njit|jit|cfunc|vectorize)\b|numba\.(njit|jit|cfunc|vectorize)\([^)]*cache"
    )
    theirs = [name for name, path in MODULES.items() if name != "jit" and own.search(path.read_text())]
    assert not theirs, "these use numba's own cache, which doesn't know what a kernel calls: take tokentree.jit's"


def test_code_is_found_again_and_belongs_to_a_signature(folder: Path) -> None:
    assert [fresh()(4), fresh()(5)] == [8, 10]
    assert len(list(folder.glob("test_jit-*/*"))) == 1
    again = fresh()
    assert again(6) == 12
    assert sum(again.stats.cache_hits.values()) == 1  # type: ignore[attr-defined]
    assert np.array_equal(again(np.arange(3)), [0, 2, 4])  # type: ignore[arg-type]
    assert len(list(folder.glob("test_jit-*/*"))) == 2


def test_what_a_closure_holds_counts(folder: Path) -> None:
    def times(factor: int) -> Callable[[int], int]:
        @njit(cache=True)
        def product(x: int) -> int:
            return factor * x

        return product

    assert [times(3)(2), times(5)(2), times(3)(2)] == [6, 10, 6]


def test_options_count(folder: Path) -> None:
    def last(x: Ints) -> int:
        return int(x[5])

    assert njit(cache=True, boundscheck=False)(last)(np.arange(6)) == 5
    with pytest.raises(IndexError):
        njit(cache=True, boundscheck=True)(last)(np.arange(5))


@pytest.mark.parametrize("harm", ["flip", "cut", "empty", "noise"])
def test_what_is_damaged_is_compiled_again(folder: Path, harm: str) -> None:
    fresh()(4)
    (file,) = folder.glob("test_jit-*/*")
    whole = file.read_bytes()
    flipped = bytearray(whole)
    flipped[len(whole) // 2] ^= 1
    file.write_bytes({"flip": bytes(flipped), "cut": whole[:-9], "empty": b"", "noise": b"noise" * 999}[harm])
    with pytest.warns(UserWarning, match=r"is damaged: it is made again$"):
        assert fresh()(4) == 8
    again = fresh()
    assert again(4) == 8
    assert sum(again.stats.cache_hits.values()) == 1  # type: ignore[attr-defined]


def test_what_belongs_to_another_user_is_not_read(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fresh()(4)
    monkeypatch.setattr(os, "getuid", lambda: 12345)
    again = fresh()
    with pytest.warns(UserWarning, match="compiled code isn't kept.*another user"):
        assert again(4) == 8
    assert not again.stats.cache_hits  # type: ignore[attr-defined]


def test_nobody_else_can_read_or_write_it(folder: Path) -> None:
    fresh()(4)
    assert [path.stat().st_mode & 0o77 for path in (folder, *folder.iterdir())] == [0, 0]


def test_without_a_place_to_write_it_works_and_says_so_once(tmp_path: Path) -> None:
    home = {"HOME": os.devnull, "XDG_CACHE_HOME": "", "TOKENTREE_CACHE": "", "TOKENTREE_COMPILED": ""}
    done = running(SOURCE.parent, "from tokentree import TokenTree\nprint(TokenTree.chain(1, [2, 3]))" + TAKE, **home)
    assert done.returncode == 0, done.stderr
    assert len(done.stderr.splitlines()) == 1, done.stderr
    assert "compiled code isn't kept" in done.stderr


def test_two_processes_compile_at_once(folder: Path) -> None:
    command = [sys.executable, "-c", TAKE]
    both = [Forked(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) for _ in range(2)]
    (first, told), (second, more) = (process.communicate() for process in both)
    assert not told + more
    assert first == second
    assert forked.run(command).stdout.split()[-1] == "1"


def test_the_code_of_few_versions_stays(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for version in range(jit.VERSIONS_KEPT + 3):
        monkeypatch.setattr(jit, "fingerprint", lambda roots, version=version: f"version{version}")
        fresh()(4)
        (path,) = folder.glob(f"test_jit-version{version}")
        os.utime(path, (version, version))
    kept = {path.name for path in folder.iterdir()}
    assert len(kept) == jit.VERSIONS_KEPT
    assert f"test_jit-version{version}" in kept
    assert "test_jit-version0" not in kept


def test_what_is_in_use_stays_whatever_the_clock_says(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for version in range(jit.VERSIONS_KEPT):
        (later := folder / f"test_jit-later{version}").mkdir(parents=True)
        os.utime(later, (1e10, 1e10))
    monkeypatch.setattr(jit, "fingerprint", lambda roots: "now")
    fresh()(4)
    assert (folder / "test_jit-now").is_dir()
    assert len(list(folder.iterdir())) == jit.VERSIONS_KEPT


def test_without_sources_nothing_is_kept(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(inspect, "getfile", lambda function: "/nowhere/frozen.py")
    with pytest.warns(UserWarning, match="compiled code isn't kept"):
        made = fresh()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert made(4) == 8
    assert not folder.exists()
    assert isinstance(made._cache, KeptCode)  # type: ignore[attr-defined]
    assert compiled_folder() == folder
