"""Damaged and foreign files of each kind: no crash, no traceback, and no text changed."""

from __future__ import annotations

import pytest
from benchmarks.fuzz_files import KINDS, failures

FILES = 6  # of each kind; `python -m benchmarks.fuzz_files` reads a thousand, of these kinds too:
ALIKE = {  # what reads them also reads another kind
    "EAGLE-3, speculators'", "block, z-lab's layout", "block, speculators'", "packed GGUF", "packed Gemma 3",
    "packed Qwen3", "GGUF, Gemma 3", "GGUF, Qwen3",
}  # fmt: skip


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind not in ALIKE])
def test_files_are_refused_made_again_or_change_nothing(kind: str) -> None:
    counts, wrong = failures(kind, FILES, seed=1)
    assert not wrong
    assert sum(counts.values()) == FILES
    assert counts["as plain"] < FILES  # else nothing was changed
