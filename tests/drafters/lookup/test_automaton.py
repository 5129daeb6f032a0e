"""The suffix automaton knows what a naive search through its texts would find, and no more."""

from __future__ import annotations

from collections import Counter
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tokentree.drafters.lookup.automaton import SuffixAutomaton
from tokentree.drafters.lookup.automaton_loops import COUNT, LENGTH, LINK

Text = list[int]

ALPHABET = (0, 1, 2)
token = st.sampled_from(ALPHABET)
loops = st.builds(lambda unit, times: (unit * times)[:24], st.lists(token, min_size=1, max_size=3), st.integers(2, 24))
text = st.one_of(st.lists(token, max_size=16), loops)  # short enough that no count is cut
texts = st.lists(text, min_size=1, max_size=3)


def automaton_of(texts: list[Text], capacity: int = 512) -> SuffixAutomaton:
    automaton = SuffixAutomaton(capacity)
    for text in texts:
        automaton.start_text()
        automaton.extend(text)
    return automaton


def occurrences(texts: list[Text], part: Text) -> int:
    return sum(text[i : i + len(part)] == part for text in texts for i in range(len(text) - len(part) + 1))


def parts(texts: list[Text]) -> set[tuple[int, ...]]:
    """Every substring but the empty one."""
    return {tuple(text[i:j]) for text in texts for i in range(len(text)) for j in range(i + 1, len(text) + 1)}


def longest_end(text: Text, texts: list[Text]) -> Text:
    """The longest end of ``text`` that stands in ``texts``."""
    return next(text[i:] for i in range(len(text) + 1) if occurrences(texts, text[i:]))


# -- what it knows --------------------------------------------------------------------------------------------------


@given(texts)
def test_it_counts_every_substring_of_its_texts(texts: list[Text]) -> None:
    automaton = automaton_of(texts)
    for part in parts(texts):
        state, length = automaton.match(0, 0, part)
        assert length == len(part)
        assert automaton._states[state, COUNT] == occurrences(texts, list(part))
    assert automaton._states[0, COUNT] == sum(map(len, texts))


@given(texts)
def test_it_knows_no_other_substring(texts: list[Text]) -> None:
    states = automaton_of(texts)
    size = int(states._sizes[0])
    lengths, links = states._states[:size, LENGTH], states._states[:size, LINK]
    # a state stands for the contexts longer than those of the state that it links to
    assert int((lengths[1:] - lengths[links[1:]]).sum()) == len(parts(texts))


@given(texts, st.lists(token, max_size=12), st.lists(st.integers(0, 3), min_size=1))
def test_a_walk_along_another_text_keeps_the_longest_end_that_is_known(
    texts: list[Text], other: Text, steps: list[int]
) -> None:
    automaton = automaton_of(texts)
    state = length = place = 0
    for step in [*steps, len(other)]:
        state, length = automaton.match(state, length, other[place : place + step])
        place = min(len(other), place + step)
        known = longest_end(other[:place], texts)
        assert length == len(known)
        assert state == automaton.match(0, 0, known)[0]


@settings(max_examples=200)
@given(st.lists(st.tuples(st.booleans(), st.booleans(), st.lists(token, max_size=6)), max_size=12))
def test_a_walk_goes_on_after_the_automaton_has_grown(events: list[tuple[bool, bool, Text]]) -> None:
    """Growth splits states under the walker; what matched before still matches, and is not matched anew."""
    automaton, texts, state, known = SuffixAutomaton(), [list[int]()], 0, list[int]()
    for grows, starts, tokens in events:
        if grows:
            if starts:
                automaton.start_text()
                texts.append([])
            automaton.extend(tokens)
            texts[-1] += tokens
        else:
            state, length = automaton.match(state, len(known), tokens)
            for new in tokens:
                known = longest_end([*known, new], texts)
            assert length == len(known)
            assert state == automaton.match(0, 0, known)[0]


def test_a_split_never_lengthens_a_match() -> None:
    automaton = automaton_of([[9, 1, 2]])
    state, length = automaton.match(0, 0, [2])  # where 9 1 2 and 1 2 are, too
    automaton.start_text()
    automaton.extend([8, 1, 2, 7])  # 1 2 and 2 get a state of their own
    assert automaton.match(state, length, [7]) == (automaton.match(0, 0, [2, 7])[0], 2)


