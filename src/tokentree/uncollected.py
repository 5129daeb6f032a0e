"""Where Python's garbage collector has nothing to find.

Imports, tokenizers and compiled code make a million objects that stay. While there are more and more of them, the
collector looks at all of them again and again. A drafter and the shape are made in here too, with what they load.
"""

from __future__ import annotations

import gc
import threading
from contextlib import ContextDecorator


class Uncollected(ContextDecorator):
    """Inside of it the collector rests, in all threads. It is on again when the last one has left, if it was before."""

    def __init__(self) -> None:
        self._lock, self._inside, self._was_on = threading.Lock(), 0, False

    def __enter__(self) -> None:
        with self._lock:
            if not self._inside:
                self._was_on = gc.isenabled()
                gc.disable()
            self._inside += 1

    def __exit__(self, *_: object) -> None:
        with self._lock:
            self._inside -= 1
            if self._was_on and not self._inside:
                gc.enable()


uncollected = Uncollected()
