"""Random inputs for property tests."""

from __future__ import annotations

import numpy as np
from hypothesis import strategies as st

from tokentree.draft import Draft
from tokentree.tree import TokenTree

tokens = st.integers(0, 5)
path_sets = st.lists(st.lists(tokens, min_size=1, max_size=5), max_size=6)
numbers = st.integers(0, 2**32 - 1)  # seeds of generators


@st.composite
def token_trees(draw: st.DrawFn, root: int | None = None, max_nodes: int = 12) -> TokenTree:
    """Any tree: parents first, siblings distinct, in no further order."""
    below: dict[tuple[int, int], None] = {}
    for _ in range(draw(st.integers(0, max_nodes - 1))):
        below[draw(st.integers(0, len(below))), draw(tokens)] = None
    first = draw(tokens) if root is None else root
    return TokenTree(np.array([first, *(t for _, t in below)]), np.array([-1, *(p for p, _ in below)]))


@st.composite
def drafts(draw: st.DrawFn, max_nodes: int = 14) -> Draft:
    """A draft of picked children, level by level, each node's in falling order of score, as a draft model adds them."""
    draft, level = Draft(draw(tokens)), [0]
    while level:
        grown: list[int] = []
        for parent in level:
            for rank in range(min(draw(st.integers(0, 3)), max_nodes - len(draft))):
                grown.append(draft.add(parent, rank, -draw(st.floats(0, 1)) - rank, rank))
        level = grown
    return draft
