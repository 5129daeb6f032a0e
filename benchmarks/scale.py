"""Whether lookups stay cheap: long texts, and a store of millions of tokens. Prints memory and time per step.

    python benchmarks/scale.py [--store 5000000] [--text 20000]

Texts are drawn from a table of word pairs with a heavy tail, so that they repeat themselves about as language does.
"""

from __future__ import annotations

import argparse
import time

import numpy as np
from rich.console import Console
from rich.progress import track
from rich.table import Table

from tokentree.draft import Draft
from tokentree.drafters.lookup.ngram import NGram
from tokentree.drafters.lookup.recycling import Recycling
from tokentree.drafters.lookup.suffix import Suffix
from tokentree.sampling import SamplingParams, seeded_noise
from tokentree.sequence import Accepted, Sequence
from tokentree.shapes import Cost

VOCAB = 50_000


def text(length: int, seed: int) -> list[int]:
    """Half of it goes on as an earlier place in it did; the rest is drawn by Zipf's law."""
    generator = np.random.default_rng(seed)
    fresh = np.minimum(generator.zipf(1.2, length), VOCAB - 1)
    tokens = list[int]()
    while len(tokens) < length:
        if len(tokens) > 64 and generator.random() < 0.1:
            begin = int(generator.integers(0, len(tokens) - 32))
            tokens += tokens[begin : begin + int(generator.integers(4, 32))]
        else:
            tokens += fresh[len(tokens) : len(tokens) + 8].tolist()
    return tokens[:length]


def steps(drafter: NGram | Suffix | Recycling, seq: Sequence, count: int) -> float:
    """Milliseconds of one proposal of 64 nodes, the median over ``count`` steps of two tokens."""
    form, times = Cost(), list[float]()
    for i in range(count):
        started = time.perf_counter()
        (draft,) = drafter.propose([seq], form, sampled=False)
        times.append(time.perf_counter() - started)
        assert isinstance(draft, Draft)
        seq.extend(Accepted([0, 1], [seq.tokens[i], seq.tokens[i + 1]]))
    return 1e3 * float(np.median(times))


def request(tokens: list[int]) -> Sequence:
    return Sequence(tokens, SamplingParams(max_tokens=100_000), seeded_noise(0, 0), 1 << 30)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--store", type=int, default=5_000_000)
    parser.add_argument("--text", type=int, default=20_000)
    asked = parser.parse_args()
    shown = Table(title="lookups at scale", title_justify="left")
    for name in ("drafter", "prompt", "store", "first step ms", "later steps ms", "store built s", "store MB"):
        shown.add_column(name, justify="left" if name == "drafter" else "right")
    for length in (asked.text // 16, asked.text // 4, asked.text):
        for drafter in (NGram(), Suffix()):
            seq = request(text(length, 1))
            started = time.perf_counter()
            drafter.propose([seq], Cost(), sampled=False)
            first = 1e3 * (time.perf_counter() - started)
            shown.add_row(drafter.name, f"{length:,}", "0", f"{first:.1f}", f"{steps(drafter, seq, 200):.3f}", "", "")
    for size in (asked.store // 25, asked.store // 5, asked.store):
        drafter, started, part = Suffix(max_store=2 * size), time.perf_counter(), 10_000
        for i in track(range(size // part), f"a store of {size:,} tokens", transient=True):
            old = request([1])
            drafter.propose([old], Cost(), sampled=False)
            old.tokens += text(part, i + 7)
            drafter.release([old])
        built = time.perf_counter() - started
        seq = request(text(1000, 3))
        started = time.perf_counter()
        drafter.propose([seq], Cost(), sampled=False)
        first = 1e3 * (time.perf_counter() - started)
        later = steps(drafter, seq, 200)
        memory = drafter.nbytes / 1e6
        shown.add_row("suffix", "1,000", f"{size:,}", f"{first:.1f}", f"{later:.3f}", f"{built:.1f}", f"{memory:.0f}")
    Console(width=120).print(shown)


if __name__ == "__main__":
    main()
