"""The registry of rules."""

from __future__ import annotations

from tokentree.acceptance.base import Acceptance
from tokentree.acceptance.block import Block
from tokentree.acceptance.lossy import BestPath, Typical
from tokentree.acceptance.match import Match
from tokentree.acceptance.rejection import Rejection
from tokentree.acceptance.traversal import Traversal
from tokentree.errors import OptionError
from tokentree.specs import options_of

RULES: dict[str, type[Match | Rejection | Block | Traversal | BestPath | Typical]] = {
    "match": Match,
    "rejection": Rejection,
    "block": Block,
    "traversal": Traversal,
    "best_path": BestPath,
    "typical": Typical,
}


def acceptance(name: str) -> Acceptance:
    """The rule of that name; ``typical`` takes numbers, as in ``typical:epsilon=0.09,delta=0.3``.

    Raises:
        OptionError: if there is none, or its numbers make no sense.
    """
    if not isinstance(name, str):
        raise OptionError(f"accept={name!r} is not the name of a rule: choose one of {', '.join(RULES)}")
    rule, _, rest = name.partition(":")
    if rule not in RULES:
        raise OptionError(f"unknown acceptance rule {rule!r}: choose one of {', '.join(RULES)}")
    return RULES[rule](**options_of(rest, RULES[rule], "rule"))


def told() -> str:
    """The names of all rules, and what they promise."""
    kinds = {
        kind: ", ".join(name for name, rule in RULES.items() if rule.lossy is lossy)
        for kind, lossy in (("lossless", False), ("lossy", True))
    }
    return "; ".join(f"{names} ({kind})" for kind, names in kinds.items())
