"""Where files are kept between runs, and how they are written: whole or not at all, by one process at a time."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock
from platformdirs import user_cache_path


def cache_folder() -> Path:
    """The folder of everything that can be made again: ``$TOKENTREE_CACHE``, or the platform's cache folder."""
    own = os.environ.get("TOKENTREE_CACHE")
    return Path(own) if own else user_cache_path("tokentree", appauthor=False)


@contextmanager
def replacing(target: Path) -> Iterator[Path]:
    """Yields an unused path beside ``target`` to write a file or a folder to. When the block ends, what was written
    takes the place of ``target`` in one step; when it raises, ``target`` stays as it was.

    Raises:
        OSError: if it can't be written.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=f".{target.name}.", ignore_cleanup_errors=True) as room:
        part = Path(room) / target.name
        yield part
        if part.is_dir() and target.is_dir():  # a folder that isn't empty can't be replaced by a rename
            target.rename(Path(room) / "old")
        part.replace(target)


@contextmanager
def locked(target: Path) -> Iterator[None]:
    """Holds the lock of ``target`` against other threads and processes.

    Raises:
        OSError: if the lock file can't be written.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(target.with_name(f".{target.name}.lock")):
        yield
