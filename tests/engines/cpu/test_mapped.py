"""Memory of KV goes back to the system."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tokentree.engines.cpu.mapped import LEAST, cloned, zeros
from tokentree.engines.kv import KVLayout, SequenceKV

CPU = torch.device("cpu")
STATUS = Path("/proc/self/status")


def mebibytes() -> float:
    """Memory of this process."""
    lines = STATUS.read_text().splitlines()
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith("VmRSS"))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int64])
@pytest.mark.parametrize("shape", [(3, 5), (0, 4), (LEAST, 2), (2, 0, LEAST)])
def test_a_tensor_is_zeros_that_can_be_written(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    made = zeros(*shape, dtype=dtype, device=CPU)
    assert made.shape == shape
    assert made.dtype == dtype
    assert not made.any()
    made += 3
    copy = cloned(made.transpose(0, 1))
    assert copy.is_contiguous()
    made.zero_()
    assert (copy == 3).all()


@pytest.mark.skipif(not STATUS.exists(), reason="a system that tells memory otherwise")
@pytest.mark.parametrize("blocked", [True, False])
def test_storage_that_is_freed_between_others_is_no_memory_of_the_process_any_more(blocked: bool) -> None:
    layout = KVLayout(((2, 64, 64),) * 4, torch.float32, CPU, blocked, states=1, width=64)
    kept, freed, before = list[SequenceKV](), list[SequenceKV](), mebibytes()
    for number in range(40):
        kv = layout.make(1000 + 100 * number)
        for tensor in (*kv._keys, *kv._values, kv.states):
            tensor.fill_(1)
        (kept if number % 2 else freed).append(kv)
    assert mebibytes() - before > 0.9 * sum(kv.nbytes for kv in kept + freed) / 2**20
    small = kept[0].cut(0, 900)
    freed.clear()
    kept[0].reserve(5000)
    gone = mebibytes() - before - sum(kv.nbytes for kv in [*kept, small]) / 2**20
    assert gone < 10
