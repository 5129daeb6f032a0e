"""The radix tree over token ids: against a model that knows every row by itself."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import takewhile

import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from tokentree.engines.radix import Node, RadixTree, shared_length
from tokentree.errors import InvariantError, OptionError
from tokentree.tree import Ints

Text = tuple[int, ...]
HEADER = 5  # bytes of a run beside its rows, so that a split changes how many there are
texts = st.lists(st.integers(0, 2), max_size=14).map(tuple)


@dataclass(frozen=True)
class Named:
    """Rows that are named by the text up to each of them; of a page, up to its end, and by their place in it."""

    names: tuple[Text, ...]

    @property
    def nbytes(self) -> int:
        return HEADER + 3 * len(self.names)

    def __len__(self) -> int:
        return len(self.names)

    def split(self, at: int) -> tuple[Named, Named]:
        return Named(self.names[:at]), Named(self.names[at:])


def _ids(text: Sequence[int]) -> Ints:
    return np.array(text, np.int64)


def _insert(tree: RadixTree[Named], text: Text, granule: int = 1) -> int:
    def rows_from(start: int, end: int) -> Named:
        assert 0 <= start < end <= len(text)
        return Named(tuple(_rows(text, granule)[start:end]))

    return tree.insert(_ids(text), rows_from)


def _names(tree: RadixTree[Named], text: Text) -> list[Text]:
    """Of the rows that `match` finds."""
    return [name for node, length in tree.match(_ids(text)) for name in node.rows.names[:length]]


def _rows(text: Text, granule: int) -> list[Text]:
    """Names of the rows of all that is whole pages."""
    places = range(len(text) // granule * granule)
    return [(*text[: i // granule * granule + granule], *([-1 - i % granule] if granule > 1 else [])) for i in places]


def test_how_far_two_texts_are_the_same() -> None:
    one, other = np.array([1, 2, 3, 4]), np.array([1, 2, 9])
    assert [shared_length(one, other), shared_length(one, one[:2]), shared_length(one, one[1:])] == [2, 2, 0]


@dataclass
class Lock:
    """One that was taken, and the rows that it keeps."""

    node: Node[Named]
    kept: list[Text] = field(default_factory=list)


class AgainstAModel(RuleBasedStateMachine):
    """The model is the set of rows that are known, whatever the runs are."""

    @initialize(granule=st.sampled_from([1, 1, 2, 3]))
    def begin(self, granule: int) -> None:
        self.granule, self.tree = granule, RadixTree[Named](granule)
        self.known, self.locks = set[Text](), list[Lock]()

    @rule(text=texts)
    def insert(self, text: Text) -> None:
        begun = len(self._known_of(text))
        assert _insert(self.tree, text, self.granule) == begun
        self.known |= {*_rows(text, self.granule)}
        assert _names(self.tree, text) == _rows(text, self.granule)

    @rule(text=texts)
    def match(self, text: Text) -> None:
        assert _names(self.tree, text) == self._known_of(text)

    @rule(text=texts)
    def lock(self, text: Text) -> None:
        if path := self.tree.match(_ids(text)):
            self.tree.lock(node := path[-1][0])
            self.locks.append(Lock(node, self._known_of(text)))

    @precondition(lambda self: self.locks)
    @rule(data=st.data())
    def unlock(self, data: st.DataObject) -> None:
        lock = self.locks.pop(data.draw(st.integers(0, len(self.locks) - 1)))
        self.tree.unlock(lock.node)

    @rule(nbytes=st.integers(-1, 80))
    def evict(self, nbytes: int) -> None:
        before = self.tree.nbytes
        gone = self.tree.evict(nbytes)
        for rows in gone:
            assert self.known.issuperset(rows.names)
            self.known.difference_update(rows.names)
        freed = sum(rows.nbytes for rows in gone)
        assert before - self.tree.nbytes == freed
        assert freed - (gone[-1].nbytes if gone else 0) < max(nbytes, 1)  # none more than are needed
        assert freed >= nbytes or all(node.children or node.references for node in self.tree.nodes())

    @invariant()
    def whole(self) -> None:
        self.tree.check()
        nodes = list(self.tree.nodes())
        assert sorted(name for node in nodes for name in node.rows.names) == sorted(self.known)
        assert self.tree.num_rows == len(self.known)
        assert self.tree.nbytes == HEADER * len(nodes) + 3 * len(self.known)
        for lock in self.locks:
            assert self.known.issuperset(lock.kept)
        # no lock is forgotten, and none is left over
        own = {id(node): node.references - sum(c.references for c in node.children.values()) for node in nodes}
        assert sum(own.values()) == len(self.locks)
        assert all(own[id(lock.node)] for lock in self.locks)

    def _known_of(self, text: Text) -> list[Text]:
        """The rows that `match` is to find."""
        return list(takewhile(self.known.__contains__, _rows(text, self.granule)))


AgainstAModel.TestCase.settings = settings(max_examples=150, stateful_step_count=40, deadline=None)
TestAgainstAModel = AgainstAModel.TestCase


# -- splits and granules -----------------------------------------------------------------------------------------------


def test_a_run_is_split_where_texts_part_and_the_node_stays_the_later_part() -> None:
    tree = RadixTree[Named]()
    _insert(tree, (1, 2, 3, 4, 5))
    first = tree.match(_ids((1,)))[0][0]
    tree.lock(first)
    assert _insert(tree, (1, 2, 3, 9)) == 3
    assert [(node.tokens.tolist(), length) for node, length in tree.match(_ids((1, 2, 3, 4)))] == [
        ([1, 2, 3], 3), ([4, 5], 1)
    ]  # fmt: skip
    assert first.tokens.tolist() == [4, 5]
    assert first.parent is not None
    assert (first.references, first.parent.references) == (1, 1)
    tree.unlock(first)
    tree.check()
    assert (first.references, first.parent.references) == (0, 0)


def test_the_beginning_of_a_run_is_known_without_a_split() -> None:
    tree = RadixTree[Named]()
    _insert(tree, (1, 2, 3, 4, 5))
    assert _insert(tree, (1, 2)) == 2
    assert len(list(tree.nodes())) == 1


def test_pages_are_never_cut() -> None:
    tree = RadixTree[Named](4)
    assert _insert(tree, tuple(range(11))) == 0  # two pages and three tokens, which are left out
    assert _insert(tree, (*range(7), 99, 98, 97, 96, 95)) == 4
    assert [(node.tokens.tolist(), length) for node, length in tree.match(np.arange(7))] == [([0, 1, 2, 3], 4)]
    assert sorted(len(node.tokens) for node in tree.nodes()) == [4, 4, 8]
    assert tree.match(_ids((0, 1, 2))) == []
    tree.check()
    with pytest.raises(OptionError, match="granule=0 must be at least 1"):
        RadixTree[Named](0)


def test_pages_that_begin_alike_lie_beside_each_other() -> None:
    tree = RadixTree[Named](2)
    assert [_insert(tree, (1, last)) for last in (2, 3, 4)] == [0, 0, 0]
    tree.check()
    assert [_names(tree, (1, last)) for last in (2, 3, 4)] == [[(1,), (1, last)] for last in (2, 3, 4)]


def test_a_text_of_many_runs_needs_no_deep_stack() -> None:
    tree, text = RadixTree[Named](), tuple([1] * 1200)
    for end in range(1, 1201):
        tree.insert(_ids(text[:end]), lambda start, end: Named(((),) * (end - start)))
    tree.check()
    tree.evict(tree.nbytes)
    assert (tree.nbytes, tree.num_rows) == (0, 0)


def test_tokens_that_change_later_change_nothing() -> None:
    tree, tokens = RadixTree[Named](), _ids((1, 2, 3))
    tree.insert(tokens, lambda start, end: Named(((),) * (end - start)))
    tokens[:] = 7
    tree.check()
    assert len(_names(tree, (1, 2, 3))) == 3


def test_rows_that_can_t_be_had_leave_a_whole_tree() -> None:
    def no_memory(start: int, end: int) -> Named:
        raise MemoryError

    tree = RadixTree[Named]()
    _insert(tree, (1, 2, 3, 4))
    for text in ((5,), (1, 2, 9)):  # nothing is known, and a run has to be split
        with pytest.raises(MemoryError):
            tree.insert(_ids(text), no_memory)
        tree.check()
    assert len(_names(tree, (1, 2, 3, 4))) == tree.num_rows == 4


# -- eviction ----------------------------------------------------------------------------------------------------------


def _evicted(tree: RadixTree[Named], nbytes: int = 1) -> list[Text]:
    """The last names of what goes."""
    return [rows.names[-1] for rows in tree.evict(nbytes)]


def test_what_was_not_used_for_longest_goes_first_and_leaves_before_what_they_go_on_from() -> None:
    tree = RadixTree[Named]()
    for text in ((1, 1), (2, 1), (2, 2), (3, 1)):
        _insert(tree, text)
    _insert(tree, (1, 1))
    tree.match(_ids((2, 1)))  # a look is no use
    tree.lock(third := tree.match(_ids((3, 1)))[0][0])
    tree.unlock(third)
    assert [_evicted(tree) for _ in range(5)] == [[(2, 1)], [(2, 2)], [(2,)], [(1, 1)], [(3, 1)]]
    assert _evicted(tree) == []


def test_one_call_evicts_as_much_as_is_needed() -> None:
    tree = RadixTree[Named]()
    for text in ((1, 1), (2, 1), (2, 2), (3, 1)):
        _insert(tree, text)
    sizes = {node.rows.names[-1]: node.rows.nbytes for node in tree.nodes()}
    assert _evicted(tree, 0) == []
    assert _evicted(tree, sizes[1, 1] + 1) == [(1, 1), (2, 1)]
    assert _evicted(tree, 10**9) == [(2, 2), (2,), (3, 1)]
    assert (tree.nbytes, tree.num_rows) == (0, 0)


def test_what_is_locked_stays_with_all_that_it_goes_on_from() -> None:
    tree = RadixTree[Named]()
    for text in ((1, 1), (1, 2), (3,)):
        _insert(tree, text)
    node = tree.match(_ids((1, 2)))[-1][0]
    tree.lock(node)
    tree.lock(node)
    assert _evicted(tree, 10**9) == [(1, 1), (3,)]
    assert _names(tree, (1, 2)) == [(1,), (1, 2)]
    tree.unlock(node)
    assert _evicted(tree, 10**9) == []
    tree.unlock(node)
    assert _evicted(tree, 10**9) == [(1, 2), (1,)]


def test_what_is_locked_stays_when_what_goes_on_from_it_is_gone() -> None:
    tree = RadixTree[Named]()
    for text in ((1, 1), (1, 2)):
        _insert(tree, text)
    tree.lock(node := tree.match(_ids((1,)))[0][0])
    assert _evicted(tree, 10**9) == [(1, 1), (1, 2)]
    tree.unlock(node)
    assert _evicted(tree, 10**9) == [(1,)]


def test_no_lock_is_taken_back_twice() -> None:
    tree = RadixTree[Named]()
    for text in ((1, 1), (1, 2)):
        _insert(tree, text)
    (parent, _), (child, _) = tree.match(_ids((1, 2)))
    tree.lock(child)
    with pytest.raises(InvariantError, match="unlocked more often"):
        tree.unlock(parent)  # its reference is the child's
    tree.unlock(child)
    with pytest.raises(InvariantError, match="unlocked more often"):
        tree.unlock(child)
    tree.check()


# -- damage ------------------------------------------------------------------------------------------------------------

Nodes = dict[Text, Node[Named]]


def _damage(change: Callable[[RadixTree[Named], Nodes], None], granule: int = 1) -> None:
    """Checks a whole tree, and then a damaged one. Nodes are named by what they end with."""
    tree = RadixTree[Named](granule)
    for text in ((1, 1, 1, 1), (1, 1, 2, 2), (3, 3)):
        _insert(tree, text)
    nodes = {node.rows.names[-1]: node for node in tree.nodes()}
    tree.lock(nodes[1, 1, 1, 1])
    assert sorted(nodes) == [(1, 1), (1, 1, 1, 1), (1, 1, 2, 2), (3, 3)]
    tree.check()
    change(tree, nodes)
    tree.check()


def _other_parent(tree: RadixTree[Named], nodes: Nodes) -> None:
    nodes[1, 1, 1, 1].parent = nodes[3, 3]


def _no_parent(tree: RadixTree[Named], nodes: Nodes) -> None:
    nodes[1, 1, 1, 1].parent = None


def _two_places(tree: RadixTree[Named], nodes: Nodes) -> None:
    nodes[3, 3].children |= nodes[1, 1].children


def _wrong_key(tree: RadixTree[Named], nodes: Nodes) -> None:
    children = nodes[1, 1].children
    children[_ids((7,)).tobytes()] = children.pop(_ids((2,)).tobytes())


def _same_first_token(tree: RadixTree[Named], nodes: Nodes) -> None:
    nodes[1, 1, 2, 2].tokens = _ids((1, 2))


def _empty_run(tree: RadixTree[Named], nodes: Nodes) -> None:
    nodes[3, 3].tokens, nodes[3, 3].rows = _ids(()), Named(())


def _a_row_too_few(tree: RadixTree[Named], nodes: Nodes) -> None:
    nodes[3, 3].rows = Named(((3,),))


def _a_token_too_many(tree: RadixTree[Named], nodes: Nodes) -> None:
    nodes[3, 3].tokens = _ids((3, 3, 3))


def _lost_node(tree: RadixTree[Named], nodes: Nodes) -> None:
    del nodes[1, 1].children[_ids((2,)).tobytes()]


def _wrong_bytes(tree: RadixTree[Named], nodes: Nodes) -> None:
    tree.nbytes += 1


def _wrong_rows(tree: RadixTree[Named], nodes: Nodes) -> None:
    tree.num_rows -= 1


def _forgotten_reference(tree: RadixTree[Named], nodes: Nodes) -> None:
    nodes[1, 1].references = 0


def _negative_reference(tree: RadixTree[Named], nodes: Nodes) -> None:
    nodes[3, 3].references = -1


def _child_used_later(tree: RadixTree[Named], nodes: Nodes) -> None:
    nodes[1, 1].used = nodes[1, 1, 1, 1].used - 1


def _used_in_the_future(tree: RadixTree[Named], nodes: Nodes) -> None:
    nodes[3, 3].used += 10


def _used_at_once(tree: RadixTree[Named], nodes: Nodes) -> None:
    nodes[1, 1, 2, 2].used = nodes[3, 3].used


@pytest.mark.parametrize(("change", "told"), [
    (_other_parent, "a node's parent is another one"),
    (_no_parent, "a node's parent is another one"),
    (_two_places, "a node's parent is another one"),
    (_wrong_key, "a node isn't found by its first tokens"),
    (_same_first_token, "a node isn't found by its first tokens"),
    (_empty_run, "a run is empty"),
    (_a_row_too_few, "a run has not one row for each token"),
    (_a_token_too_many, "a run has not one row for each token"),
    (_lost_node, r"\d+ bytes are counted, and there are \d+"),
    (_wrong_bytes, r"\d+ bytes are counted, and there are \d+"),
    (_wrong_rows, "7 rows are counted, and there are 8"),
    (_forgotten_reference, "a node has fewer references than its children"),
    (_negative_reference, "a node has fewer references than none"),
    (_child_used_later, "a node was last used before its children"),
    (_used_in_the_future, "a node was used later than now"),
    (_used_at_once, "two leaves were last used at the same time"),
])  # fmt: skip
def test_each_damage_is_found(change: Callable[[RadixTree[Named], Nodes], None], told: str) -> None:
    with pytest.raises(InvariantError, match=f"^a radix tree is damaged: ({told})$"):
        _damage(change)


def test_a_cut_page_is_found() -> None:
    with pytest.raises(InvariantError, match="a run is no multiple of 2 tokens"):
        _damage(_a_token_too_many, granule=2)
