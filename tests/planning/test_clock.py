"""The loop, the scheduler and requests read the clock that is handed in, and no other."""

from __future__ import annotations

import math

import numpy as np
import pytest

from tests.conftest import make_sequence
from tokentree.planning.clock import Clock
from tokentree.planning.drawn import Drawn
from tokentree.planning.recorded import Recorded
from tokentree.planning.replica import Setup
from tokentree.planning.timing import Beside, Timing
from tokentree.sampling import SamplingParams
from tokentree.scheduler import Scheduler
from tokentree.sequence import Sequence
from tokentree.shapes import CostCurve

FLAT = CostCurve([1, 64], [1.0, 1.0])


def test_times_and_deadlines_are_the_clock_s() -> None:
    clock = Clock()
    scheduler = Scheduler(Setup(Timing(FLAT), max_batch=1).decoder(clock, np.random.default_rng(0)), max_batch=1)
    first, second, late = (
        Sequence([9], SamplingParams(max_tokens=4, timeout=timeout), make_sequence([9]).noise, 99, made=made)
        for timeout, made in ((None, 0.0), (7.5, 0.5), (3.5, 0.5))
    )
    for seq in (first, second, late):
        scheduler.add(seq)
    while not scheduler.idle:
        scheduler.step()
    assert (first.finish_reason, first.metrics.decode_seconds, first.deadline) == ("length", 4.0, math.inf)
    assert first.metrics.steps == [(1, 1, 1.0)] * 4
    assert (second.finish_reason, len(second.output_ids), second.metrics.queue_seconds) == ("length", 4, 3.5)
    assert (late.finish_reason, late.output_ids) == ("timeout", [])
    assert clock.now == 8.0


def test_what_drafting_takes_is_told_to_the_shape() -> None:
    known = Recorded(rows=[1, 2], seconds=[1, 1], by_rank=[0.5]).acceptance()
    clock = Clock()
    decoder = Setup(Timing(FLAT, Beside(0.25)), known, "chain:2").decoder(clock, np.random.default_rng(0))
    assert isinstance(decoder.drafter, Drawn)
    seq, told = make_sequence([9], max_tokens=3), list[tuple[float, float]]()
    decoder.shape.observe = lambda *step: told.append(step[3:])  # type: ignore[method-assign]
    decoder.begin(seq)
    decoder.step([seq])
    assert told == [(0.25, 1.0)]
    assert [seq.metrics.draft_seconds, seq.metrics.verify_seconds] == pytest.approx([0.25, 1.0])
