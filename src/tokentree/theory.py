"""What acceptance rates let one expect of chains and trees.

One model of acceptance underlies all of it: wherever a node is accepted, the candidate of rank r below it is the
target's token with probability ``rates[r]``. Candidates of one node exclude each other, so their probabilities add up,
to 1 at most.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ValidationError

from tokentree.errors import OptionError
from tokentree.shapes.curve import CostCurve

Path = tuple[int, ...]
MOST_LEAVES, DEEPEST = 1_000_000, 1000  # of a full tree
MOST_TRIALS, DRAWN = 10_000_000, 1 << 20  # of a simulation; ranks that it draws at once


def check_rates(rates: Sequence[float]) -> None:
    """Raises `OptionError` unless these can be acceptance rates by rank."""
    if not rates or not all(0 <= rate <= 1 for rate in rates) or sum(rates) > 1 + 1e-9:
        raise OptionError("acceptance rates by rank are probabilities that add up to 1 at most")


def rates_of(alpha: float, branching: int) -> list[float]:
    """Acceptance by rank where every candidate has the chance ``alpha`` of being the token, given that those before it
    are not: ``alpha * (1 - alpha) ** rank``."""
    if not 0 <= alpha <= 1:
        raise OptionError("alpha is a probability")
    return [alpha * (1 - alpha) ** rank for rank in range(branching)]


# -- chains ------------------------------------------------------------------------------------------------------------


def tokens_of_chain(alpha: float, length: int) -> float:
    """Expected tokens per forward, the bonus included: (1 - alpha ** (length + 1)) / (1 - alpha) (Leviathan et al.
    2023, arXiv:2211.17192, equation 1)."""
    return math.fsum(alpha**depth for depth in range(length + 1))


# -- trees -------------------------------------------------------------------------------------------------------------


def taught_success(alpha: float, branching: int, depth: int) -> float:
    """``1 - (1 - alpha ** depth) ** (branching ** depth)``, which is taught as the probability that some path of a tree
    is accepted to its end.

    It treats the paths as if they were independent, and is a bound in neither direction: paths that share a prefix fail
    together, which makes the truth lower; siblings exclude each other, so that their chances add up, which makes it
    higher. See `whole_path`.
    """
    return 1 - math.pow(1 - math.pow(alpha, depth), branching**depth)


def check_tree(branching: int, depth: int) -> None:
    """Raises `OptionError` unless a full tree of that branching and depth can be made."""
    if branching < 1 or depth < 1:
        raise OptionError("branching and depth are at least 1")
    if depth > DEEPEST:
        raise OptionError(f"a path of more than {DEEPEST} candidates is too long to work out")
    if branching**depth > MOST_LEAVES:
        raise OptionError("a full tree of that branching and depth has over a million leaves")


def whole_path(rates: Sequence[float], branching: int, depth: int) -> float:
    """The probability that some path of a full tree is accepted to its end: at each level, that the token is among the
    ``branching`` candidates, ``sum(rates[:branching]) ** depth``."""
    check_rates(rates)
    return math.pow(math.fsum(rates[:branching]), depth)


def full_tree(branching: int, depth: int) -> list[Path]:
    """All rank paths of the tree with so many children at every node, prefixes first."""
    return [path for length in range(1, depth + 1) for path in product(range(branching), repeat=length)]


def tokens_of_tree(rates: Sequence[float], paths: Sequence[Path]) -> float:
    """Expected tokens per forward, the bonus included: the sum, over all nodes, of the probability that a node is
    accepted, which is the product of the rates along its path. Ranks without a rate are never accepted."""
    check_rates(rates)
    known = len(rates)
    return 1 + math.fsum(math.prod(rates[r] if r < known else 0.0 for r in path) for path in paths)


def simulated_tokens(
    rates: Sequence[float], paths: Sequence[Path], trials: int, generator: np.random.Generator
) -> tuple[float, float]:
    """The mean of tokens per forward over ``trials`` walks down the tree, each level's rank drawn, and its standard
    error."""
    check_rates(rates)
    if not 2 <= trials <= MOST_TRIALS:
        raise OptionError(f"a simulation needs at least 2 trials, and takes {MOST_TRIALS:,} at most")
    nodes, deepest = set(paths), max(map(len, paths), default=0)
    chances = np.append(rates, max(0.0, 1 - math.fsum(rates)))
    tokens: NDArray[np.int64] = np.ones(trials, np.int64)
    each = max(1, DRAWN // max(1, deepest))
    for first in range(0, trials, each):
        drawn = generator.choice(len(chances), (min(each, trials - first), deepest), p=chances / chances.sum())
        for trial, ranks in enumerate(drawn.tolist(), first):
            while tokens[trial] <= deepest and tuple(ranks[: tokens[trial]]) in nodes:
                tokens[trial] += 1
    return float(tokens.mean()), float(tokens.std(ddof=1) / math.sqrt(trials))


# -- speed -------------------------------------------------------------------------------------------------------------


class _Curve(BaseModel):
    """What a curve is read from: a part of what `tokentree calibrate --json` prints."""

    rows: list[int]
    seconds: list[float]
    per_sequence: float = 0.0


def read_curve(text: str) -> CostCurve:
    """T(n) from JSON: ``rows``, ascending, and the ``seconds`` of a forward with so many.

    Raises:
        OptionError: if ``text`` is no such object.
    """
    try:
        found = _Curve.model_validate_json(text)
        return CostCurve(found.rows, found.seconds, found.per_sequence)
    except ValidationError:
        raise OptionError("no cost curve: it has rows and seconds, as calibrate --json prints them") from None


@dataclass(frozen=True)
class Expected:
    """What to expect of one way of drafting.

    Args:
        nodes: candidates that are verified.
        whole: the probability that some path is accepted to its end.
        tokens: per forward.
        cost: of a step, in plain steps: drafting and verifying.
    """

    nodes: int
    whole: float
    tokens: float
    cost: float

    @property
    def speed_up(self) -> float:
        """E[tokens] / (T_draft + T_verify), in plain steps."""
        return self.tokens / self.cost


def expected(
    rates: Sequence[float], branching: int, depth: int, cost: CostCurve | None = None, draft_cost: float = 0.0
) -> Expected:
    """Of a full tree; ``branching`` 1 is a chain.

    Args:
        cost: of a forward; None: the same, however many rows it has.
        draft_cost: of one level of drafting, in plain steps.

    Raises:
        OptionError: if a number makes no sense.
    """
    check_tree(branching, depth)
    if not 0 <= draft_cost < math.inf:
        raise OptionError("a draft's cost is at least 0")
    paths = full_tree(branching, depth)
    verify = 1.0 if cost is None else cost.seconds(1 + len(paths)) / cost.seconds(1)
    return Expected(
        len(paths), whole_path(rates, branching, depth), tokens_of_tree(rates, paths), verify + depth * draft_cost
    )
