"""How long four texts stand still while a long prompt joins them: the longest gap between their tokens, with the prompt
read in one step and in parts. Prints JSON.

    python benchmarks/joining.py MODEL --prompt 2000
"""

from __future__ import annotations

import argparse
import json
import time

import numpy as np

from tokentree import LLM, SamplingParams, Scheduler

STREAMS = 4


def longest_gap(llm: LLM, tokens: int, prefill_rows: int) -> dict[str, float]:
    """Seconds: between two tokens of a text, at most, from when the prompt joins until it has its first token; and
    until then."""
    rng = np.random.default_rng(0)
    scheduler = Scheduler(llm.decoder, prefill_rows=prefill_rows)
    params = SamplingParams(max_tokens=4096, ignore_eos=True)

    def add(length: int) -> int:
        return scheduler.add(llm.sequence(rng.integers(10, llm.engine.vocab_size, length).tolist(), params))

    others = [add(8 + i) for i in range(STREAMS)]
    for _ in range(STREAMS + 8):  # all of them are decoded then
        scheduler.step()
    began = time.perf_counter()
    latest, longest, joined = dict.fromkeys(others, began), 0.0, add(tokens)
    while True:
        told, now = {event.request_id for event in scheduler.step()}, time.perf_counter()
        for one in told & {*others}:
            longest, latest[one] = max(longest, now - latest[one]), now
        if joined in told:
            break
    for one in (*others, joined):
        scheduler.cancel(one)
    return {"longest_gap": longest, "first_token": now - began}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--prompt", type=int, default=2000, help="tokens of the prompt that joins")
    parser.add_argument("--rows", type=int, default=64, help="tokens of it that are read in a step")
    parser.add_argument("--drafter", default="none")
    parser.add_argument("--threads", type=int)
    options = parser.parse_args()
    llm = LLM(options.model, options.drafter, prefix_mb=0, threads=options.threads)
    longest_gap(llm, 64, 64)  # what is touched for the first time
    found = {
        "in one step": longest_gap(llm, options.prompt, options.prompt),
        "in parts": longest_gap(llm, options.prompt, options.rows),
    }
    print(json.dumps({"model": options.model, "prompt": options.prompt, "rows": options.rows, **found}))


if __name__ == "__main__":
    main()
