"""The cost shape on simulated machines: never noticeably slower than plain, whatever the drafter; faster with a good
one."""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Sequence as SequenceOf
from types import SimpleNamespace

import pytest
import torch

from tests.conftest import all_pairs, by_night, decode, each_two, make_sequence, random_table
from tokentree.draft import Draft
from tokentree.drafters.base import Drafter
from tokentree.drafters.draft_model import DraftModel
from tokentree.drafters.lookup.ngram import NGram
from tokentree.drafters.merged import Merged
from tokentree.engines.output import TargetOutput
from tokentree.engines.table import TableEngine
from tokentree.planning.clock import Clock
from tokentree.sequence import Sequence
from tokentree.shapes import Cost, CostCurve, Shape
from tokentree.tree import TokenTree

VOCAB, TOKENS = 8, 300
TABLE = random_table(VOCAB, 2, seed=5, sharpness=3.0)
MACHINES = {  # seconds of a forward, relative to one row
    "free": CostCurve([1, 64], [1.0, 1.0]),
    "flat": CostCurve([1, 4, 16, 64], [1.0, 1.02, 1.31, 2.83], 0.05),
    "rising": CostCurve([1, 4, 8, 16, 32, 64], [1.0, 1.14, 1.34, 1.76, 2.78, 4.68], 0.05),
    "steep": CostCurve([1, 2, 4, 8, 16, 64], [1.0, 1.8, 2.9, 4.9, 5.9, 18.0], 0.05),
    "linear": CostCurve([1, 64], [1.0, 64.0]),
}


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr("tokentree.drafters.draft_model.time", SimpleNamespace(perf_counter=clock))
    return clock


class Timed(TableEngine):
    """A table whose forwards take the time that a curve says."""

    def __init__(self, table: torch.Tensor, curve: CostCurve, clock: Clock) -> None:
        super().__init__(table)
        self._curve, self._clock = curve, clock

    def verify(
        self, seqs: SequenceOf[Sequence], trees: SequenceOf[TokenTree], firsts: SequenceOf[int] | None = None,
        reading: SequenceOf[tuple[Sequence, int]] = (),
    ) -> TargetOutput:  # fmt: skip
        out = super().verify(seqs, trees, firsts, reading)
        seconds = self._curve.seconds(len(out.all_logits), len(seqs))
        self._clock.advance(seconds)
        return TargetOutput(out.all_logits, out.starts, out.firsts, seconds)


class Oracle(Drafter):
    """Knows the target, and claims 0.9 of a chain of what it finds most probable, or least, and a little of the next
    ones to its first node. From token ``turns_at`` on it does the reverse."""

    name = "oracle"

    def __init__(self, right: bool, turns_at: int = 1 << 20) -> None:
        self._engine, self._right, self._turns_at = TableEngine(TABLE), right, turns_at

    def propose(self, seqs: list[Sequence], shape: Shape, sampled: bool) -> list[Draft]:
        return [self._grow(seq, shape) for seq in seqs]

    def _grow(self, seq: Sequence, shape: Shape) -> Draft:
        draft, node, siblings = Draft(seq.tokens[-1]), 0, list[int]()
        right = self._right == (len(seq.tokens) < self._turns_at)
        while len(draft) + 3 < shape.max_nodes and draft.depths[node] < min(shape.max_depth, seq.room - 1):
            logits = self._engine.logits_after([*seq.tokens, *draft.path_tokens(node)])
            order = logits.argsort(descending=right).tolist()
            siblings = siblings or order[1:4]
            node = draft.add(node, order[0], math.log(0.9), 0)
        for rank, token in enumerate(siblings, start=1):
            draft.add(0, token, math.log(0.03), rank)
        return draft


