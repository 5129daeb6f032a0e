"""Damaged and foreign files of each kind: no crash, no traceback, and no text changed."""

from __future__ import annotations

import pytest
from benchmarks.fuzz_files import KINDS, failures

FILES = 6  # of each kind; `python -m benchmarks.fuzz_files` reads a thousand


@pytest.mark.parametrize("kind", KINDS)
def test_files_are_refused_made_again_or_change_nothing(kind: str) -> None:
    counts, wrong = failures(kind, FILES, seed=1)
    assert not wrong
    assert sum(counts.values()) == FILES
    assert counts["as plain"] < FILES  # else nothing was changed
