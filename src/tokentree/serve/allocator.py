"""How the C library gets memory from the system, in a process that serves for days."""

from __future__ import annotations

import ctypes
import os
import sys

# by the name of a setting of glibc: what mallopt(3) calls it, what it is set to here, and the user's variable
SETTINGS = {
    "mmap_threshold": (-3, 1 << 20, "MALLOC_MMAP_THRESHOLD_"),  # bytes from which on a block is mapped by itself
    "arena_max": (-8, 2, "MALLOC_ARENA_MAX"),  # heaps that threads share
}


def keep_memory_level() -> list[str]:
    """From now on ``malloc`` maps each large block by itself, and gives it back once it is freed; and threads share two
    heaps.

    Left alone, glibc maps ever fewer: where a mapped block is freed, smaller ones aren't mapped any more, up to those
    of 32 MiB (mallopt(3)). They then lie between small ones, in a heap for each thread, and what is freed of them stays
    with the process. Its memory creeps, though nothing is kept.

    Returns:
        What was set: nothing where the C library is another one, nor what the user has set, in a variable of its own
        or in ``GLIBC_TUNABLES``.
    """
    library = ctypes.CDLL(None) if sys.platform == "linux" else None
    if library is None or not hasattr(library, "gnu_get_libc_version"):
        return []
    tunables = os.environ.get("GLIBC_TUNABLES", "")
    return [
        name
        for name, (number, value, variable) in SETTINGS.items()
        if variable not in os.environ and f"glibc.malloc.{name}" not in tunables and library.mallopt(number, value)
    ]