def test_a_token_that_was_never_seen_ends_the_match() -> None:
    automaton = automaton_of([[1, 2, 3]])
    assert automaton.match(0, 0, [1, 2, 9]) == (0, 0)
    assert automaton.match(0, 0, [9, 2, 3])[1] == 2
    assert SuffixAutomaton().match(0, 0, [1]) == (0, 0)


@given(texts)
def test_what_repeats_is_the_longest_end_that_stood_earlier(texts: list[Text]) -> None:
    *earlier, last = texts
    automaton = automaton_of(earlier)
    automaton.start_text()
    for end, new in enumerate(last, 1):
        automaton.extend([new])
        now, seen = last[:end], [*earlier, last[:end]]
        whole = occurrences(seen, now)
        if any(occurrences(seen, [*now, token]) for token in ALPHABET):
            known = now  # an earlier text begins with all of this one and goes on
        else:
            known = next(now[i:] for i in range(1, end + 1) if occurrences(seen, now[i:]) > whole)
        assert automaton.repeated == (automaton.match(0, 0, known)[0], len(known))


def test_nothing_repeats_in_an_empty_text() -> None:
    assert SuffixAutomaton().repeated == (0, 0)
    assert automaton_of([[1, 2], []]).repeated == (0, 0)


# -- what it predicts -----------------------------------------------------------------------------------------------


def predicted(texts: list[Text], context: Text) -> dict[int, tuple[float, Text]]:
    """PPM by counting: what may follow ``context``, how probable it is, and the context that it was first found in."""
    found: dict[int, tuple[float, Text]] = {}
    left = 1.0
    while context and left > 0.01:
        follow = {token: occurrences(texts, [*context, token]) for token in ALPHABET}
        total, kinds = sum(follow.values()), sum(map(bool, follow.values()))
        if total:
            share = left * len(context) / (total * len(context) + kinds)
            for token in filter(follow.__getitem__, follow):
                prob, first = found.get(token, (0.0, [*context, token]))
                found[token] = prob + share * follow[token], first
            left -= share * total
        here = occurrences(texts, context)
        shorter = (context[i:] for i in range(1, len(context) + 1))
        context = next(end for end in shorter if not end or occurrences(texts, end) > here)
    return found


@settings(max_examples=200)
@given(
    texts, st.integers(0, 20), st.integers(1, 6), st.integers(0, 12), st.integers(0, 4),
    st.sampled_from([0.0, 0.01, 0.05, 0.3]), st.sampled_from([1, 2, 8]),
)  # fmt: skip
def test_it_grows_the_most_probable_continuations_best_first(
    texts: list[Text], begin: int, size: int, max_nodes: int, max_depth: int, min_prob: float, max_children: int
) -> None:
    automaton, now = automaton_of(texts), [token for text in texts for token in text][begin : begin + size]
    state, length = automaton.match(0, 0, now)
    tokens, parents, probs = automaton.grow(state, length, max_nodes, max_depth, min_prob, max_children)
    assert len(tokens) == len(parents) == len(probs) <= max_nodes

    joints, depths = [1.0], [0]
    follow = [predicted(texts, now[len(now) - length :])]  # of the root, then of each node
    for node, (token, parent, prob) in enumerate(zip(tokens.tolist(), parents.tolist(), probs.tolist()), 1):
        assert parent < node
        expected, context = follow[parent].pop(token)  # a sibling with the same token would find nothing
        assert prob == pytest.approx(expected)
        assert occurrences(texts, context)
        joints.append(joints[parent] * prob)
        depths.append(depths[parent] + 1)
        follow.append(predicted(texts, context))
    assert max(depths) <= max_depth
    assert min(joints) >= min_prob
    assert joints[1:] == sorted(joints[1:], reverse=True)
    siblings = Counter(parents.tolist())
    assert max(siblings.values(), default=0) <= max_children
    for parent in siblings:
        assert sum(probs[parents == parent]) <= 1 + 1e-9

    # nothing better was left out
    worst = joints[-1] if len(tokens) == max_nodes else min_prob
    for node, others in enumerate(follow):
        left_out = max((prob for prob, _ in others.values()), default=0.0)
        assert left_out <= min(probs[parents == node], default=1.0) + 1e-9
        if depths[node] < max_depth and siblings[node] < max_children:
            assert joints[node] * left_out <= worst + 1e-9


