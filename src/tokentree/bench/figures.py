"""What a run shows: speed-ups with their intervals, by task, and how often candidates were accepted."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from tokentree.bench.report import summarise
from tokentree.bench.results import Run, Sample

# Spec-Bench's kinds (Xia et al. 2024, arXiv:2401.07851) and HumanEval, as tasks
GROUPS = {
    "Q&A": ("qa", "rag"),
    "summarisation": ("summarization",),
    "code": ("coding", "humaneval"),
    "creative writing": ("writing", "roleplay"),
    "translation": ("translation",),
    "maths": ("math", "math_reasoning"),
    "other": ("reasoning", "extraction", "stem", "humanities"),
}
DRAWS = 2000  # of a bootstrap
PEERS = ("transformers", "llama.cpp", "openvino")  # what other libraries' methods begin with
CHAIN = ":chain:"  # what tells a chain's name
FEW = 20  # steps below which nothing is told of a depth


@dataclass(frozen=True)
class Gain:
    """A speed-up over ``prompts`` prompts, and the interval that holds it in 95% of the bootstrap's draws: None where
    there is nothing to draw from, with one prompt, and where a method is compared with itself."""

    value: float
    prompts: int
    low: float | None = None
    high: float | None = None

    def __str__(self) -> str:
        return f"{self.value:.2f}" + ("" if self.low is None else f" ({self.low:.2f} to {self.high:.2f})")


def methods_of(run: Run) -> list[str]:
    """In the order of the run; the first is what the others are compared with."""
    return list(dict.fromkeys(sample.method for sample in run.samples))


def short_names(methods: Sequence[str]) -> dict[str, str]:
    """Names without the folders of files in them, where that leaves them different."""
    names = {method: ":".join(part.rsplit("/", 1)[-1] for part in method.split(":")) for method in methods}
    times = Counter(names.values())
    return {method: name if times[name] == 1 else method for method, name in names.items()}


def best_chain(run: Run) -> str | None:
    """The fastest of the methods that draft chains, over all prompts."""
    chains = [row for row in summarise(run) if CHAIN in row.method]
    return max(chains, key=lambda row: row.tokens_per_second).method if chains else None


def group_of(category: str) -> str:
    """The task that a category belongs to; an unknown one is a task by itself."""
    for name, members in GROUPS.items():
        if any(category.lower().startswith(member) for member in members):
            return name
    return category


def by_task(run: Run) -> dict[str, list[Sample]]:
    """The samples of each task, known ones first."""
    found = defaultdict[str, list[Sample]](list)
    for sample in run.samples:
        found[group_of(sample.category)].append(sample)
    return {name: found[name] for name in [*(name for name in GROUPS if name in found), *found]}


def by_category(run: Run) -> dict[str, list[Sample]]:
    found = defaultdict[str, list[Sample]](list)
    for sample in run.samples:
        found[sample.category].append(sample)
    return dict(found)


def prompts_of(samples: Sequence[Sample]) -> int:
    return len({(sample.category, sample.prompt) for sample in samples})


def gain(samples: Sequence[Sample], method: str, base: str, seed: int = 0) -> Gain | None:
    """How many times as fast as ``base`` a method decoded: rates pooled over the turns that both finished, and a
    bootstrap over the prompts (Efron 1979), seeded; the turns of a prompt are drawn together, since they are not
    independent. None if there are no such turns."""
    turns: dict[str, Mapping[tuple[str, str, int], Sample]] = {
        name: {s.place: s for s in samples if s.method == name and s.decoded_tokens and s.decode_seconds}
        for name in (method, base)
    }
    pooled = defaultdict[tuple[str, str], np.ndarray](lambda: np.zeros((2, 2)))
    for place, mine in turns[method].items():
        if place in turns[base]:
            both = mine, turns[base][place]
            pooled[place[:2]] += [[s.decoded_tokens, s.decode_seconds] for s in both]
    if not pooled:
        return None
    work = np.array(list(pooled.values()))  # [prompts, mine and theirs, tokens and seconds]
    value = float(_ratio(work.sum(0)))
    if len(work) == 1 or method == base:
        return Gain(value, len(work))
    drawn = np.random.default_rng(seed).integers(0, len(work), (DRAWS, len(work)))
    low, high = np.quantile(_ratio(work[drawn].sum(1)), [0.025, 0.975])
    return Gain(value, len(work), float(low), float(high))


def _ratio(work: np.ndarray) -> np.ndarray:
    """Of rates; [..., 2, 2] holds two methods' tokens and seconds."""
    rates = work[..., 0] / work[..., 1]
    ratio: np.ndarray = rates[..., 0] / rates[..., 1]
    return ratio


def acceptance_by_depth(samples: Sequence[Sample], method: str) -> list[tuple[int, float, int]]:
    """Depth, the share of steps whose tree went so deep in which a node there was accepted, and how many these were."""
    accepted, offered = Counter[int](), Counter[int]()
    for sample in samples:
        if sample.method == method:
            accepted.update(dict(enumerate(sample.metrics.get("accepted_by_depth", []), start=1)))
            offered.update(dict(enumerate(sample.metrics.get("offered_by_depth", []), start=1)))
    return [(depth, accepted[depth] / steps, steps) for depth, steps in sorted(offered.items()) if steps]


def acceptance(run: Run) -> dict[str, list[tuple[int, float]]]:
    """For each method with trees, the depths with `FEW` steps or more and the shares accepted there."""
    found = {
        name: [(depth, share) for depth, share, steps in acceptance_by_depth(run.samples, name) if steps >= FEW]
        for name in methods_of(run)
    }
    return {name: points for name, points in found.items() if points}
