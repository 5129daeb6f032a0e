"""Counts and times of a request, and what speculation gained."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any


@dataclass
class Metrics:
    """Counts and times of one request. Each request of a batch is charged the full time of its steps.

    Attributes:
        prompt_tokens: tokens of the prompt.
        reused_tokens: tokens of the prompt whose KV came from an earlier text.
        new_tokens: tokens of the output.
        target_forwards: forwards of the target that decoded this request.
        drafted_tokens: candidates in all trees.
        accepted_tokens: candidates that were accepted.
        refused_steps: steps that ended at a node whose children were all refused, rather than at a leaf.
        accepted_by_depth: entry d counts the steps that accepted a node at depth d + 1.
        offered_by_depth: entry d counts the steps whose tree reached depth d + 1.
        accepted_by_source: accepted tokens by the name of the drafter; "grammar" for those that had to come.
        steps: for each target forward, the rows verified for this request, the tokens emitted, and the seconds of the
            whole step.
        queue_seconds: the seconds from when the request was made until it was first read.
        prefill_seconds, draft_seconds, verify_seconds, accept_seconds: the time of each part.
        decode_seconds: the time of all steps that decoded this request.
        lossy: whether the acceptance rule may change the text.
    """

    prompt_tokens: int = 0
    reused_tokens: int = 0
    new_tokens: int = 0
    target_forwards: int = 0
    drafted_tokens: int = 0
    accepted_tokens: int = 0
    refused_steps: int = 0
    accepted_by_depth: list[int] = field(default_factory=list)
    offered_by_depth: list[int] = field(default_factory=list)
    accepted_by_source: dict[str, int] = field(default_factory=dict)
    steps: list[tuple[int, int, float]] = field(default_factory=list)
    queue_seconds: float = 0.0
    prefill_seconds: float = 0.0
    draft_seconds: float = 0.0
    verify_seconds: float = 0.0
    accept_seconds: float = 0.0
    decode_seconds: float = 0.0
    lossy: bool = False

    @property
    def mean_accepted_length(self) -> float:
        """Tokens emitted per target forward, bonus tokens included. Plain decoding has 1.

        It is pooled over steps, as Spec-Bench does (Xia et al. 2024, arXiv:2401.07851).
        """
        return self.new_tokens / self.target_forwards if self.target_forwards else 0.0

    @property
    def acceptance_rate(self) -> float:
        """Accepted draft tokens / (accepted draft tokens + steps that stopped before a leaf)."""
        tries = self.accepted_tokens + self.refused_steps
        return self.accepted_tokens / tries if tries else 0.0

    @property
    def tokens_per_second(self) -> float:
        """New tokens per second of decoding. The time of the prefill isn't counted."""
        return self.new_tokens / self.decode_seconds if self.decode_seconds else 0.0

    def count_step(self, depth: int, nodes: int, accepted: int, refused: bool) -> None:
        """Counts one verify step: a tree of ``nodes`` candidates down to ``depth``, ``accepted`` of them kept."""
        self.target_forwards += 1
        self.drafted_tokens += nodes
        self.accepted_tokens += accepted
        self.refused_steps += refused
        missing = depth - len(self.offered_by_depth)
        self.offered_by_depth += [0] * missing
        self.accepted_by_depth += [0] * missing
        for level in range(depth):
            self.offered_by_depth[level] += 1
            self.accepted_by_depth[level] += level < accepted

    def count_sources(self, sources: list[int], accepted: list[int], names: list[str]) -> None:
        """Counts who proposed the ``accepted`` nodes, as the bits of ``sources`` say, which stand for ``names``."""
        for node in accepted:
            for bit, name in enumerate(names):
                if sources[node] >> bit & 1:
                    self.accepted_by_source[name] = self.accepted_by_source.get(name, 0) + 1

    def to_dict(self) -> dict[str, Any]:
        """All fields and properties as plain numbers, by name."""
        return asdict(self) | {
            "mean_accepted_length": self.mean_accepted_length,
            "acceptance_rate": self.acceptance_rate,
            "tokens_per_second": self.tokens_per_second,
        }
