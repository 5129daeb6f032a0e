"""What a request cost and gained, as its answer tells it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

from tokentree.metrics import Metrics
from tokentree.serve.writing import Choice


def usage(choices: Sequence[Choice]) -> dict[str, Any]:
    """Tokens as OpenAI's interface counts them: a prompt counts once, however many samples it has."""
    firsts = {choice.prompt: choice.seq for choice in reversed(choices)}.values()
    prompt = sum(len(seq.prompt_ids) for seq in firsts)
    new = sum(len(choice.seq.output_ids) for choice in choices)
    cached = sum(min(seq.metrics.reused_tokens, len(seq.prompt_ids)) for seq in firsts)
    return {
        "prompt_tokens": prompt,
        "completion_tokens": new,
        "total_tokens": prompt + new,
        "prompt_tokens_details": {"cached_tokens": cached},
    }


def speculative(choices: Sequence[Choice]) -> dict[str, Any]:
    """What speculation gained, under the names of vLLM; and accepted tokens by drafter. A step counts if it verified a
    draft."""
    each: list[Metrics] = [choice.seq.metrics for choice in choices]
    steps = [(rows - 1, tokens - 1) for metrics in each for rows, tokens, _ in metrics.steps if rows > 1 and tokens]
    drafted, accepted = sum(step[0] for step in steps), sum(step[1] for step in steps)
    by_drafter = Counter[str]()
    for metrics in each:
        by_drafter.update(metrics.accepted_by_source)
    histogram = sorted(Counter(step[1] for step in steps).items())
    return {
        "mean_acceptance_length": 1 + accepted / len(steps) if steps else 1.0,
        "draft_acceptance_rate": accepted / drafted if drafted else 0.0,
        "acceptance_histogram": {str(count): times for count, times in histogram},
        "num_spec_steps": len(steps),
        "num_accepted_draft_tokens": accepted,
        "num_draft_tokens": drafted,
        "accepted_by_drafter": dict(by_drafter),
    }
