"""Where files are kept between runs, and how they are written: whole or not at all, by one process at a time, for this
user alone. What is kept can be made again: where nothing can be written, or what is there is damaged, that happens, and
one line tells so."""

from __future__ import annotations

import hashlib
import os
import tempfile
import warnings
import zlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from filelock import FileLock
from platformdirs import user_cache_path

DIGEST = hashlib.sha256().digest_size  # bytes
PART = 1 << 24  # bytes of a file that one thread takes
READ = 1 << 18  # bytes that are read at a time: what a thread has allocated stays its own
PATIENCE = 60.0  # seconds that another process may keep one waiting


def cache_folder() -> Path:
    """The folder of everything that can be made again: ``$TOKENTREE_CACHE``, or the platform's cache folder."""
    if own := os.environ.get("TOKENTREE_CACHE"):
        return Path(own)
    nowhere = Path(os.devnull) / "tokentree"  # of a user who has no home, which some versions of platformdirs call "~"
    try:
        folder = user_cache_path("tokentree", appauthor=False)
    except RuntimeError:
        return nowhere
    return nowhere if folder.parts[:1] == ("~",) else folder


@contextmanager
def replacing(target: Path) -> Iterator[Path]:
    """Yields an unused path beside ``target`` to write a file or a folder to. When the block ends, what was written
    takes the place of ``target`` in one step; when it raises, ``target`` stays as it was. A file is on the disk by
    then. Of a folder, `locked` keeps others away meanwhile.

    Raises:
        OSError: if it can't be written.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=f".{target.name}.", ignore_cleanup_errors=True) as room:
        part, old = Path(room) / target.name, Path(room) / "old"
        yield part
        if part.is_file():
            with part.open("rb+") as written:
                os.fsync(written.fileno())
        elif target.is_dir():  # a folder that isn't empty can't be replaced by a rename
            target.rename(old)
        try:
            part.replace(target)
        except OSError:
            if old.exists():
                old.rename(target)
            raise


@contextmanager
def locked(target: Path) -> Iterator[None]:
    """Holds the lock of ``target`` against other threads and processes.

    Raises:
        OSError: if the lock file can't be written, or another process, which may have been stopped, holds the lock
            for more than `PATIENCE`.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(target.with_name(f".{target.name}.lock"), timeout=PATIENCE):
        yield


# -- files of this user alone ------------------------------------------------------------------------------------------


def private(folder: Path) -> Path:
    """``folder``, which is made if it isn't there, for nobody else to read.

    Raises:
        OSError: if it can't be made, or belongs to somebody else.
    """
    for parent in (*reversed(folder.parents), folder):
        if not os.path.exists(parent):
            parent.mkdir(mode=0o700, exist_ok=True)
    if not ours(folder):
        raise PermissionError(f"{str(folder)!r} belongs to another user")
    return folder


def ours(path: Path) -> bool:
    """Whether ``path`` is there and belongs to this user, who alone may say what is trusted."""
    try:
        return not hasattr(os, "getuid") or path.stat().st_uid == os.getuid()
    except OSError:
        return False


def seal(file: Path) -> None:
    """Puts the digest of what is in ``file`` at its end."""
    digest = digest_of(file)
    with file.open("ab") as sealed:
        sealed.write(digest)


def intact(file: Path) -> bool:
    """Whether ``file`` is there, is this user's, and is as it was when it was sealed; that it has changed is told."""
    if not (ours(file) and ours(file.parent)):
        return False
    try:
        size = file.stat().st_size - DIGEST
        with file.open("rb") as sealed:
            sealed.seek(max(0, size))
            digest = sealed.read()
        whole = size >= 0 and digest_of(file, size) == digest
    except OSError:
        return False
    if not whole:
        damaged(file)
    return whole


def digest_of(file: Path, size: int | None = None) -> bytes:
    """A digest of the first ``size`` bytes of ``file``, or of all. It notices any byte that changes, in less time than
    it takes to read them from a disk (2 to 5 GB/s): it is one of checksums of parts, made in several threads.

    Raises:
        OSError: if it can't be read.
    """
    size = file.stat().st_size if size is None else size

    def checksum(start: int) -> int:
        with file.open("rb", buffering=0) as part:
            part.seek(start)
            view, left, found = memoryview(bytearray(min(READ, PART, size - start))), min(PART, size - start), 0
            while left and (count := part.readinto(view[:left])):
                found, left = zlib.crc32(view[:count], found), left - count
            return found

    starts = range(0, size, PART)
    if len(starts) < 2:
        sums = [checksum(start) for start in starts]
    else:
        with ThreadPoolExecutor(max_workers=min(8, len(starts))) as threads:
            sums = list(threads.map(checksum, starts))
    return hashlib.sha256(repr((size, sums)).encode()).digest()


# -- what is told ------------------------------------------------------------------------------------------------------


def damaged(path: Path) -> None:
    """Tells, once, that what is kept there can't be used as it is now."""
    _unusable(path, "is damaged")


def outdated(path: Path) -> None:
    """Tells, once, that what is kept there was written by another version of this library."""
    _unusable(path, "is of another version")


def _unusable(path: Path, why: str) -> None:
    try:
        found = path.stat()
    except OSError:  # another process made it again meanwhile
        return
    if (state := (path, found.st_mtime_ns, found.st_size)) in _told:
        return
    _told.add(state)
    tell(f"what is kept in {str(path)!r} {why}: it is made again")


def unkept(what: str, folder: Path, error: Exception) -> None:
    """Tells that ``what`` can't be kept in ``folder``; of folders that one cause keeps from being made, once."""
    there = next(path for path in (folder, *folder.absolute().parents) if os.path.exists(path))
    if (reason := (there, getattr(error, "errno", None))) not in _told:
        _told.add(reason)
        said = getattr(error, "strerror", None) or error
        tell(f"{what} kept in {str(folder)!r}, but made again at each start: {said}")


def tell(line: str) -> None:
    """Warns in one line: what is told is of no place in a program."""
    warnings.warn_explicit(line, UserWarning, "tokentree", 1)


_told = set[tuple[Any, ...]]()
