"""One linear layer by its rows: torch's own kernels for few bits beside ours.

    python benchmarks/layers.py [--inputs 1536] [--outputs 8960] [--threads 2] [--rounds 30]

In microseconds, the median over rounds in which all take turns. Each has several copies of its weight, more than
caches hold.
torch's are `F.linear` in bfloat16, the same with a weight packed by oneDNN, oneDNN's 8-bit product (weights by output,
inputs by row, rounded here), and `_weight_int4pack_mm_for_cpu` (4-bit weights, inputs in bfloat16).
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Iterator
from itertools import cycle

import torch
from rich.console import Console
from rich.table import Table
from torch.nn.functional import linear

from tokentree.engines.cpu.linear import PackedLinear
from tokentree.engines.cpu.quantized import Groups, QuantizedLinear

ROWS = (1, 2, 4, 8, 16, 32, 64)
COPIES = 8
GROUP = 32  # weights that share a scale, in 4 bits

Layer = Callable[[torch.Tensor], torch.Tensor]


def layers(weight: torch.Tensor) -> Iterator[tuple[str, Layer]]:
    """Kernels that compute x @ weight.T, more or less; ``weight`` bfloat16[outputs, inputs]."""
    onednn, mkldnn = torch.ops.onednn, torch.ops.mkldnn
    yield "bf16 F.linear", lambda x: linear(x, weight)
    packed = mkldnn._reorder_linear_weight(weight, 1)
    yield "bf16 oneDNN, packed", lambda x: mkldnn._linear_pointwise(x, packed, None, "none", [], "")
    yield "bf16 ours", PackedLinear(weight, None)
    scales = weight.float().abs().amax(1) / 127
    eight = onednn.qlinear_prepack((weight.float() / scales[:, None]).round().to(torch.int8), None)
    zeros = torch.zeros(len(weight), dtype=torch.int64)

    def onednn_int8(x: torch.Tensor) -> torch.Tensor:
        by_row = x.float().abs().amax(1, keepdim=True) / 127
        numbers = ((x.float() / by_row).round() + 128).to(torch.uint8)
        y = onednn.qlinear_pointwise(
            numbers, 1.0, 128, eight, scales, zeros, None, 1.0, 0, torch.float32, "none", [], "none"
        )
        return (y * by_row).to(torch.bfloat16)

    yield "int8 oneDNN", onednn_int8
    yield "int8 ours", QuantizedLinear(weight, None)
    grouped = weight.float().unflatten(1, (-1, GROUP))
    least = grouped.amin(2)
    steps = ((grouped.amax(2) - least) / 15).clamp(min=1e-8)
    four = ((grouped - least[..., None]) / steps[..., None]).round()
    int4 = torch.ops.aten._convert_weight_to_int4pack_for_cpu(four.flatten(1).to(torch.int32), 2)
    both = torch.stack([steps, least + 8 * steps], -1).transpose(0, 1).contiguous().to(torch.bfloat16)
    yield "int4 torch", lambda x: torch.ops.aten._weight_int4pack_mm_for_cpu(x, int4, GROUP, both)
    yield "int4 ours", QuantizedLinear(Groups(four.to(torch.uint8), steps.half(), least.half(), 4), None)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--inputs", type=int, default=1536)
    parser.add_argument("--outputs", type=int, default=8960)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=30)
    asked = parser.parse_args()
    torch.set_num_threads(asked.threads)
    generator = torch.Generator().manual_seed(0)
    weights = [torch.randn(asked.outputs, asked.inputs, generator=generator).bfloat16() for _ in range(COPIES)]
    made: dict[str, list[Layer]] = {}
    for weight in weights:
        for name, layer in layers(weight):
            made.setdefault(name, []).append(layer)
    inputs = {rows: torch.randn(rows, asked.inputs, generator=generator).bfloat16() for rows in ROWS}
    exact = inputs[64].float() @ weights[0].float().t()
    errors = {name: float((of[0](inputs[64]).float() - exact).norm() / exact.norm()) for name, of in made.items()}
    times: dict[tuple[str, int], list[float]] = {(name, rows): [] for rows in ROWS for name in made}
    turns = {name: cycle(of) for name, of in made.items()}
    with torch.inference_mode():
        for _ in range(asked.rounds):
            for (name, rows), taken in times.items():
                layer = next(turns[name])
                started = time.perf_counter()
                layer(inputs[rows])
                taken.append(time.perf_counter() - started)
    shown = Table(title=f"{asked.inputs} x {asked.outputs}, microseconds, {asked.threads} threads")
    for head in ("kernel", *map(str, ROWS), "16 / 1", "error"):
        shown.add_column(head, justify="left" if head == "kernel" else "right")
    for name in made:
        medians = {rows: statistics.median(times[name, rows]) for rows in ROWS}
        cells = [f"{1e6 * medians[rows]:.0f}" for rows in ROWS]
        shown.add_row(name, *cells, f"{medians[16] / medians[1]:.2f}", f"{errors[name]:.3f}")
    Console(width=120).print(shown)


if __name__ == "__main__":
    main()
