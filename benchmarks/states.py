"""What recurrent states cost: T(n) of a model of Qwen3.5-0.8B's shape with random weights, beside transformers' own
forward, and how long and how large states and checkpoints are.

    python -m benchmarks.states
    python -m benchmarks.states --layers 4 --width 256 --vocab 1000     # whether it runs
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable

import numpy as np
import torch
from benchmarks.shapes import random_model
from rich.console import Console
from rich.progress import track
from rich.table import Table
from transformers import DynamicCache, PreTrainedModel

from tokentree.engines.cpu.attention import ForwardKV
from tokentree.engines.kv_engine import KVEngine
from tokentree.engines.support import cache_names
from tokentree.engines.torch import TorchEngine
from tokentree.sampling import SamplingParams, seeded_noise
from tokentree.sequence import Sequence
from tokentree.tree import TokenTree

ROWS = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32)
PREFIX = 256
ROUNDS = 5


def chain(ids: list[int], nodes: int) -> TokenTree:
    return TokenTree.chain(ids[-1], ids[:1] * (nodes - 1))


def bush(ids: list[int], nodes: int) -> TokenTree:
    """A tree with two children for each node, as wide as it can be."""
    tokens = [ids[-1], *(1 + node % 2 for node in range(nodes - 1))]
    return TokenTree(np.array(tokens), np.array([-1, *((node - 1) // 2 for node in range(1, nodes))]))


def fastest(run: Callable[[], object]) -> float:
    """The least of several times, in milliseconds."""
    times = []
    for _ in range(ROUNDS):
        started = time.perf_counter()
        run()
        times.append(time.perf_counter() - started)
    return 1000 * min(times)


class Watch:
    """In here the time that goes by in recurrences, in milliseconds."""

    def __enter__(self) -> Watch:
        self.spent, self._own = 0.0, ForwardKV.recur

        def recur(forward: ForwardKV, *given: object) -> None:
            started = time.perf_counter()
            self._own(forward, *given)  # type: ignore[arg-type]
            self.spent += 1000 * (time.perf_counter() - started)

        ForwardKV.recur = recur  # type: ignore[method-assign]
        return self

    def __exit__(self, *_: object) -> None:
        ForwardKV.recur = self._own  # type: ignore[method-assign]


@torch.inference_mode()
def of_transformers(model: PreTrainedModel, ids: list[int], rows: int) -> float:
    """Its own forward over so many rows behind a prefix. Its cache can't be taken back, so each time has its own."""
    times = []
    for _ in range(ROUNDS):
        kept = dict.fromkeys(cache_names(model), DynamicCache(config=model.config))
        model(input_ids=torch.tensor([ids]), use_cache=True, logits_to_keep=1, **kept)
        more = torch.tensor([ids[:rows]])
        started = time.perf_counter()
        model(input_ids=more, use_cache=True, **kept)
        times.append(time.perf_counter() - started)
    return 1000 * min(times)


def times_of(engine: KVEngine, ids: list[int], rows: int) -> list[float]:
    """Milliseconds of forwards over so many rows: a chain's, a tree's, what of that goes by in recurrences, and a
    chain's behind a path of as many rows, which the states take in first."""
    seq = Sequence(ids, SamplingParams(max_tokens=64), seeded_noise(0, 0), PREFIX + 1024)
    engine.prefill(seq)
    one, other = chain(ids, rows), bush(ids, rows)
    times = [fastest(lambda: engine.verify([seq], [one])), fastest(lambda: engine.verify([seq], [other]))]
    with Watch() as watch:
        engine.verify([seq], [other])

    def behind() -> None:
        engine.verify([seq], [one])
        engine.commit([seq], [list(range(rows))])

    times += [watch.spent, fastest(behind)]
    engine.release([seq])
    return times


def curves(engine: KVEngine, model: PreTrainedModel, ids: list[int]) -> Table:
    table = Table(
        "rows", "chain, ms", "tree, ms", "of it in recurrences", "behind a path of as many", "transformers, ms"
    )
    for rows in track(ROWS, transient=True):
        found = [*times_of(engine, ids, rows), of_transformers(model, ids, rows)]
        table.add_row(str(rows), *(f"{value:.1f}" for value in found))
    return table


@torch.inference_mode()
def sizes(engine: KVEngine, ids: list[int]) -> Table:
    seq = Sequence(ids, SamplingParams(max_tokens=64), seeded_noise(0, 0), PREFIX + 512)
    reading = fastest(lambda: (engine.release([seq]), engine.prefill(seq)))
    states, layout = engine._kv_of(seq).recurrent, engine._storages.layout
    known = states.checkpoint()
    assert known is not None
    table = Table("what", "of one text")
    table.add_row("states", f"{layout.text_nbytes / 1e6:.1f} MB")
    table.add_row("a node of a tree", f"{4 * states.width / 1e6:.2f} MB")
    table.add_row("KV of a token", f"{layout.row_nbytes / 1e6:.3f} MB")
    table.add_row("a checkpoint", f"{known.nbytes / 1e6:.1f} MB, {fastest(states.checkpoint):.2f} ms")
    table.add_row("going on from one", f"{fastest(lambda: states.restore(known)):.2f} ms")
    table.add_row(f"reading {len(ids) - 1} tokens", f"{reading:.0f} ms")
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=24)
    parser.add_argument("--width", type=int, default=1024)
    parser.add_argument("--vocab", type=int, default=248320)
    asked = parser.parse_args()
    settings = {"hidden_size": asked.width, "intermediate_size": 7 * asked.width // 2, "vocab_size": asked.vocab}
    model = random_model("qwen3.5-0.8b", num_hidden_layers=asked.layers, **settings)
    engine = TorchEngine(model)
    ids = np.random.default_rng(0).integers(3, asked.vocab, PREFIX + 1).tolist()
    console = Console()
    console.print(f"{engine.signature}; {sum(weight.numel() for weight in model.parameters()) / 1e6:.0f} M weights")
    console.print(curves(engine, model, ids))
    console.print(sizes(engine, ids))


if __name__ == "__main__":
    main()
