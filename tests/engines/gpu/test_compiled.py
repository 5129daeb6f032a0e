"""What compiling for GPUs shows without one: no kernel of the engine spills registers, and each has the shared memory
that it needs. Triton's interpreter, in which other tests run kernels, knows neither."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

PROCESSES = (80, 89, 120), (90,)  # compute capabilities that one process compiles for: as much work as the other's
FEW = 32  # bytes of a thread that may wait in memory, so that more programs fit: what loops use is far more


def compiled(which: str, capabilities: tuple[int, ...]) -> list[dict[str, Any]]:
    """What each kernel needs on such GPUs, see compiled.py."""
    variables = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    variables["TRITON_DISABLE_LINE_INFO"] = "1"  # compiles faster
    program = str(Path(__file__).with_name("compiled.py"))
    words = [sys.executable, program, which, *map(str, capabilities)]
    done = subprocess.run(words, env=variables, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return [json.loads(line) for line in done.stdout.splitlines()]


def fits(found: list[dict[str, Any]], capability: int) -> int:
    """Looks whether all kernels do what the tests' names say; returns how many there are."""
    kernels = [one for one in found if one["capability"] == capability]
    assert len({one["kernel"] for one in kernels}) == 19
    assert not [one for one in kernels if one["spilled"] > FEW], capability
    assert not [one for one in kernels if one["shared"] > one["most"]], capability
    return len(kernels)


def test_the_heaviest_kernels_compile_without_spills_within_the_shared_memory_of_each_gpu() -> None:
    """Of 89, which has as little shared memory as 120, all are compiled by night."""
    capabilities = (80, 90, 120)
    found = compiled("heaviest", capabilities)
    for capability in capabilities:
        assert fits(found, capability) >= 19


@pytest.mark.nightly
@pytest.mark.parametrize("capabilities", PROCESSES)
def test_kernels_of_all_sizes_compile_without_spills_within_the_shared_memory_of_each_gpu(
    capabilities: tuple[int, ...],
) -> None:
    found = compiled("all", capabilities)
    for capability in capabilities:
        assert fits(found, capability) > (20 if capability == 120 else 80)
