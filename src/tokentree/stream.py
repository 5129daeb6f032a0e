"""The tokens of one request as they come."""

from __future__ import annotations

import inspect
import threading
from collections.abc import Generator, Iterable, Iterator
from typing import Protocol

from tokentree.kernels.threads import check_fork
from tokentree.pieces import Piece, Pieces
from tokentree.result import Result
from tokentree.sequence import Sequence
from tokentree.sharing import Events


class Decodes(Protocol):
    """What a `Stream` needs of an `LLM`."""

    def run(self, seqs: Iterable[Sequence], max_batch: int | None = None) -> Generator[Events]: ...

    def pieces(self, seq: Sequence) -> Pieces: ...

    def result(self, seq: Sequence) -> Result: ...


class Stream:
    """An iterator over the tokens of one request, as they come.

    Several threads may read one stream. Each token goes to one of them.
    """

    def __init__(self, llm: Decodes, seq: Sequence) -> None:
        self._llm, self._seq, self._closed, self._turn = llm, seq, threading.Event(), threading.RLock()
        self._pieces = _pieces(llm, seq, self._closed)

    def __iter__(self) -> Iterator[Piece]:
        return self

    def __next__(self) -> Piece:
        check_fork()
        with self._turn:
            return next(self._pieces)

    def close(self) -> None:
        """Stops decoding, and drops the request's KV. Another thread that waits for the next token still gets it, and
        none after it."""
        self._closed.set()
        if self._turn.acquire(blocking=False):
            try:
                if inspect.getgeneratorstate(self._pieces) != inspect.GEN_RUNNING:  # as in a step of its own
                    self._pieces.close()
            finally:
                self._turn.release()

    @property
    def result(self) -> Result:
        """The text so far, also after an interruption or an error."""
        return self._llm.result(self._seq)


def _pieces(llm: Decodes, seq: Sequence, closed: threading.Event) -> Generator[Piece]:
    """Decodes ``seq`` step by step. No method of `Stream`, so that a dropped stream drops its KV at once."""
    pieces = llm.pieces(seq)
    for events in llm.run([seq], 1):
        for _, event in events:
            for piece in pieces.of(event):
                yield piece
                if closed.is_set():
                    return
    if seq.error is not None:
        raise seq.error
