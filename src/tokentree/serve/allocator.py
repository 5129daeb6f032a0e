"""How the C library gets memory from the system, in a process that serves for days."""

from __future__ import annotations

import ctypes
import os
import sys

MMAP_THRESHOLD = -3  # what mallopt(3) is told to set
LARGE = 4 << 20  # bytes: more than what sampling makes for each token, which would be mapped again and again


def map_large_blocks() -> bool:
    """From now on ``malloc`` maps each block of at least `LARGE` bytes by itself, and gives it back once it is freed.

    Left alone, glibc maps ever fewer: where a mapped block is freed, smaller ones aren't mapped any more, up to those
    of 32 MiB (mallopt(3)). They then lie between small ones, and what is freed of them stays with the process. Its
    memory creeps, though nothing is kept.

    Returns:
        Whether it does: not where the C library is another one, nor where the user has set this
        (``MALLOC_MMAP_THRESHOLD_``, ``GLIBC_TUNABLES``).
    """
    tunables = os.environ.get("GLIBC_TUNABLES", "")
    if "MALLOC_MMAP_THRESHOLD_" in os.environ or "glibc.malloc.mmap_threshold" in tunables:
        return False
    library = ctypes.CDLL(None) if sys.platform == "linux" else None
    if not hasattr(library, "gnu_get_libc_version"):
        return False
    return bool(library.mallopt(MMAP_THRESHOLD, LARGE))  # type: ignore[union-attr]
