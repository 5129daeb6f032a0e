"""How many candidates of the same drawn trees each lossless rule accepts.

    python benchmarks/rules.py MODEL HEADS PROMPTS.jsonl [--drafter eagle] [--temperature 1] [--shape 2x2x1 …]
        [--steps 1000] [--per-category 2] [--max-tokens 64] [--out FILE]

Texts are sampled with a drafter that draws children, under `traversal`; a chain's under `block`, which is the same
there. At each step every rule walks the same tree, with the same logits and the same random numbers of its own. Only
what `traversal` or `block` accepts becomes text. ``match`` on these trees is not what it is by default: there it gets
the most probable children, not drawn ones. Those are in a run of their own, under ``match, picked``, whose texts are
others.

For each shape and rule: the mean number of accepted candidates of a step, and what it is over that of `rejection`,
each with a 95% interval, drawn anew by texts.
"""

from __future__ import annotations

import argparse
import json
import sys
from itertools import chain
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from rich.progress import Progress

from tokentree import LLM, SamplingParams
from tokentree.acceptance import NodeLogits, acceptance
from tokentree.draft import Draft
from tokentree.prompts import read_prompts
from tokentree.sequence import Accepted, Sequence

PICKED = "match, picked"


class Compared:
    """A rule that asks others too what they would accept.

    Args:
        rules: the last one's decision becomes text.
    """

    lossy: ClassVar[bool] = False
    draws_children: ClassVar[bool] = True
    takes_picked: ClassVar[bool] = True
    chains_only: ClassVar[bool] = False

    def __init__(self, rules: list[str]) -> None:
        self._rules = {name: acceptance(name) for name in rules}
        self.counts: dict[str, list[int]] = {name: [] for name in rules}

    def __call__(self, seq: Sequence, draft: Draft, logits: NodeLogits) -> Accepted:
        steps = {name: rule(seq, draft, logits) for name, rule in self._rules.items()}
        for name, step in steps.items():
            self.counts[name].append(len(step.path) - 1)
        return [*steps.values()][-1]


class Picked(Compared):
    """The same, of trees of the most probable children."""

    draws_children: ClassVar[bool] = False


def accepted(llm: LLM, rule: Compared, prompts: list[Any], params: SamplingParams, most: int, progress: Progress,
             title: str) -> list[dict[str, list[int]]]:  # fmt: skip
    """Per text and rule, the candidates that each step accepted; texts until there are ``most`` steps."""
    found, steps, task = list[dict[str, list[int]]](), 0, progress.add_task(title, total=most)
    llm.decoder.accept = rule
    for number, prompt in enumerate(prompts):
        if steps >= most:
            break
        rule.counts = {name: [] for name in rule.counts}
        llm.generate([prompt], params.model_copy(update={"seed": number}))
        found.append(rule.counts)
        steps += len(next(iter(rule.counts.values())))
        progress.update(task, completed=min(most, steps))
    return found


def figures(texts: list[dict[str, list[int]]], name: str, over: str | None) -> dict[str, Any]:
    """The mean of a step, and over that of another rule, with intervals over texts."""
    random = np.random.default_rng(0)
    picks = random.integers(len(texts), size=(2000, len(texts)))

    def mean(of: str) -> tuple[float, np.ndarray]:
        sums, counts = (np.array([part(text[of]) for text in texts], float) for part in (sum, len))
        return float(sums.sum() / counts.sum()), sums[picks].sum(1) / counts[picks].sum(1)

    value, drawn = mean(name)
    told = {"steps": sum(len(text[name]) for text in texts), "accepted": round(value, 3), "interval": bounds(drawn)}
    if over is not None:
        other, others = mean(over)
        told |= {f"over {over}": round(value / other, 4), "its interval": bounds(drawn / others)}
    return told


def bounds(drawn: np.ndarray) -> list[float]:
    return [round(float(value), 4) for value in np.percentile(drawn, [2.5, 97.5])]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("heads")
    parser.add_argument("prompts", type=Path, nargs="+")
    parser.add_argument("--drafter", default="eagle")
    parser.add_argument("--temperature", type=float, default=1.0)
    parser.add_argument("--shape", action="append")
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--per-category", type=int, default=2)
    parser.add_argument("--max-tokens", type=int, default=64)
    parser.add_argument("--threads", type=int)
    parser.add_argument("--out", type=Path)
    asked = parser.parse_args()
    entries = [*chain(*(read_prompts(file, asked.per_category) for file in asked.prompts))]
    prompts = [[{"role": "user", "content": one.turns[0]}] if one.chat else one.turns[0] for one in entries]
    params, told = SamplingParams(max_tokens=asked.max_tokens, temperature=asked.temperature), dict[str, Any]()
    with Progress(disable=not sys.stderr.isatty()) as progress:
        for form in asked.shape or ["chain:4", "2x2x1", "4x2x1x1"]:
            is_chain = form.startswith("chain")
            rules = ["match", "rejection", *(["block"] if is_chain else []), "traversal"]
            llm = LLM(asked.model, asked.drafter, heads=asked.heads, shape=form, accept="traversal", dtype="bfloat16",
                      threads=asked.threads, prefix_mb=0)  # fmt: skip
            texts = accepted(llm, Compared(rules), prompts, params, asked.steps, progress, form)
            told[form] = {name: figures(texts, name, None if name == "rejection" else "rejection") for name in rules}
            picked = accepted(llm, Picked(["match"]), prompts, params, asked.steps, progress, f"{form}, picked")
            told[form][PICKED] = figures(picked, "match", None)
            print(json.dumps({form: told[form]}), flush=True)
    if asked.out is not None:
        asked.out.write_text(json.dumps(told, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
