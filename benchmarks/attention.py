"""What attention over a long prefix and a tree costs, by how it is computed.

    python benchmarks/attention.py [--heads 12] [--kv-heads 2] [--width 128] [--threads 2] [--rounds 10] [--flex]

One layer, float32, the sizes of Qwen2.5-Coder-1.5B by default. Compares `tree` (tokentree's, which gives a row the same
bits in any tree), `sdpa` (torch's, under a dense mask, KV heads shared by `enable_gqa`), `repeat` (the same with KV
heads repeated in memory, as transformers' modules do it) and, with --flex, torch's compiled `flex_attention` with a
block mask, in turns; keeps the median of each. Masks, which all layers of a step share, are made before.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import numpy as np
import torch
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from torch.nn.attention.flex_attention import create_block_mask, flex_attention
from torch.nn.functional import scaled_dot_product_attention

from tokentree.engines.cpu.attention import ForwardKV, Rule, attend_rows, dense_mask
from tokentree.engines.kv import KVLayout
from tokentree.engines.segment import Segment
from tokentree.tree import TokenTree

PREFIXES = (256, 2000, 16000)
ROWS = (1, 16, 64)
CPU = torch.device("cpu")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--heads", type=int, default=12)
    parser.add_argument("--kv-heads", type=int, default=2)
    parser.add_argument("--width", type=int, default=128)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--flex", action="store_true")
    asked = parser.parse_args()
    torch.set_num_threads(asked.threads)
    cases = [(prefix, rows) for prefix in PREFIXES for rows in ROWS]
    ways: dict[tuple[int, int], dict[str, Callable[[], torch.Tensor]]] = {}
    for prefix, rows in cases:
        ways[prefix, rows] = ways_of(prefix, rows, asked)
        results = {name: way() for name, way in ways[prefix, rows].items()}
        for name, result in results.items():
            torch.testing.assert_close(result, results["tree"], rtol=1e-3, atol=1e-4, msg=f"{name} computes otherwise")
    times = {(case, name): list[float]() for case in cases for name in ways[case]}
    with Progress(transient=True) as bar:
        task = bar.add_task("measuring", total=asked.rounds * len(times))
        for _ in range(asked.rounds):
            for (case, name), seconds in times.items():
                started = time.perf_counter()
                ways[case][name]()
                seconds.append(time.perf_counter() - started)
                bar.advance(task)
    names = list(ways[cases[0]])
    shown = Table(title=f"one layer of attention, ms: {asked.heads} heads on {asked.kv_heads}, width {asked.width}")
    for head in ("prefix", "rows", *names):
        shown.add_column(head, justify="right")
    for prefix, rows in cases:
        medians = [statistics.median(times[(prefix, rows), name]) for name in names]
        shown.add_row(str(prefix), str(rows), *(f"{1e3 * seconds:.2f}" for seconds in medians))
    Console(width=100).print(shown)


def ways_of(prefix: int, rows: int, asked: argparse.Namespace) -> dict[str, Callable[[], torch.Tensor]]:
    """Ways to compute the attention of ``rows`` nodes of a binary tree behind ``prefix`` tokens: each gives
    float32[rows, heads, width]."""
    random = torch.Generator().manual_seed(0)
    heads, kv_heads, width = asked.heads, asked.kv_heads, asked.width
    tree = TokenTree(np.arange(rows), np.array([-1, *((node - 1) // 2 for node in range(1, rows))]))
    keys, values = (torch.randn(kv_heads, prefix + rows, width, generator=random) for _ in range(2))
    query = torch.randn(heads, rows, width, generator=random)
    kv = KVLayout(((kv_heads, width, width),), torch.float32, CPU, blocked=True).make(prefix + rows)
    kv.write(0, 0, keys, values)
    kv.length = prefix
    scale, group = width**-0.5, heads // kv_heads
    mask = dense_mask([Segment(kv, tree, 0, 0)], rows, None, torch.float32, CPU)

    def ours() -> torch.Tensor:
        cache = ForwardKV([Segment(kv, tree, 0, 0)], attends_itself=False)
        return attend_rows(cache, 0, query, kv_heads, width, Rule(scale))

    def sdpa() -> torch.Tensor:
        out = scaled_dot_product_attention(query[None], keys[None], values[None], mask, scale=scale, enable_gqa=True)
        return out[0].transpose(0, 1)

    def repeat() -> torch.Tensor:
        copies = [part.repeat_interleave(group, 0)[None] for part in (keys, values)]
        return scaled_dot_product_attention(query[None], *copies, mask, scale=scale)[0].transpose(0, 1)

    ways: dict[str, Callable[[], torch.Tensor]] = {"tree": ours, "sdpa": sdpa, "repeat": repeat}
    if asked.flex:
        torch._dynamo.config.recompile_limit = 2 * len(PREFIXES) * len(ROWS)
        compiled = torch.compile(flex_attention, dynamic=False)
        seen = torch.from_numpy(tree.mask)

        def sees(_batch: torch.Tensor, _head: torch.Tensor, row: torch.Tensor, column: torch.Tensor) -> torch.Tensor:
            return (column < prefix) | seen[row, (column - prefix).clamp(min=0)]

        blocks = create_block_mask(sees, None, None, rows, prefix + rows, device="cpu")

        def flex() -> torch.Tensor:
            out = compiled(query[None], keys[None], values[None], block_mask=blocks, scale=scale, enable_gqa=True)
            return out[0].transpose(0, 1)  # type: ignore[union-attr]

        ways["flex"] = flex
    return ways


if __name__ == "__main__":
    main()
