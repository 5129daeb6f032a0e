"""What a function launches on a GPU, recorded once and played again by one call: a CUDA graph."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Generic, TypeVar

import torch

T = TypeVar("T")


class Recording(Generic[T]):
    """A recording of ``run``, which reads its inputs from tensors that stay where they are, and must not wait for the
    GPU.

    Args:
        pool: memory that it shares with other recordings, of which only one may play at a time.

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

    def play(self) -> T:
        """What ``run`` gives now, in tensors that hold until the next recording plays."""
        self._graph.replay()
        return self._result
