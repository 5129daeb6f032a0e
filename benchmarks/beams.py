"""Beam search, several steps per forward, against transformers' and against our own with a step a forward.

    python benchmarks/beams.py MODEL PROMPTS.jsonl... [--draft-model D] [--heads H] [--num-beams 4] [--each 10]
        [--max-tokens 64] [--categories translation summarization] [--shape SHAPE]... [--dtype bfloat16] [--threads 2]
        [--ours]

All run interleaved, prompt by prompt. Texts are compared with those of our one-step search, which has the same bits,
and with transformers'; where they differ, the scores tell how far.
"""

from __future__ import annotations

import argparse
import math
import time
from collections import defaultdict
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table
from transformers import PreTrainedModel

from tokentree import LLM, SamplingParams
from tokentree.loading import load_model
from tokentree.prompts import read_prompts


def of_transformers(
    model: PreTrainedModel, ids: list[int], params: SamplingParams, ends: list[int]
) -> tuple[list[int], float]:
    """The best text that transformers' beam search finds, and its score."""
    with torch.inference_mode():
        out = model.generate(  # type: ignore[operator]
            torch.tensor([ids]),
            num_beams=params.num_beams,
            num_return_sequences=params.num_beams,
            do_sample=False,
            max_new_tokens=params.max_tokens,
            return_dict_in_generate=True,
            output_scores=True,
            eos_token_id=ends,
            pad_token_id=ends[0],
        )
    own = out.sequences[0, len(ids) :].tolist()
    end = next((i + 1 for i, token in enumerate(own) if token in ends), len(own))
    return own[:end], float(out.sequences_scores[0])


def options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model")
    parser.add_argument("prompts", nargs="+")
    parser.add_argument("--draft-model")
    parser.add_argument("--heads")
    parser.add_argument("--num-beams", type=int, default=4)
    parser.add_argument("--each", type=int, default=10)
    parser.add_argument("--max-tokens", type=int, default=64)
    parser.add_argument("--categories", nargs="+", default=["translation", "summarization"])
    parser.add_argument("--shape", action="append", default=[])
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--ours", action="store_true", help="leave transformers out")
    return parser.parse_args()


def main() -> None:
    asked = options()
    torch.set_num_threads(asked.threads)
    llm = LLM(asked.model, draft_model=asked.draft_model, heads=asked.heads, dtype=asked.dtype, prefix_mb=0)
    theirs = load_model(asked.model, asked.dtype, torch.device("cpu"))
    ways = {"one step": llm.using("none")} | {shape: llm.using(None, shape) for shape in asked.shape or ["cost"]}
    params = SamplingParams(
        max_tokens=asked.max_tokens, num_beams=asked.num_beams, num_return_sequences=asked.num_beams
    )
    seconds, forwards, tokens, same = (defaultdict[str, float](float) for _ in range(4))
    told, taken = list[str](), 0
    entries = [
        entry
        for category in asked.categories
        for entry in [e for file in asked.prompts for e in read_prompts(Path(file)) if e.category == category][
            : asked.each
        ]
    ]
    for entry in track(entries, "searching", console=Console(stderr=True), transient=True):
        ids = llm.chat_prompt([{"role": "user", "content": entry.turns[0]}])
        found = {}
        for name, way in ways.items():
            started = time.perf_counter()
            found[name] = way.generate([ids], params)
            seconds[name] += time.perf_counter() - started
            metrics = found[name][0].metrics
            forwards[name] += metrics.target_forwards
            tokens[name] += metrics.new_tokens
            same[name] += [r.token_ids for r in found[name]] == [r.token_ids for r in found["one step"]]
        taken += 1
        if not asked.ours:
            started = time.perf_counter()
            own, score = of_transformers(theirs, ids, params, sorted(llm.eos_ids))
            seconds["transformers"] += time.perf_counter() - started
            best = found["one step"][0]
            same["transformers"] += own == best.token_ids
            if own != best.token_ids:
                told.append(f"{entry.category}: best score {best.score:.4f}, transformers' {score:.4f}")
    shown = Table(title=f"{asked.num_beams} beams, {taken} prompts, {asked.max_tokens} tokens at most: {asked.model}")
    for head in ("search", "seconds", "x one step", "x better", "forwards", "tokens a forward", "same texts"):
        shown.add_column(head, justify="right")
    better = min(seconds.get("transformers", math.inf), seconds["one step"])
    for name, spent in seconds.items():
        each = f"{tokens[name] / forwards[name]:.2f}" if forwards[name] else ""
        count = f"{forwards[name]:.0f}" if forwards[name] else ""
        ratios = f"{seconds['one step'] / spent:.2f}", f"{better / spent:.2f}"
        shown.add_row(name, f"{spent:.1f}", *ratios, count, each, f"{same[name]:.0f}/{taken}")
    console = Console(width=140)
    console.print(shown)
    for line in told:
        console.print(f"differs from transformers: {line}", highlight=False)


if __name__ == "__main__":
    main()
