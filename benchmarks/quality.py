"""What few bits cost in quality: perplexity and greedy agreement against bfloat16, on a file of prompts. A GGUF file is
also measured in its own bits.

    python benchmarks/quality.py MODEL PROMPTS.jsonl [--per-category 2] [--max-tokens 64]

Perplexity and agreement are over the tokens of the prompts themselves, as real text; then both continue each prompt
greedily, and the share of equal continuations and of equal tokens before the first difference is told.
"""

from __future__ import annotations

import argparse
import math
from itertools import zip_longest
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table

from tokentree import LLM, SamplingParams
from tokentree.prompts import read_prompts
from tokentree.tree import TokenTree

CHUNK = 64  # rows whose logits are kept at a time


def prompt_logits(llm: LLM, ids: list[int]) -> torch.Tensor:
    """float32[len(ids) - 1, vocab]: what the model says after each token but the last."""
    seq, parts = llm.sequence(ids[:1], SamplingParams()), []
    for begin in range(0, len(ids) - 1, CHUNK):
        rows = ids[begin : min(begin + CHUNK, len(ids) - 1)]
        parts.append(llm.engine.verify([seq], [TokenTree.chain(rows[0], rows[1:])]).all_logits.float())
        llm.engine.commit([seq], [list(range(len(rows)))])
    llm.engine.release([seq])
    return torch.cat(parts)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model")
    parser.add_argument("prompts", type=Path)
    parser.add_argument("--per-category", type=int, default=2)
    parser.add_argument("--max-tokens", type=int, default=64)
    parser.add_argument("--most", type=int, default=512, help="tokens of a prompt that are scored")
    asked = parser.parse_args()
    models = {
        "bfloat16": LLM(asked.model, "none", dtype="bfloat16"),
        "int8": LLM(asked.model, "none", dtype="bfloat16", quantization="int8"),
    }
    if asked.model.endswith(".gguf"):
        models["gguf"] = LLM(asked.model, "none", dtype="bfloat16", quantization="gguf")
    first = models["bfloat16"]
    loss, count, texts = dict.fromkeys(models, 0.0), 0, 0
    agreed, same, before = (dict.fromkeys(models, 0) for _ in range(3))
    params = SamplingParams(max_tokens=asked.max_tokens)
    for entry in track(read_prompts(asked.prompts, asked.per_category, 1), transient=True):
        ids = first.sequence(entry.turns[0], params).prompt_ids[: asked.most]
        target = torch.tensor(ids[1:])
        logits = {name: prompt_logits(llm, ids) for name, llm in models.items()}
        for name, rows in logits.items():
            loss[name] -= float(rows.log_softmax(-1).gather(1, target[:, None]).sum())
        count += len(target)
        texts += 1
        best, continued = logits["bfloat16"].argmax(-1), first.generate([ids], params)[0].token_ids
        for name, llm in models.items():
            agreed[name] += int((best == logits[name].argmax(-1)).sum())
            theirs = continued if llm is first else llm.generate([ids], params)[0].token_ids
            same[name] += continued == theirs
            pairs = enumerate(zip_longest(continued, theirs))
            before[name] += next((i for i, (a, b) in pairs if a != b), len(continued))
    shown = Table(title=f"{asked.model}: {texts} prompts, {count} tokens", title_justify="left")
    for head in ("", "perplexity", "same best token", "equal texts", "tokens before the first difference"):
        shown.add_column(head, justify="right")
    for name in models:
        shown.add_row(
            name, f"{math.exp(loss[name] / count):.3f}", f"{agreed[name] / count:.2%}", f"{same[name]} of {texts}",
            f"{before[name] / texts:.1f} of at most {asked.max_tokens}",
        )  # fmt: skip
    Console(width=120).print(shown)


if __name__ == "__main__":
    main()
