# numba gives every scalar a type of its own, which annotations can't follow:
# mypy: disable-error-code="arg-type,assignment,index,no-any-return"
"""Loops compiled by numba: those of the suffix automaton over its flat arrays."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from tokentree.drafters.best_first import best_first
from tokentree.growing import join_grown
from tokentree.jit import njit
from tokentree.tree import Floats, Ints

COUNTED_LINKS = 64  # shorter suffixes of a text that repeats itself are not counted further: appending stays constant
SCANNED_EDGES = 64  # the latest continuations of a state that are looked at

Int32s = NDArray[np.int32]

# columns of the states: longest context in tokens, suffix link, occurrences, latest edge, number of edges
LENGTH, LINK, COUNT, FIRST, DEGREE = 0, 1, 2, 3, 4
# columns of the edges: from, under which token, to, the edge of the same state before this one
STATE, TOKEN, TARGET, NEXT = 0, 1, 2, 3


@njit(cache=True)
def find_slot(slots: Int32s, edges: Int32s, state: int, token: int) -> int:
    """Where the edge of ``state`` under ``token`` is, or would be."""
    mask = len(slots) - 1
    place = (state * 0x9E3779B1 + token * 0x85EBCA77) & mask
    while slots[place]:
        edge = slots[place] - 1
        if edges[edge, STATE] == state and edges[edge, TOKEN] == token:
            break
        place = (place + 1) & mask
    return place


@njit(cache=True)
def rehash(edges: Int32s, slots: Int32s, count: int) -> None:
    for edge in range(count):
        slots[find_slot(slots, edges, np.int64(edges[edge, STATE]), np.int64(edges[edge, TOKEN]))] = edge + 1


@njit(cache=True)
def add_edge(states: Int32s, edges: Int32s, slots: Int32s, sizes: Ints, state: int, token: int, target: int) -> None:
    edge = sizes[1]
    sizes[1] += 1
    edges[edge, STATE], edges[edge, TOKEN], edges[edge, TARGET] = state, token, target
    edges[edge, NEXT] = states[state, FIRST]
    states[state, FIRST] = edge
    states[state, DEGREE] += 1
    slots[find_slot(slots, edges, state, token)] = edge + 1


@njit(cache=True)
def new_state(states: Int32s, sizes: Ints, length: int) -> int:
    state = sizes[0]
    sizes[0] += 1
    states[state, LENGTH], states[state, LINK], states[state, COUNT] = length, 0, 0
    states[state, FIRST], states[state, DEGREE] = -1, 0
    return state


@njit(cache=True)
def split(states: Int32s, edges: Int32s, slots: Int32s, sizes: Ints, parent: int, token: int, shared: int) -> int:
    """Makes a state of its own for the part of ``shared`` that ``parent`` reaches, and returns it."""
    clone = new_state(states, sizes, states[parent, LENGTH] + 1)
    states[clone, LINK], states[clone, COUNT] = states[shared, LINK], states[shared, COUNT]
    edge = states[shared, FIRST]
    while edge >= 0:
        add_edge(states, edges, slots, sizes, clone, np.int64(edges[edge, TOKEN]), edges[edge, TARGET])
        edge = edges[edge, NEXT]
    states[shared, LINK] = clone
    while parent >= 0:
        slot = slots[find_slot(slots, edges, np.int64(parent), token)]
        if not slot or edges[slot - 1, TARGET] != shared:
            break
        edges[slot - 1, TARGET] = clone
        parent = states[parent, LINK]
    return clone


@njit(cache=True)
def extend(states: Int32s, edges: Int32s, slots: Int32s, sizes: Ints, text: Ints, tokens: Int32s) -> None:
    """Appends ``tokens`` to the text whose state is ``text[0]``."""
    for i in range(len(tokens)):
        token = np.int64(tokens[i])
        state = text[0]
        slot = slots[find_slot(slots, edges, state, token)]
        if slot:  # another text went the same way
            target = np.int64(edges[slot - 1, TARGET])
            if states[target, LENGTH] != states[state, LENGTH] + 1:
                target = split(states, edges, slots, sizes, state, token, target)
            last = target
        else:
            last = new_state(states, sizes, states[state, LENGTH] + 1)
            while state >= 0 and not slots[find_slot(slots, edges, state, token)]:
                add_edge(states, edges, slots, sizes, state, token, last)
                state = np.int64(states[state, LINK])
            if state >= 0:
                target = np.int64(edges[slots[find_slot(slots, edges, state, token)] - 1, TARGET])
                if states[target, LENGTH] != states[state, LENGTH] + 1:
                    target = split(states, edges, slots, sizes, state, token, target)
                states[last, LINK] = target
        counted = np.int64(last)
        for _ in range(COUNTED_LINKS):
            states[counted, COUNT] += 1
            if counted == 0:
                break
            counted = np.int64(states[counted, LINK])
        text[0] = last


@njit(cache=True)
def match(states: Int32s, edges: Int32s, slots: Int32s, state: int, length: int, tokens: Int32s) -> tuple[int, int]:
    while state > 0 and length <= states[states[state, LINK], LENGTH]:  # split since the last call
        state = np.int64(states[state, LINK])
    for i in range(len(tokens)):
        token = np.int64(tokens[i])
        while True:
            slot = slots[find_slot(slots, edges, np.int64(state), token)]
            if slot:
                state, length = np.int64(edges[slot - 1, TARGET]), length + 1
                break
            if state == 0:
                length = 0
                break
            state = np.int64(states[state, LINK])
            length = np.int64(states[state, LENGTH])
    return state, length


@njit(cache=True)
def expected_tokens(parents: Ints, probs: Floats) -> float:
    """The sum of the nodes' joint probabilities; parents and conditional probabilities are as `grow` returns them."""
    joint, total = np.ones(len(probs) + 1), 0.0
    for node in range(len(probs)):
        joint[node + 1] = joint[parents[node]] * probs[node]
        total += joint[node + 1]
    return total


