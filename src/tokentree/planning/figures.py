"""What a simulation comes to, in numbers."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass

from tokentree.errors import OptionError
from tokentree.planning.simulation import Outcome

TARGETS = {  # by the names that users write
    f"{share}-{what}": f"{field}_{share}"
    for what, field in (("first-token", "first_token"), ("gap", "gap"), ("request", "request"))
    for share in ("p50", "p95")
}


@dataclass(frozen=True)
class Figures:
    """What came of a load on some replicas. Times are in seconds, and None where there are none, or no end of them.

    Args:
        load: how it is called.
        replicas: how many there are.
        method: "plain" or "speculation".
        tokens_a_second, requests_a_second: that were given out and that came, all replicas together.
        first_token_p50, first_token_p95: from a request's arrival to its first token.
        gap_p50, gap_p95, gap_mean: between two steps that gave tokens of a request.
        request_p50, request_p95, request_mean: from a request's arrival to its end.
        texts: that a forward decoded, on average.
        tokens_a_forward: that a forward gave of each of its texts.
        requests: that were measured.
        seconds: of the simulation's time in which they came.
        overloaded: whether more requests came than ended.
    """

    load: str
    replicas: int
    method: str
    tokens_a_second: float
    requests_a_second: float
    first_token_p50: float | None
    first_token_p95: float | None
    gap_p50: float | None
    gap_p95: float | None
    gap_mean: float | None
    request_p50: float | None
    request_p95: float | None
    request_mean: float | None
    texts: float
    tokens_a_forward: float
    requests: int
    seconds: float
    overloaded: bool

    @classmethod
    def of(cls, found: Outcome, load: str, replicas: int, method: str) -> Figures:
        """Of what a simulation found."""
        seconds = found.end - found.begin
        first, gaps, whole = (
            [] if found.overloaded else sorted(part) for part in (found.first, found.gaps, found.whole)
        )
        return cls(
            load, replicas, method, found.tokens / seconds if seconds else 0.0,
            found.arrived / seconds if seconds else 0.0, at(first, 0.5), at(first, 0.95), at(gaps, 0.5), at(gaps, 0.95),
            mean(gaps), at(whole, 0.5), at(whole, 0.95), mean(whole), found.texts / max(1, found.forwards),
            found.all_tokens / max(1, found.texts), found.arrived, seconds, found.overloaded,
        )  # fmt: skip


def at(ordered: SequenceOf[float], share: float) -> float | None:
    """The value that ``share`` of these are below; None if there are none."""
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))] if ordered else None


def mean(values: SequenceOf[float]) -> float | None:
    """None if there are none."""
    return math.fsum(values) / len(values) if values else None


@dataclass(frozen=True)
class Target:
    """A bound on one of the figures.

    Args:
        name: one of `TARGETS`.
        seconds: that it may be at most.
    """

    name: str
    seconds: float

    @classmethod
    def of(cls, text: str) -> Target:
        """What ``text`` asks for, such as ``p95-first-token=0.5`` or ``p95-gap=50ms``.

        Raises:
            OptionError: if it asks for nothing that there is.
        """
        found = re.fullmatch(r"([\w-]+)=(\d+\.?\d*)(ms|s)?", text.strip())
        if found is None or found[1] not in TARGETS:
            raise OptionError(f"{text!r} is no target: write NAME=SECONDS, where NAME is one of {', '.join(TARGETS)}")
        seconds = float(found[2]) / (1000 if found[3] == "ms" else 1)
        if not 0 < seconds < math.inf:
            raise OptionError(f"{text!r} is no target: it is more than 0 seconds")
        return cls(found[1], seconds)

    def met(self, figures: Figures) -> bool:
        """Whether ``figures`` keep to it."""
        value = getattr(figures, TARGETS[self.name])
        return not figures.overloaded and value is not None and value <= self.seconds
