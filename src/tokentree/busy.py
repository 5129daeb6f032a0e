"""Whether other programs take this one's CPUs."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path

TASKS = Path("/proc/self/task")  # Linux


def waited() -> float | None:
    """Seconds so far in which threads of this process could have run and had no CPU, all of them together; None where
    the system doesn't tell."""
    nanoseconds, known = 0, False
    for file in TASKS.glob("*/schedstat"):
        with suppress(OSError, ValueError, IndexError):  # a thread that has just ended
            nanoseconds += int(file.read_text().split()[1])
            known = True
    return nanoseconds / 1e9 if known else None
