"""A suffix automaton over token ids: every substring seen so far, how often it occurred, and what followed it.

Blumer et al. 1985, "The smallest automaton recognizing the subwords of a text"; built online, one token at a time, in
amortised constant time. States and edges lie in flat arrays and the loops over them are compiled (numba), so that five
million tokens fit in memory and a step takes microseconds.
"""

from __future__ import annotations

from collections.abc import Sequence as SequenceOf

import numpy as np

from tokentree.draft import Draft
from tokentree.drafters.lookup import automaton_loops as compiled
from tokentree.drafters.lookup.automaton_loops import Int32s
from tokentree.tree import Floats, Ints


class SuffixAutomaton:
    """Takes in texts token by token. State 0 is the empty context.

    Args:
        capacity: tokens to make room for at first; the room doubles when it is full.
    """

    def __init__(self, capacity: int = 512) -> None:
        self._states = np.zeros((2 * capacity + 2, 5), np.int32)
        self._states[0] = (0, -1, 0, -1, 0)
        self._edges = np.zeros((3 * capacity + 4, 4), np.int32)
        self._slots = np.zeros(_slots_for(3 * capacity), np.int32)
        self._sizes = np.array([1, 0], np.int64)  # states, edges
        self._tokens = 0
        self._last = np.zeros(1, np.int64)  # the state of the current text

    def extend(self, tokens: Int32s | SequenceOf[int]) -> None:
        """Appends ``tokens`` to the current text."""
        new = np.asarray(tokens, np.int32)
        for begin in range(0, len(new), 4096):
            part = new[begin : begin + 4096]
            self._reserve(len(part))
            compiled.extend(self._states, self._edges, self._slots, self._sizes, self._last, part)

    def start_text(self) -> None:
        """What comes next starts a text of its own."""
        self._last[0] = 0

    def match(self, state: int, length: int, tokens: SequenceOf[int]) -> tuple[int, int]:
        """Where a walk through this automaton gets to, and how many of the last tokens match there.

        Args:
            state, length: where it was; (0, 0) at the start of a text.
            tokens: what the text went on with. Each costs amortised constant time; nothing is matched again.
        """
        state, length = compiled.match(
            self._states, self._edges, self._slots, state, length, np.asarray(tokens, np.int32)
        )
        return int(state), int(length)

    @property
    def repeated(self) -> tuple[int, int]:
        """The state of the longest end of the current text that also stood earlier in it, and its length in tokens."""
        state, length = compiled.repeated(self._states, self._last[0])
        return int(state), int(length)

    def grow(
        self, state: int, length: int, max_nodes: int, max_depth: int, min_prob: float, max_children: int = 8
    ) -> tuple[Ints, Ints, Floats]:
        """The most probable continuations of the context ``state``, of which the last ``length`` tokens match, best
        first (SuffixDecoding, Oliaro et al. 2024, arXiv:2411.04975, takes them in that order too).

        Probabilities are blended as in PPM (Cleary and Witten 1984; escape method C of Moffat 1990): counts in the
        longest context, and for what escapes it counts in the next shorter one. A context of L tokens weighs its
        counts L times, because long matches seldom end.

        Returns:
            tokens int64[n], parents int64[n] (0 is the root, node i is ``i + 1``) and the conditional probabilities
            float64[n], of at most ``max_nodes`` nodes whose joint probability is at least ``min_prob``.
        """
        found: tuple[Ints, Ints, Floats] = compiled.grow(
            self._states, self._edges, state, length, max_nodes, max_depth, min_prob, max_children
        )
        return found

    def add_to(
        self, draft: Draft, source: int, store: SuffixAutomaton, place: Ints, tokens: SequenceOf[int], max_nodes: int,
        max_depth: int, min_prob: float, max_children: int = 8,
    ) -> None:  # fmt: skip
        """Appends ``tokens`` as `extend` does, and goes on with them in ``store`` as `match` does, where ``place``,
        int64[2], is a state and a length. Then joins to ``draft`` what `grow` gives at `repeated`, or in the store,
        whichever expects more tokens. All in one compiled call."""
        self._reserve(len(tokens))
        draft.grow(
            compiled.add, max_nodes, source, self._states, self._edges, self._slots, self._sizes, self._last,
            store._states, store._edges, store._slots, place, np.array(tokens, np.int32), max_nodes, max_depth,
            min_prob, max_children,
        )  # fmt: skip

    @property
    def nbytes(self) -> int:
        """Memory of the arrays, in bytes."""
        return self._states.nbytes + self._edges.nbytes + self._slots.nbytes

    def _reserve(self, tokens: int) -> None:
        """Room for ``tokens`` more. All together have at most two states and three edges each; a single one, as at the
        end of a loop, may add as many edges as there are tokens before it."""
        self._tokens += tokens
        states, edges = 2 * self._tokens + 2, 3 * self._tokens + 4
        if states > len(self._states):
            self._states = _grown(self._states, states)
        if edges > len(self._edges):
            self._edges = _grown(self._edges, edges)
        if 2 * edges > len(self._slots):
            slots = np.zeros(_slots_for(2 * edges), np.int32)
            compiled.rehash(self._edges, slots, int(self._sizes[1]))
            self._slots = slots  # whole: an interruption before leaves the old ones


def warm_up() -> None:
    """Compiles the loops, or loads them from numba's cache, so that no request waits for it."""
    automaton = SuffixAutomaton(2)
    automaton.extend([1, 2, 1, 2])
    automaton.add_to(Draft(1), 1, automaton, np.array(automaton.match(0, 0, [1])), [1], 2, 2, 0.0)


def _slots_for(edges: int) -> int:
    return 1 << (2 * edges - 1).bit_length()


def _grown(array: Int32s, rows: int) -> Int32s:
    new = np.zeros((max(rows, 2 * len(array)), array.shape[1]), np.int32)
    new[: len(array)] = array
    return new
