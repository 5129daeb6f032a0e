"""What a function launches on a GPU, recorded once and played again by one call: a CUDA graph."""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Sequence as SequenceOf
from typing import Any, Generic, TypeVar
from weakref import WeakKeyDictionary

import torch

from tokentree.engines.kv import SequenceKV

ROWS = (2, 4, 8, 16, 32, 64)  # numbers of rows that are recorded

T = TypeVar("T")


def padded(count: int) -> int:
    """The least of `ROWS` that holds so many rows."""
    return next(rows for rows in ROWS if rows >= count)


class Recording(Generic[T]):
    """A recording of ``run``, which reads its inputs from tensors that stay where they are, and must not wait for the
    GPU.

    Args:
        pool: memory that it shares with other recordings, of which only one may play at a time.

    Attributes:
        pool: the memory that it uses.

    Raises:
        RuntimeError: torch's own, if ``run`` can't be recorded.
    """

    def __init__(self, run: Callable[[], T], pool: Any = None) -> None:
        self._graph, stream = torch.cuda.CUDAGraph(), torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):  # libraries set themselves up at a first call, which can't be recorded
            run()
        torch.cuda.current_stream().wait_stream(stream)
        with torch.cuda.graph(self._graph, pool=pool):
            self._result = run()
        self.pool = self._graph.pool()

    def play(self) -> T:
        """What ``run`` gives now, in tensors that hold until the next recording plays."""
        self._graph.replay()
        return self._result


class Recordings(Generic[T]):
    """Recordings of a forward over the rows of one sequence: one for each number of rows, and each storage of KV that
    it writes to. A recording is gone when its storage is."""

    def __init__(self) -> None:
        self._made: WeakKeyDictionary[SequenceKV, dict[tuple[int, int], _Made[T]]] = WeakKeyDictionary()

    def __len__(self) -> int:
        return sum(map(len, self._made.values()))

    def play(
        self, kv: SequenceKV, rows: int, inputs: SequenceOf[torch.Tensor], device: torch.device,
        run: Callable[[list[torch.Tensor]], T],
    ) -> T:  # fmt: skip
        """What ``run`` gives for ``inputs``, which it is handed in tensors on ``device``; that holds until the next
        one."""
        made = self._made.setdefault(kv, {})
        for stale in [key for key in made if key[1] != kv.capacity]:  # of the storage before it grew
            del made[stale]
        key = rows, kv.capacity
        if key not in made:
            pool = next((recording.pool for known in self._made.values() for recording, _ in known.values()), None)
            kept = [tensor.to(device, copy=True) for tensor in inputs]
            made[key] = Recording(lambda: run(kept), pool), kept
        recording, kept = made[key]
        for place, tensor in zip(kept, inputs, strict=True):
            place.copy_(tensor)
        return recording.play()

    def forget(self) -> None:
        """Records anew, from the next forward on."""
        self._made.clear()


_Made = tuple[Recording[T], list[torch.Tensor]]  # and its inputs