def test_probabilities_are_those_of_the_formula() -> None:
    automaton = automaton_of([[3, 1, 2, 5, 3, 1, 2, 5, 4, 1, 2, 6, 3, 1, 2]])
    tokens, parents, probs = automaton.grow(*automaton.repeated, 8, 1, 0.0)
    # 3 1 2 went on with 5 twice, one kind: 2 * 3 / (2 * 3 + 1), and 1/7 is left for the shorter context 1 2, which
    # went on with 5 twice and with 6 once, two kinds: 1/7 * 2 / (3 * 2 + 2) for each time
    assert (tokens.tolist(), parents.tolist()) == ([5, 6], [0, 0])
    assert probs.tolist() == pytest.approx([6 / 7 + 1 / 7 * 2 * 2 / 8, 1 / 7 * 2 / 8])


def test_of_equally_probable_continuations_the_latest_comes_first() -> None:
    automaton = automaton_of([[1, 2, 3, 1, 2, 4, 1, 2]])
    assert automaton.grow(*automaton.repeated, 2, 1, 0.0)[0].tolist() == [4, 3]


def test_nothing_is_predicted_without_a_context() -> None:
    automaton = automaton_of([[1, 2, 3, 4]])
    assert all(len(part) == 0 for part in automaton.grow(0, 0, 8, 4, 0.0))


# -- how large it gets ----------------------------------------------------------------------------------------------


def assert_fits(automaton: SuffixAutomaton, tokens: int) -> None:
    states, edges = automaton._sizes.tolist()
    assert states <= max(1, 2 * tokens)
    assert edges <= 3 * tokens
    assert states <= len(automaton._states)
    assert edges <= len(automaton._edges)
    assert 2 * edges <= len(automaton._slots)  # a search for a slot ends soon


@given(texts, st.integers(1, 4))
def test_room_is_made_in_time(texts: list[Text], capacity: int) -> None:
    automaton, at_once, count = SuffixAutomaton(capacity), automaton_of(texts), 0
    for text in texts:
        automaton.start_text()
        for new in text:
            automaton.extend([new])
            count += 1
            assert_fits(automaton, count)
    assert automaton._sizes.tolist() == at_once._sizes.tolist()
    for part in parts(texts):
        assert automaton.match(0, 0, part) == at_once.match(0, 0, part)


@pytest.mark.parametrize("ends", [1, 3])
def test_the_end_of_a_long_loop_adds_an_edge_to_each_of_its_contexts(ends: int) -> None:
    for length in range(1, 60):  # whatever room is left just then
        automaton = SuffixAutomaton(capacity=2)
        for new in [7] * length + [8, 9, 8][:ends]:
            automaton.extend([new])
        assert_fits(automaton, length + ends)
        assert automaton.match(0, 0, [7] * length + [8])[1] == length + 1


def test_a_loop_is_predicted_to_go_on() -> None:
    automaton = SuffixAutomaton(capacity=1)
    for _ in range(1000):
        automaton.extend([7])
    assert automaton.repeated[1] == 999
    tokens, parents, probs = automaton.grow(*automaton.repeated, 20, 16, 0.01)
    assert (tokens.tolist(), parents.tolist()) == ([7] * 16, list(range(16)))
    assert min(probs) > 0.9


def test_a_hundred_thousand_tokens_are_counted() -> None:
    tokens = np.random.default_rng(0).integers(0, 40, 100_000).tolist()
    automaton = SuffixAutomaton()
    automaton.extend(tokens)
    assert_fits(automaton, len(tokens))
    for pair, count in Counter(pairwise(tokens)).items():
        assert automaton._states[automaton.match(0, 0, pair)[0], COUNT] == count
    assert automaton.match(0, 0, tokens[50_000:])[1] == 50_000
    assert 1 <= automaton.repeated[1] < 20
    assert 0 < automaton.nbytes < 100_000 * 200
