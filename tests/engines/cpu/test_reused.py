"""Memory for logits: used again, but never while somebody holds a part of it."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from tokentree.engines.cpu.reused import ALIGNED, Reused, tensor_in


def test_memory_is_used_again_when_nobody_holds_it() -> None:
    reused = Reused()
    first = reused.take(4, 100)
    place = first.ctypes.data
    assert first.shape == (4, 100)
    assert place % (2 * ALIGNED) == 0
    del first
    assert reused.take(2, 100).ctypes.data == place  # also for less
    assert reused.take(4, 100).ctypes.data == place


@pytest.mark.parametrize("part", [
    lambda memory: memory,
    lambda memory: tensor_in(memory, 100),
    lambda memory: tensor_in(memory, 100)[1],
    lambda memory: tensor_in(memory, 100)[2:, :7].detach(),
    lambda memory: torch.from_numpy(memory)[3, 5:9],
])  # fmt: skip
def test_what_is_held_is_never_written_to(part: Callable[[Any], Any]) -> None:
    reused = Reused()
    held = part(reused.take(4, 100))
    held[:] = 1
    other = reused.take(4, 100)
    other[:] = 0
    assert (held == 1).all()
    place = other.ctypes.data
    del held, other
    assert reused.take(4, 100).ctypes.data == place


def test_memory_grows_by_a_half_and_is_no_smaller_where_the_old_one_is_held() -> None:
    reused = Reused()
    reused.take(100, 100)
    place = reused.take(101, 100).ctypes.data
    assert reused.take(149, 100).ctypes.data == place  # there was room ahead
    held = reused.take(1, 100)
    assert held.ctypes.data == place
    other = reused.take(1, 100)
    assert other.ctypes.data != place
    place = other.ctypes.data
    del held, other
    assert reused.take(140, 100).ctypes.data == place


def test_more_room_is_made() -> None:
    reused = Reused()
    small = reused.take(1, 10)
    assert reused.take(50, 1000).shape == (50, 1000)
    assert small.shape == (1, 10)


def test_a_part_of_the_columns_is_contiguous() -> None:
    memory = np.arange(12, dtype=np.int16).reshape(3, 4)
    part = tensor_in(memory, 3)
    assert part.dtype is torch.bfloat16
    assert part.is_contiguous()
    assert part.shape == (3, 3)
    assert part.view(torch.int16).tolist() == memory[:, :3].tolist()
