"""What a forward of the target costs by its rows, by how it is computed, and how far above the time of reading weights.

    python -m benchmarks.forward MODEL [--device cpu] [--threads 2] [--prefix 256] [--rounds 8] [--compile]
    python -m benchmarks.forward lfm2-350m      # one of `benchmarks/shapes.py`, with random weights

Measures the model's own modules (`torch`, with transformers' cache), and tokentree's engine: on a CPU in bfloat16, in 8
bits, and for a GGUF file in its own bits, and as transformers' modules with our attention where it is one compiled call
otherwise; on a GPU kernel by kernel, and recorded; with --compile, as a graph made by `torch.compile` too. All on one
model and in turns; the median of each is kept. The floor is the bytes of the weights over the read bandwidth, measured
in the same run.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from benchmarks.shapes import SHAPES, random_model
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from transformers import DynamicCache, PreTrainedModel

from tokentree.engines.base import EngineOptions
from tokentree.engines.cpu.linear import PackedLinear
from tokentree.engines.cpu.quantized import QuantizedLinear
from tokentree.engines.kv_engine import KVEngine
from tokentree.engines.model_engine import ModelEngine
from tokentree.engines.modules import ModulesEngine
from tokentree.engines.plan import plan
from tokentree.engines.prepared import Prepared
from tokentree.engines.program import ProgramEngine
from tokentree.engines.support import cache_names
from tokentree.engines.torch import TorchEngine
from tokentree.loading import load_model
from tokentree.sampling import SamplingParams, seeded_noise
from tokentree.sequence import Sequence
from tokentree.tree import TokenTree

ROWS = (1, 2, 4, 6, 8, 12, 16, 24, 32, 48, 64)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--prefix", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--compile", action="store_true")
    asked = parser.parse_args()
    torch.set_num_threads(asked.threads)
    device = torch.device(asked.device)
    model = random_model(asked.model) if asked.model in SHAPES else load_model(asked.model, "bfloat16", device)
    size = model.config.get_text_config().vocab_size
    ids = np.random.default_rng(0).integers(0, size, asked.prefix + 1).tolist()
    engines = engines_of(model, asked.model)
    if asked.compile:
        started = time.perf_counter()
        engines["graph"] = TorchEngine(model, "sdpa", compile=True)
        print(f"compiling took {time.perf_counter() - started:.0f} s")
    forwards = {"torch": own(model, ids)} | {name: ours(engine, ids) for name, engine in engines.items()}
    times: dict[tuple[str, int], list[float]] = {(name, rows): [] for name in forwards for rows in ROWS}
    bandwidth = list[float]()
    with Progress(transient=True) as bar:
        task = bar.add_task("measuring", total=asked.rounds * len(times))
        for _ in range(asked.rounds):
            bandwidth.append(read_bandwidth(device))
            for (name, rows), seconds in times.items():
                if rows == ROWS[0]:  # the first forward after another engine's finds nothing in any cache
                    forwards[name](rows)
                seconds.append(forwards[name](rows))
                bar.advance(task)
    medians = {key: statistics.median(seconds) for key, seconds in times.items()}
    best = max(bandwidth)
    place = f"{asked.threads} threads" if device.type == "cpu" else torch.cuda.get_device_name(device)
    shown = Table(title=f"T(n), ms: {asked.model}, {asked.prefix} tokens before, {place}")
    for head in ("rows", *forwards, *(f"{name} T(n)/T(1)" for name in forwards)):
        shown.add_column(head, justify="right")
    for rows in ROWS:
        now = [medians[name, rows] for name in forwards]
        ratios = [f"{medians[name, rows] / medians[name, 1]:.2f}" for name in forwards]
        shown.add_row(str(rows), *(f"{1e3 * seconds:.2f}" for seconds in now), *ratios)
    console = Console(width=140)
    console.print(shown)
    for name, engine in engines.items():
        if name == "graph":
            continue
        parts = engine._model if isinstance(engine, ModelEngine) else engine._program.stack
        packed = [m for m in parts.modules() if isinstance(m, PackedLinear | QuantizedLinear)]
        own_weights = {weight.data_ptr(): weight.nbytes for weight in model.parameters()}
        weights = sum(layer.weight.nbytes for layer in packed) or sum(own_weights.values())
        console.print(
            f"{name}: {weights / 1e6:.0f} MB of weights at {best / 1e9:.1f} GB/s (best of {asked.rounds}, "
            f"median {statistics.median(bandwidth) / 1e9:.1f}) take {1e3 * weights / best:.1f} ms: plain is at "
            f"{weights / best / medians[name, 1]:.0%} of that floor"
        )


def engines_of(model: PreTrainedModel, path: str) -> dict[str, KVEngine]:
    """Those that are measured, by their columns."""
    if model.device.type != "cpu":
        return {"kernels": TorchEngine(model, "sdpa"), "recorded": TorchEngine(model)}
    engines = {"bfloat16": TorchEngine(model), "int8": TorchEngine(model, quantization="int8")}
    if isinstance(engines["bfloat16"], ProgramEngine):
        engines["modules"] = as_modules(model)
    if path.endswith(".gguf"):
        engines["gguf"] = TorchEngine(model, quantization="gguf", file=Path(path))
    return engines


def as_modules(model: PreTrainedModel) -> KVEngine:
    """The engine that a model of a family without a compiled call would get."""
    prepared = Prepared(model, False, None, None, None)
    planned = plan(replace(prepared.traits, one_call=False), EngineOptions())
    prepared.ask(planned.own_attention)
    return ModulesEngine.of(prepared, planned, 0)


def own(model: PreTrainedModel, ids: list[int]) -> Callable[[int], float]:
    """The model's own forward over a chain, with its own cache."""

    @torch.inference_mode()
    def forward(rows: int) -> float:
        kept = dict.fromkeys(cache_names(model), DynamicCache(config=model.config))
        model(input_ids=torch.tensor([ids[:-1]], device=model.device), logits_to_keep=1, **kept)
        wait(model.device)
        started = time.perf_counter()
        model(input_ids=torch.tensor([ids[-1:] * rows], device=model.device), **kept)
        wait(model.device)
        return time.perf_counter() - started

    return forward


def ours(engine: KVEngine, ids: list[int]) -> Callable[[int], float]:
    """An engine's forward over a chain."""
    seq = Sequence(ids, SamplingParams(max_tokens=100), seeded_noise(0, 0), engine.context)
    engine.prefill(seq)

    def forward(rows: int) -> float:
        return engine.verify([seq], [TokenTree.chain(ids[-1], ids[-1:] * (rows - 1))]).seconds

    return forward


def wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def read_bandwidth(device: torch.device) -> float:
    """Bytes a second of summing up half a gigabyte, with all threads of a CPU."""
    block = torch.ones(1 << 27, device=device)
    block.sum()
    wait(device)
    started = time.perf_counter()
    block.sum()
    wait(device)
    return block.nbytes / (time.perf_counter() - started)


if __name__ == "__main__":
    main()
