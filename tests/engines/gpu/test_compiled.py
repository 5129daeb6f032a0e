"""What compiling for GPUs shows without one: no kernel of the engine spills registers, and each has the shared memory
that it needs. Triton's interpreter, in which other tests run kernels, knows neither."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

CAPABILITIES = (80, 89, 90, 120)
FEW = 32  # bytes of a thread that may wait in memory, so that more programs fit: what loops use is far more
SOME = ("16:8b", "16:odd", "8:8b")
MODELS = {90: (*SOME, "16:smollm2", "16:70b", "8:smollm2", "8:70b")}  # what is tuned for that one; SOME elsewhere


def compiled(capability: int) -> list[dict[str, Any]]:
    """What each kernel needs on such a GPU, see compiled.py."""
    variables = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    variables["TRITON_DISABLE_LINE_INFO"] = "1"  # compiles faster
    program = str(Path(__file__).with_name("compiled.py"))
    command = [sys.executable, program, str(capability), *MODELS.get(capability, SOME)]
    done = subprocess.run(command, env=variables, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return [json.loads(line) for line in done.stdout.splitlines()]


def test_kernels_of_all_sizes_compile_without_spills_within_the_shared_memory_of_each_gpu() -> None:
    with ThreadPoolExecutor(2) as pool:
        found = dict(zip(CAPABILITIES, pool.map(compiled, CAPABILITIES), strict=True))
    for capability, kernels in found.items():
        assert len({one["kernel"] for one in kernels}) == 16
        assert len(kernels) > 40
        assert not [one for one in kernels if one["spilled"] > FEW], capability
        assert not [one for one in kernels if one["shared"] > one["most"]], capability
