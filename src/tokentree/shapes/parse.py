"""Shapes by name, as users write them."""

from __future__ import annotations

import json
import re
from collections.abc import Callable

from tokentree.errors import OptionError
from tokentree.shapes.adaptive import Adaptive
from tokentree.shapes.base import Shape, check_size
from tokentree.shapes.cost import Cost
from tokentree.shapes.dynamic import Dynamic
from tokentree.shapes.optimal import TYPICAL_RATES, optimal_paths
from tokentree.shapes.static import Static
from tokentree.specs import options_of


def _optimal(nodes: int = 16, depth: int = 6) -> Static:
    """The best static tree for a typical draft model."""
    if nodes > 512 or depth > 32:
        raise OptionError("an optimal shape is worked out for at most 512 nodes and a depth of at most 32")
    return Static(paths=optimal_paths(TYPICAL_RATES, nodes, depth)[1])


KINDS: dict[str, Callable[..., Shape]] = {
    "cost": Cost,
    "dynamic": Dynamic,
    "adaptive": Adaptive,
    "optimal": _optimal,
}

EXAMPLES = (
    "cost", "2x2x2", "chain:4", "paths:[[0],[0,0],[1]]", "dynamic:nodes=16,depth=6,top_k=8",
    "adaptive:mass=0.8,width=4", "optimal:nodes=16,depth=6",
)  # fmt: skip
FORMS = f"{', '.join(EXAMPLES[:-1])} or {EXAMPLES[-1]}"


def shape(text: str | Shape) -> Shape:
    """The shape that ``text`` names, such as ``cost``, ``2x2x2`` or ``dynamic:nodes=16``: see `FORMS`.

    Raises:
        OptionError: if it names none.
    """
    if isinstance(text, Shape):
        return text
    if not isinstance(text, str):
        raise OptionError(f"{text!r} is not a shape: write {FORMS}")
    name, _, rest = text.strip().partition(":")
    if re.fullmatch(r"\d{1,9}(x\d{1,9})*", text.strip()):
        return Static([int(width) for width in text.split("x")])
    if name == "chain" and re.fullmatch(r"\d{1,9}", rest):
        if int(rest) < 1:
            raise OptionError("a chain needs a length of at least 1")
        check_size(int(rest))
        return Static([1] * int(rest))
    if name == "paths":
        return Static(paths=_rank_paths(rest))
    if name in KINDS:
        options = options_of(rest, KINDS[name], "shape")
        for number in options.values():
            if isinstance(number, int):
                check_size(number)
        return KINDS[name](**options)
    raise OptionError(f"{text!r} is not a shape: write {FORMS}")


def _rank_paths(text: str) -> list[list[int]]:
    try:
        paths = json.loads(text)
    except (ValueError, RecursionError):  # ValueError of numbers with too many digits, too
        paths = None
    if not isinstance(paths, list) or not all(isinstance(p, list) and all(type(r) is int for r in p) for p in paths):
        raise OptionError(f"{text!r} is not a list of rank paths: write paths:[[0],[0,0],[1]]")
    return paths
