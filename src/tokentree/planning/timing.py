"""What the parts of a step take, as they were measured."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from tokentree.errors import OptionError
from tokentree.shapes.curve import CostCurve


@dataclass(frozen=True)
class Beside:
    """Seconds of something that a step does beside its forward.

    Args:
        first: with one text.
        further: that each further text adds.
        token: that each token beyond one of a text adds.
    """

    first: float = 0.0
    further: float = 0.0
    token: float = 0.0

    def seconds(self, texts: float, tokens: float | None = None) -> float:
        """With so many texts, which got so many tokens, by default one each; none take none."""
        more = 0 if tokens is None else tokens - texts
        return self.first + self.further * (texts - 1) + self.token * more if texts else 0.0


@dataclass(frozen=True)
class Timing:
    """What a step takes: a forward, drafts where there are any, and everything else.

    Args:
        curve: T(rows, texts) of a forward. Rows of trees and tokens of prompts are both rows.
        drafting: making drafts, and accepting what is right of them.
        step: the scheduler, the loop, and what hands out tokens.
        plain: the same in plain decoding. None: as `step`.
    """

    curve: CostCurve
    drafting: Beside = Beside()
    step: Beside = Beside()
    plain: Beside | None = None

    def plainly(self) -> Timing:
        """Of plain decoding."""
        return replace(self, step=self.plain or self.step)

    def forward(self, rows: int, texts: int) -> float:
        """Seconds of a forward over ``rows`` rows of so many texts. No rows are no forward."""
        return self.curve.seconds(rows, texts) if rows else 0.0

    def beside(self, step_ms: float | None, text_ms: float | None) -> Timing:
        """The same with other milliseconds of `step`, for a first and for each further text; None keeps what it has.

        Raises:
            OptionError: if one is no time.
        """
        if not all(0 <= given < math.inf for given in (step_ms, text_ms) if given is not None):
            raise OptionError("a step takes at least 0 milliseconds, and less than infinitely many")

        def other(one: Beside) -> Beside:
            first = one.first if step_ms is None else step_ms / 1e3
            return replace(one, first=first, further=one.further if text_ms is None else text_ms / 1e3)

        return replace(self, step=other(self.step), plain=self.plain and other(self.plain))
