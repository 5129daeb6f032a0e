"""How fast is decoding beside other programs that compute, in one thread and in several?

    python benchmarks/busy.py MODEL [--others 2] [--rounds 6] [--max-tokens 48]

Decodes one prompt plainly, in one thread and in as many as there are cores, in turns: first on the machine as it is,
then beside so many processes that compute all the time. Prints tokens/s (median, least and most) and the ratio of the
two, and how much time of the cores each took per token.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import time

import torch
from rich.progress import Progress

from tokentree import LLM, SamplingParams

PROMPT = "Write a long story about a dragon who learns to program computers."


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--others", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--max-tokens", type=int, default=48)
    options = parser.parse_args()
    llm = LLM(options.model, "none")
    counts, params = (1, os.cpu_count() or 1), SamplingParams(max_tokens=options.max_tokens, ignore_eos=True)
    print(f"load average before: {os.getloadavg()[0]:.2f}")
    with Progress(disable=not sys.stderr.isatty()) as bar:
        task = bar.add_task("decoding", total=4 * options.rounds)
        for others in (0, options.others):
            busy = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(others)]
            speeds: dict[int, list[float]] = {count: [] for count in counts}
            cores: dict[int, list[float]] = {count: [] for count in counts}
            try:
                for _ in range(options.rounds):
                    for count in counts:
                        torch.set_num_threads(count)
                        before = time.process_time()
                        metrics = llm.generate([PROMPT], params)[0].metrics
                        cores[count].append(1000 * (time.process_time() - before) / metrics.new_tokens)
                        speeds[count].append(metrics.tokens_per_second)
                        bar.advance(task)
            finally:
                for one in busy:
                    one.kill()
            for count in counts:
                low, middle, high = min(speeds[count]), statistics.median(speeds[count]), max(speeds[count])
                used = statistics.median(cores[count])
                print(f"beside {others}: {count} threads: {middle:.1f} tokens/s ({low:.1f} to {high:.1f}), "
                      f"{used:.1f} ms of cores a token")  # fmt: skip
            ratio = statistics.median(b / a for a, b in zip(*speeds.values(), strict=True))
            print(f"beside {others}: {counts[1]} threads are {ratio:.2f} of one")


if __name__ == "__main__":
    main()
