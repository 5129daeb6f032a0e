"""Memory of a server: large blocks that are freed between others go back to the system."""

from __future__ import annotations

import platform
import subprocess
import sys
from pathlib import Path

import pytest

from tests.forked import Forked
from tokentree.serve.allocator import map_large_blocks

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
@pytest.mark.parametrize("threshold", [None, "33554432"])
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


@pytest.mark.parametrize("told", [("MALLOC_MMAP_THRESHOLD_", "1"), ("GLIBC_TUNABLES", "glibc.malloc.mmap_threshold=1")])
def test_what_a_user_has_set_stays(told: tuple[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(*told)
    assert not map_large_blocks()


def test_another_system_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "platform", "darwin")
    assert not map_large_blocks()