def _drafter(kind: str, level: float, clock: Clock) -> Drafter:
    other = random_table(VOCAB, 2, seed=6, sharpness=4.0)  # sure of itself, and knows nothing
    tables = {"good": TABLE, "fair": TABLE + 0.4 * other, "bad": other}
    if kind in tables:
        return DraftModel(Timed(tables[kind], CostCurve([1, 64], [level, 1.2 * level]), clock), VOCAB)
    if kind == "merged":
        return Merged([Oracle(False), NGram(max_n=3), _drafter("fair", level, clock)])
    if kind == "ngram":
        return NGram(max_n=3, min_n=1)
    return Oracle(kind != "wrong", TOKENS // 2 if kind == "turncoat" else 1 << 20)


def _requests(batch: int) -> list[Sequence]:
    return [make_sequence([0, i], sample=i, max_tokens=TOKENS // batch, temperature=0.7, seed=1) for i in range(batch)]


@functools.cache
def _plain(batch: int) -> list[list[int]]:
    return decode(TableEngine(TABLE), _requests(batch))


def _speed(clock: Clock, machine: str, drafter: Drafter, form: Cost, batch: int = 1, accept: str = "match") -> float:
    """Tokens per second of ``form`` over plain's, on new requests."""
    curve, started = MACHINES[machine], clock.now
    texts = decode(Timed(TABLE, curve, clock), _requests(batch), drafter, form, accept, clock=clock)
    if accept == "match":
        assert texts == _plain(batch)
    return TOKENS // batch * curve.seconds(batch, batch) / (clock.now - started)


def _speeds(clock: Clock, machine: str, kind: str, level: float = 0.0, batch: int = 1) -> tuple[float, float]:
    """The same, for a shape that knows nothing yet and for one that has learnt from that."""
    drafter, form = _drafter(kind, level, clock), Cost(curve=MACHINES[machine])
    first, second = (_speed(clock, machine, drafter, form, batch) for _ in range(2))
    return first, second


@pytest.mark.parametrize(("machine", "kind"), all_pairs(MACHINES, ["right", "wrong", "turncoat", "ngram"]))
def test_no_lookup_makes_it_slower_than_plain(clock: Clock, machine: str, kind: str) -> None:
    first, second = _speeds(clock, machine, kind)
    assert first >= 0.95
    assert second >= 0.97


LEVELS, GOOD_OR_BAD, TWO = [0.1, 0.5, 1.5], ["good", "bad"], ["flat", "steep"]


@pytest.mark.parametrize(
    ("level", "kind", "machine"),
    by_night(itertools.product(LEVELS, GOOD_OR_BAD, TWO), but=each_two(LEVELS, GOOD_OR_BAD, TWO)),
)
def test_no_draft_model_makes_it_slower_than_plain(clock: Clock, machine: str, level: float, kind: str) -> None:
    first, second = _speeds(clock, machine, kind, level)
    assert first >= 0.95
    assert second >= 0.97


@pytest.mark.parametrize("machine", ["flat", "steep"])
@pytest.mark.parametrize("level", [0.1, 0.5])
def test_to_find_out_which_of_several_drafters_lies_costs_little_and_once(
    clock: Clock, machine: str, level: float
) -> None:
    first, second = _speeds(clock, machine, "merged", level)
    assert first >= 0.9
    assert second >= 0.97


@pytest.mark.parametrize("kind", ["wrong", "bad", "good"])
def test_no_batch_is_slower_than_plain(clock: Clock, kind: str) -> None:
    first, second = _speeds(clock, "rising", kind, 0.2, batch=4)
    assert first >= 0.95
    assert second >= 0.97


@pytest.mark.parametrize(("kind", "least"), [("good", 2.0), ("bad", 1.0)])
def test_drawn_children_do_not_make_it_slower_than_plain(clock: Clock, kind: str, least: float) -> None:
    form = Cost(curve=MACHINES["rising"])
    assert _speed(clock, "rising", _drafter(kind, 0.2, clock), form, accept="rejection") >= least


@pytest.mark.parametrize(
    ("machine", "kind", "level", "batch", "least"),
    [
        ("free", "right", 0, 1, 4.0),
        ("flat", "right", 0, 1, 2.5),
        ("rising", "good", 0.1, 1, 1.8),
        ("flat", "fair", 0.1, 1, 1.5),
        ("flat", "merged", 0.5, 1, 1.8),
        ("rising", "good", 0.2, 4, 1.2),
    ],
)
def test_a_good_drafter_makes_it_faster(
    clock: Clock, machine: str, kind: str, level: float, batch: int, least: float
) -> None:
    first, second = _speeds(clock, machine, kind, level, batch)
    assert first >= least
    assert second >= least
