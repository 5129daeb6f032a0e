"""What a step costs beside its forwards, phase by phase.

    python benchmarks/host_time.py MODEL [--drafter eagle+recycling+suffix+ngram] [--heads FOLDER]

Decodes the prompts of `benchmarks/sample.jsonl` one after another, and prints JSON: for each phase the median and the
least milliseconds of a step. A phase's time is its own: what it calls of other phases is theirs. `forward` is the
compiled calls of target and heads; `host` is the step without them. Looking at the clock takes time too, so `host` is
of every second step, in which no other phases are told apart. Steps that read prompts, or in which the shape did
without a draft, are counted and left out.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tokentree import LLM, SamplingParams
from tokentree.draft import Draft
from tokentree.engines.cpu import steps
from tokentree.prompts import read_prompts

WARM = 1  # prompts that are decoded before any is measured
WHOLE = {"loop", "forward", "cut", "tree"}  # what is always told apart


class Phases:
    """Times of phases, per step. The innermost phase that runs is the one that is charged. Those that aren't told
    apart are part of what calls them."""

    def __init__(self) -> None:
        self.apart, self.steps = True, list[tuple[bool, dict[str, float]]]()
        self._running: list[str] = []
        self._now: defaultdict[str, float] = defaultdict(float)
        self._since = time.perf_counter()

    def watch(self, owner: Any, name: str, phase: str) -> None:
        """Charges all calls of ``owner.name`` to ``phase``."""
        setattr(owner, name, self.timed(getattr(owner, name), phase))

    def timed(self, function: Callable[..., Any], phase: str) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            if not self.apart and phase not in WHOLE:
                return function(*args, **kwargs)
            self._charge()
            self._running.append(phase)
            try:
                return function(*args, **kwargs)
            finally:
                self._charge()
                self._running.pop()

        return call

    def step(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """``function`` is a whole step."""
        timed = self.timed(function, "loop")

        def call(*args: Any) -> Any:
            self._now.clear()
            self.apart = not self.apart
            timed(*args)
            self.steps.append((self.apart, dict(self._now)))

        return call

    def _charge(self) -> None:
        now = time.perf_counter()
        if self._running:
            self._now[self._running[-1]] += now - self._since
        self._since = now


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model")
    parser.add_argument("--drafter", default="recycling+suffix+ngram")
    parser.add_argument("--heads", type=Path)
    parser.add_argument("--shape", default="cost:nodes=8")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--tokens", type=int, default=100)
    parser.add_argument("--temperature", type=float, default=0.0)
    parser.add_argument("--prompts", type=Path, default=Path(__file__).parent / "sample.jsonl")
    asked = parser.parse_args()
    drafters = asked.drafter.split("+")
    llm = LLM(asked.model, drafters, heads=asked.heads, shape=asked.shape, dtype=asked.dtype, prefix_mb=0)
    phases = Phases()
    watch(phases, llm)
    params = SamplingParams(max_tokens=asked.tokens, temperature=asked.temperature, seed=1, ignore_eos=True)
    for number, entry in enumerate(read_prompts(asked.prompts)):
        if number == WARM:
            phases.steps.clear()
        first = entry.turns[0]
        llm.generate([{"role": "user", "content": first}] if entry.chat else first, params)
    print(json.dumps(figures(phases.steps), indent=1))


def watch(phases: Phases, llm: LLM) -> None:
    """Has ``phases`` time the parts of the loop."""
    decoder = llm.decoder
    for part in getattr(decoder.drafter, "drafters", ()):
        phases.watch(part, "add_to", f"draft {part.name}")
        phases.watch(part, "observe", f"learn {part.name}")
    phases.watch(decoder.drafter, "propose", "merge" if decoder.drafter.name == "merged" else "draft")
    phases.watch(decoder.drafter, "observe", "learn")
    for name, phase in (("cut", "cut"), ("observe", "learn shape"), ("rests", "grow"), ("beside", "grow"),
                        ("select", "grow"), ("counts", "grow")):  # fmt: skip
        phases.watch(decoder.shape, name, phase)
    for name, phase in (("verify", "verify"), ("commit", "commit")):
        phases.watch(decoder.engine, name, phase)
    for name, phase in (("_accept", "accept"), ("_record", "record")):
        phases.watch(decoder, name, phase)
    Draft.tree = property(phases.timed(Draft.tree.fget, "tree"))  # type: ignore[assignment,attr-defined]
    steps.run = phases.timed(steps.run, "forward")
    decoder.step = phases.step(decoder.step)  # type: ignore[method-assign]


def figures(every: list[tuple[bool, dict[str, float]]]) -> dict[str, Any]:
    steps = [(apart, step) for apart, step in every if step.get("cut") and step.get("tree")]
    phases = [step for apart, step in steps if apart]
    names = sorted({name for step in phases for name in step})
    times = {name: [1000 * step.get(name, 0.0) for step in phases] for name in names}
    times["host"] = [1000 * (sum(step.values()) - step["forward"]) for apart, step in steps if not apart]
    return {
        "steps": len(steps), "left out": len(every) - len(steps),
        **{name: {"median": round(statistics.median(each), 4), "least": round(min(each), 4)}
           for name, each in times.items()},
    }  # fmt: skip


if __name__ == "__main__":
    main()