@njit(cache=True)
def repeated(states: Int32s, last: int) -> tuple[int, int]:
    """As `SuffixAutomaton.repeated`."""
    state = last
    if states[state, FIRST] < 0:  # nothing ever followed it, so this is its first time
        state = max(0, int(states[state, LINK]))
    return state, int(states[state, LENGTH])


@njit(cache=True)
def add(
    ints: Ints, floats: Floats, size: int, source: int, states: Int32s, edges: Int32s, slots: Int32s, sizes: Ints,
    text: Ints, stored_states: Int32s, stored_edges: Int32s, stored_slots: Int32s, place: Ints, new: Int32s,
    max_nodes: int, max_depth: int, min_prob: float, max_children: int,
) -> int:  # fmt: skip
    """As `SuffixAutomaton.add_to`; see `Draft.grow`."""
    extend(states, edges, slots, sizes, text, new)
    place[0], place[1] = match(stored_states, stored_edges, stored_slots, place[0], place[1], new)
    state, matched = repeated(states, text[0])
    tokens, parents, probs = grow(states, edges, state, matched, max_nodes, max_depth, min_prob, max_children)
    if place[1]:
        others = grow(stored_states, stored_edges, place[0], place[1], max_nodes, max_depth, min_prob, max_children)
        if expected_tokens(others[1], others[2]) > expected_tokens(parents, probs):
            tokens, parents, probs = others
    return join_grown(ints, floats, size, source, tokens, parents, probs)


@njit(cache=True)
def grow(
    states: Int32s, edges: Int32s, state: int, length: int, max_nodes: int, max_depth: int, min_prob: float,
    max_children: int,
) -> tuple[Ints, Ints, Floats]:  # fmt: skip
    children, targets, contexts = np.empty(256, np.int64), np.empty(256, np.int64), np.empty(256, np.int64)
    source = states, edges, children, targets, contexts, np.empty(256)
    return _best_first(source, state, length, max_nodes, max_depth, min_prob, max_children)


@njit
def _follow(
    source: tuple[Int32s, Int32s, Ints, Ints, Ints, Floats], state: int, length: int, depth: int, tokens: Ints,
    probs: Floats, states: Ints, lengths: Ints,
) -> int:  # fmt: skip
    """What may follow the last ``length`` tokens, which ``state`` stands for: these two say which node it is."""
    children, targets, contexts, chances = source[2:]
    found = predict(source[0], source[1], state, length, children, targets, contexts, chances)
    wanted = min(found, len(tokens))
    for place in range(wanted):
        best = 0
        for i in range(1, found):
            if chances[i] > chances[best]:
                best = i
        tokens[place], probs[place] = children[best], chances[best]
        states[place], lengths[place] = targets[best], contexts[best]
        chances[best] = -1.0
    return wanted


_best_first = best_first(_follow)


@njit(cache=True)
def predict(
    states: Int32s, edges: Int32s, state: int, length: int, children: Ints, targets: Ints, contexts: Ints,
    chances: Floats,
) -> int:  # fmt: skip
    """Fills in what may follow the last ``length`` tokens, which ``state`` stands for, and how probable each is;
    returns how many tokens that are."""
    found, left = 0, 1.0
    while state > 0 and left > 0.01 and found < len(children) - SCANNED_EDGES:
        total = 0
        edge = states[state, FIRST]
        for _ in range(SCANNED_EDGES):
            if edge < 0:
                break
            total += states[edges[edge, TARGET], COUNT]
            edge = edges[edge, NEXT]
        if total:
            share = left * length / (total * length + states[state, DEGREE])
            edge = states[state, FIRST]
            for _ in range(SCANNED_EDGES):
                if edge < 0:
                    break
                chance = share * states[edges[edge, TARGET], COUNT]
                for i in range(found):
                    if children[i] == edges[edge, TOKEN]:
                        chances[i] += chance
                        break
                else:
                    children[found], targets[found] = edges[edge, TOKEN], edges[edge, TARGET]
                    chances[found], contexts[found] = chance, length + 1
                    found += 1
                edge = edges[edge, NEXT]
            left -= share * total
        state = states[state, LINK]
        length = states[state, LENGTH]
    return found
