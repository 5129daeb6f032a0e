"""What look-ups of replicas learn, written and exchanged through a folder that they share."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from pathlib import Path

from tokentree.errors import OptionError
from tokentree.llm import LLM

LOG = logging.getLogger("tokentree.serve")

Stamp = tuple[tuple[str, int, int], ...]


class Memories:
    """Each replica writes a folder of its own, ``replica-0``, ``replica-1``, …, and only reads those of the others.

    Args:
        llm: whose drafters learn.
        folder: the folder that all share. None: nothing is kept.
        rank: the replica's number now. One that takes the place of another goes on with its folder.
        seconds: between two exchanges.
    """

    def __init__(self, llm: LLM, folder: str | None, rank: Callable[[], int], seconds: float) -> None:
        self._llm, self._rank, self._seconds = llm, rank, seconds
        self._folder = None if folder is None else Path(folder)
        self._read: dict[Path, Stamp] = {}  # what lay in a folder when it was read
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._work, name="memories", daemon=True)
        if self._folder is not None:
            self._try(self.read)
            self._thread.start()

    def read(self) -> None:
        """Takes in what the folder holds of all replicas, as far as it is new."""
        assert self._folder is not None
        for one in sorted(self._folder.glob("replica-*")):
            stamp = _stamp(one)
            if stamp and self._read.get(one) != stamp:
                self._read[one] = stamp
                self._llm.merge_memory(one)

    def write(self) -> None:
        """Writes what this replica knows."""
        assert self._folder is not None
        own = self._folder / f"replica-{self._rank()}"
        self._llm.save_memory(own)
        self._read[own] = _stamp(own)

    def exchange(self) -> None:
        """Both. What can't be read or written is logged, and tried again once it has changed."""
        self._try(self.read)
        self._try(self.write)

    def _try(self, call: Callable[[], None]) -> None:
        try:
            call()
        except OptionError as error:
            LOG.warning("memories aren't exchanged: %s", error)

    def close(self) -> None:
        """Writes for the last time."""
        self._over.set()
        if self._folder is not None:
            self._thread.join()
            self.exchange()

    def _work(self) -> None:
        while not self._over.wait(self._seconds):
            self.exchange()


def _stamp(folder: Path) -> Stamp:
    """By what files of a folder are told from later ones: name, time in nanoseconds, bytes."""
    found = []
    for file in sorted(folder.glob("*.safetensors")):
        try:
            known = file.stat()
        except FileNotFoundError:  # it was just replaced
            continue
        found.append((file.name, known.st_mtime_ns, known.st_size))
    return tuple(found)
