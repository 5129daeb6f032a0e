"""Do many threads on one model get the texts that are written alone?

    python benchmarks/threads.py MODEL [--heads DIR] [--requests 1000] [--threads 32] [--max-tokens 24] [--out FILE]

Texts of a few prompts are written alone first, plainly: greedily, with seeds, and with a penalty. Then so many requests
for them come from so many threads at once, to one `LLM` and its twins: plain, each look-up, all of them merged, heads
if there are any; in several shapes, in batches, and as streams, of which some are left before their end. Exit status 1
if any text differs.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, as_completed
from itertools import islice
from pathlib import Path

from rich.progress import Progress

from tokentree import LLM, SamplingParams

PROMPTS = (
    "List the days of the week.",
    "Write a Python function that adds two numbers, and explain it line by line.",
    "Why is the sky blue?",
    "Repeat three times: the quick brown fox jumps over the lazy dog.",
    "Translate to French: good morning, my friend.",
    "Count from one to twenty.",
    "Tell me a story about a lighthouse.",
    "What is 12 times 12?",
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--heads", type=Path)
    parser.add_argument("--requests", type=int, default=1000)
    parser.add_argument("--threads", type=int, default=32)
    parser.add_argument("--max-tokens", type=int, default=24)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()

    llm = LLM(options.model, heads=options.heads)
    params = {
        "greedy": SamplingParams(max_tokens=options.max_tokens),
        "seeded": SamplingParams(max_tokens=options.max_tokens, temperature=0.8, top_p=0.95, seed=7),
        "penalised": SamplingParams(max_tokens=options.max_tokens, repetition_penalty=1.2),
    }
    ids = [llm.chat_prompt([{"role": "user", "content": prompt}]) for prompt in PROMPTS]
    plain = llm.plain()
    alone = {
        (name, number): plain.generate([prompt], one)[0].token_ids
        for name, one in params.items()
        for number, prompt in enumerate(ids)
    }
    ways: dict[str, LLM] = {
        "default": llm, "plain": plain, "suffix": llm.using("suffix", "dynamic:nodes=8"),
        "ngram": llm.using("ngram", "chain:4"), "recycling": llm.using("recycling", "2x2x1"),
        "look-ups": llm.using(["recycling", "suffix", "ngram"], "adaptive:mass=0.8,width=4"),
    }  # fmt: skip
    if options.heads:
        ways["heads"] = llm.using("eagle" if "eagle" in str(options.heads) else "medusa", "dynamic:nodes=8,depth=4")

    def whole(way: LLM, name: str, number: int) -> bool:
        return way.generate([ids[number]], params[name])[0].token_ids == alone[name, number]

    def batch(way: LLM, name: str, number: int) -> bool:
        numbers = [number, (number + 1) % len(ids), (number + 3) % len(ids)]
        got = way.generate([ids[one] for one in numbers], params[name])
        return [result.token_ids for result in got] == [alone[name, one] for one in numbers]

    def stream(way: LLM, name: str, number: int) -> bool:
        pieces = way.stream(ids[number], params[name])
        return [piece.token_id for piece in pieces if piece.token_id is not None] == alone[name, number]

    def left(way: LLM, name: str, number: int) -> bool:
        pieces = way.stream(ids[number], params[name])
        got = [piece.token_id for piece in islice(pieces, 6)]
        pieces.close()
        return got == alone[name, number][: len(got)]

    kinds: dict[str, Callable[[LLM, str, int], bool]] = {"whole": whole, "batch": batch, "stream": stream, "left": left}
    rng, jobs = random.Random(0), list[tuple[str, str, str, int]]()
    for _ in range(options.requests):
        jobs.append((rng.choice([*kinds]), rng.choice([*ways]), rng.choice([*params]), rng.randrange(len(ids))))
    started, wrong, counts = time.perf_counter(), list[tuple[str, str, str, int]](), Counter[str]()
    with Progress(disable=not sys.stderr.isatty()) as bar, ThreadPoolExecutor(options.threads) as pool:
        task = bar.add_task(f"{options.threads} threads", total=len(jobs))
        running = {pool.submit(kinds[kind], ways[way], name, number): (kind, way, name, number)
                   for kind, way, name, number in jobs}  # fmt: skip
        for done in as_completed(running):
            kind, way, *_ = job = running[done]
            counts[kind] += 1
            counts[way] += 1
            if not done.result():
                wrong.append(job)
            bar.advance(task)
    found = {
        "requests": len(jobs), "threads": options.threads, "seconds": round(time.perf_counter() - started, 1),
        "wrong": wrong, "counts": dict(counts),
    }  # fmt: skip
    print(json.dumps(found, indent=1))
    if options.out:
        options.out.write_text(json.dumps(found, indent=1))
    sys.exit(bool(wrong))


if __name__ == "__main__":
    main()
