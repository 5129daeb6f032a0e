"""What typical acceptance gains, and how far it strays from the target: sampled texts under match and under typical.

    python benchmarks/typical.py MODEL HEADS PROMPTS.jsonl [--temperature 0.7] [--per-category 2] [--max-tokens 96]

Both rules draft with the same heads and look-ups. Each text is then read by the target again: its perplexity at the
temperature of sampling, and how many of its tokens are those that plain decoding draws at the same place, after the
same text, with the same random number. Under match that is every one, or something is broken.
"""

from __future__ import annotations

import argparse
import math
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.progress import track
from rich.table import Table

from tokentree import LLM, SamplingParams
from tokentree.prompts import read_prompts
from tokentree.train.texts import chat_ids
from tokentree.tree import TokenTree


@dataclass
class Sums:
    """Over all texts of a rule."""

    tokens: int = 0
    seconds: float = 0.0
    forwards: int = 0
    loss: float = 0.0
    agreed: int = 0

    def row(self) -> list[str]:
        return [
            f"{self.tokens / self.seconds:.1f}", f"{self.tokens / self.forwards:.2f}",
            f"{math.exp(self.loss / self.tokens):.3f}", f"{self.agreed / self.tokens:.2%}",
        ]  # fmt: skip


def judge(llm: LLM, prompt: list[int], params: SamplingParams, text: list[int], sums: Sums) -> None:
    """Reads ``text`` token by token, as plain decoding would have come to each."""
    seq = llm.sequence(prompt, params)
    llm.engine.prefill(seq)
    for token in text:
        logits = llm.engine.verify([seq], [TokenTree.root(seq.tokens[-1])]).all_logits[0]
        sums.loss -= float((logits.float() / params.temperature).log_softmax(-1)[token])
        sums.agreed += seq.draw(logits, []) == token
        llm.engine.commit([seq], [[0]])
        seq.tokens.append(token)
    llm.engine.release([seq])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("heads")
    parser.add_argument("prompts", type=Path)
    parser.add_argument("--temperature", type=float, default=0.7)
    parser.add_argument("--per-category", type=int, default=2)
    parser.add_argument("--max-tokens", type=int, default=96)
    parser.add_argument("--rule", action="append", help="besides match and typical")
    asked = parser.parse_args()
    if asked.temperature <= 0:
        parser.error("--temperature must be above 0: with greedy decoding the two rules are the same")
    rules = ["match", "typical", *(asked.rule or [])]
    plain = LLM(asked.model, "none", dtype="bfloat16", prefix_mb=0)
    models = {rule: LLM(asked.model, heads=asked.heads, accept=rule, dtype="bfloat16", prefix_mb=0) for rule in rules}
    sums = {rule: Sums() for rule in rules}
    entries = read_prompts(asked.prompts, asked.per_category, 1)
    for number, entry in enumerate(track(entries, transient=True)):
        params = SamplingParams(temperature=asked.temperature, seed=number, max_tokens=asked.max_tokens)
        said = [{"role": "user", "content": entry.turns[0]}]
        ids = chat_ids(plain.tokenizer, said) if entry.chat else plain.sequence(entry.turns[0], params).prompt_ids
        for rule, llm in models.items():
            done = llm.generate(ids, params)[0]
            metrics, own = done.metrics, sums[rule]
            own.tokens += metrics.new_tokens
            own.seconds += metrics.decode_seconds
            own.forwards += metrics.target_forwards
            judge(plain, ids, params, done.token_ids, own)
    shown = Table(title=f"{asked.model}: {len(entries)} prompts, temperature {asked.temperature}", title_justify="left")
    for head in ("", "tokens/s", "mean accepted length", "perplexity", "drawn by plain too"):
        shown.add_column(head, justify="right")
    for rule in rules:
        shown.add_row(rule, *sums[rule].row())
    Console(width=120).print(shown)


if __name__ == "__main__":
    main()
