"""Memory of a server: large blocks that are freed between others go back to the system."""

from __future__ import annotations

import ctypes
import platform
import subprocess
import sys
from pathlib import Path
from unittest.mock import Mock

import pytest

from tests.conftest import by_night
from tests.forked import Forked
from tokentree.serve.allocator import keep_memory_level

glibc = pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another C library")
# in the place of the server: what is left of large blocks that were freed
MEASURED = """
import sys
import numpy as np
import tokentree.serve.run as run
from tokentree.cli.main import main

def mebibytes():
    lines = open("/proc/self/status").read().splitlines()
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith("VmRSS"))

def measure(*_):
    before = mebibytes()
    np.ones(30 << 20, np.uint8)  # glibc by itself would now map blocks of more than that alone
    large, small = [], []
    for _ in range(20):
        large.append(np.ones(8 << 20, np.uint8))
        small.append(np.ones(1 << 20, np.uint8))
    large.clear()
    print("left", mebibytes() - before - 20)

run.serve = measure
main()
"""


@glibc
@pytest.mark.parametrize("threshold", by_night([None, "33554432"], but=[None]))
def test_large_blocks_of_a_server_go_back_to_the_system(
    folder: Path, threshold: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    if threshold is not None:  # a user's own setting holds
        monkeypatch.setenv("MALLOC_MMAP_THRESHOLD_", threshold)
    words = [sys.executable, "-W", "ignore", "-c", MEASURED, "serve", "-m", str(folder), "--port", "0"]
    process = Forked(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    said, wrong = process.communicate(timeout=120)
    assert "left" in said, wrong
    left = float(said.split("left")[1])
    assert left < 20 if threshold is None else left > 100


@glibc
@pytest.mark.parametrize(
    ("variable", "value", "left"),
    [
        ("MALLOC_MMAP_THRESHOLD_", "1", ["arena_max"]),
        ("MALLOC_ARENA_MAX", "1", ["mmap_threshold"]),
        ("GLIBC_TUNABLES", "glibc.malloc.mmap_threshold=1", ["arena_max"]),
        ("GLIBC_TUNABLES", "glibc.malloc.arena_max=1:glibc.malloc.mmap_threshold=1", []),
    ],
)
def test_what_a_user_has_set_stays(variable: str, value: str, left: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ctypes, "CDLL", lambda _: Mock(**{"mallopt.return_value": 1}))
    monkeypatch.setenv(variable, value)
    assert keep_memory_level() == left


def test_another_system_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "platform", "darwin")
    assert not keep_memory_level()
