"""Calibration: the trees that follow from a curve and from rates."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from tests.tiny_models import some_tokens, tiny, tiny_pair
from tokentree import busy
from tokentree.calibrate import BATCHES, SIZES, Calibration, Pick, Rate, _outside, calibrate, certainty, tables
from tokentree.costs import PROMPTS as PROMPT_ROWS
from tokentree.costs import prompt_costs
from tokentree.engines.output import TargetOutput
from tokentree.engines.table import TableEngine
from tokentree.llm import LLM
from tokentree.planning.clock import Clock
from tokentree.planning.recorded import Recorded
from tokentree.plots.cost import plot_calibration
from tokentree.sampling import SamplingParams
from tokentree.scheduler import Event, Scheduler
from tokentree.shapes import CostCurve, Static, shape

PROMPTS = [some_tokens(9, seed) for seed in range(3)]


def _calibrated(monkeypatch: pytest.MonkeyPatch, llm: LLM, curve: CostCurve) -> Calibration:
    monkeypatch.setattr("tokentree.calibrate.cost_curve", lambda *_, **__: curve)
    steps: list[None] = []
    found = calibrate(llm, PROMPTS, 30, lambda: steps.append(None))
    assert len(steps) == len(PROMPTS) + 1
    return found


@pytest.fixture(scope="module")
def llm() -> LLM:
    target, draft = tiny_pair()
    return LLM(target, draft_model=draft)


def test_where_rows_cost_little_the_best_trees_are_big(monkeypatch: pytest.MonkeyPatch, llm: LLM) -> None:
    found = _calibrated(monkeypatch, llm, CostCurve([1, 64], [10.0, 10.1]))
    assert found.by_rank[0] > 0.3
    assert [rate.drafters for rate in found.rates] == ["draft_model"] * len(found.rates)
    assert [pick.batch for pick in found.picks] == list(BATCHES)
    for pick in found.picks:
        form = shape(pick.shape)
        assert isinstance(form, Static)
        assert form.max_nodes == pick.nodes > 8
        assert pick.speed_up == max(pick.by_size) > 1.2
        assert pick.tokens >= pick.speed_up  # no tree is cheaper than its root
    assert found.mean_accepted_length > 1.2


def test_where_a_row_costs_a_forward_the_best_tree_is_none(monkeypatch: pytest.MonkeyPatch, llm: LLM) -> None:
    found = _calibrated(monkeypatch, llm, CostCurve([1, 64], [1.0, 64.0]))
    assert [(pick.nodes, pick.shape, pick.speed_up) for pick in found.picks] == [(1, "none", 1)] * len(BATCHES)
    assert all(len(pick.by_size) == len(SIZES) for pick in found.picks)


def test_a_bigger_batch_gets_smaller_trees(monkeypatch: pytest.MonkeyPatch, llm: LLM) -> None:
    found = _calibrated(monkeypatch, llm, CostCurve([1, 16, 64], [10.0, 10.1, 200.0]))
    sizes = [pick.nodes for pick in found.picks]
    assert sizes == sorted(sizes, reverse=True)
    assert sizes[0] > sizes[-1]


def test_no_drafter_is_nothing_to_choose_from(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    found = _calibrated(monkeypatch, LLM(tiny("llama"), "none"), CostCurve([1, 64], [1.0, 1.0]))
    assert (found.rates, found.by_rank, found.mean_accepted_length) == ([], [0, 0, 0, 0], 1)
    assert {pick.shape for pick in found.picks} == {"none"}
    assert [table.row_count for table in tables(found)] == [2, 0, len(BATCHES)]
    plot_calibration(found, tmp_path / "none.svg")


@pytest.mark.parametrize("suffix", ["png", "svg", "pdf"])
def test_a_picture_has_three_parts(tmp_path: Path, suffix: str) -> None:
    picks = [Pick(batch=n, nodes=3, shape="2", tokens=1.5, speed_up=1.4, by_size=[1.0] * len(SIZES)) for n in BATCHES]
    rates = [Rate(drafters=f"d{n}", depth="1", rank="3-", hits=n, trials=20) for n in range(20)]
    found = Calibration(
        engine="a model", rows=[1, 4, 64], seconds=[0.01, 0.011, 0.05], per_sequence=0.0, drafting_seconds=0.001,
        rates=rates, by_rank=[0.5, 0.1, 0.0, 0.0], picks=picks, measured_speed_up=1.5, mean_accepted_length=2.0,
    )  # fmt: skip
    plot_calibration(found, tmp_path / f"picture.{suffix}")
    content = (tmp_path / f"picture.{suffix}").read_bytes()
    assert content.startswith({"png": b"\x89PNG", "svg": b"<?xml", "pdf": b"%PDF"}[suffix])
    if suffix == "svg":
        assert content.count(b"axes_") >= 3


def _seconds(tmp_path: Path, **waiting: float) -> None:
    for thread, seconds in waiting.items():
        (tmp_path / thread).mkdir(exist_ok=True)
        (tmp_path / thread / "schedstat").write_text(f"123456789 {round(seconds * 1e9)} 17\n")


def test_what_threads_waited_for_a_cpu_is_what_the_system_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(busy, "TASKS", tmp_path)
    assert busy.waited() is None  # another system
    _seconds(tmp_path, a=1.5, b=0.25)
    (tmp_path / "c").mkdir()
    (tmp_path / "c" / "schedstat").write_text("")  # a thread that ended
    assert busy.waited() == 1.75


def test_a_busy_machine_is_told(monkeypatch: pytest.MonkeyPatch, llm: LLM) -> None:
    curve, clock = CostCurve([1, 64], [0.01, 0.1]), iter([10.0, 10.0, 20.0, 80.0])
    monkeypatch.setattr("tokentree.calibrate.waited", lambda: next(clock))
    idle, full = _calibrated(monkeypatch, llm, curve), _calibrated(monkeypatch, llm, curve)
    assert (idle.waiting, idle.busy, full.busy) == (0.0, False, True)
    assert full.waiting is not None
    assert full.waiting > 1
    assert len(idle.one_row) == 3
    assert idle.one_row == sorted(idle.one_row)
    assert "busy" not in certainty(idle)
    assert certainty(full).startswith(f"the machine is busy (threads waited for a CPU {full.waiting:.0%} of the time)")
    assert "where T(1) is 10.0" in certainty(full)


def test_without_the_system_s_word_steps_tell_that_a_machine_is_busy(monkeypatch: pytest.MonkeyPatch, llm: LLM) -> None:
    monkeypatch.setattr("tokentree.calibrate.waited", lambda: None)
    found = _calibrated(monkeypatch, llm, CostCurve([1, 64], [0.01, 0.1]))
    assert found.waiting is None
    for steps, is_busy in (([0.0131, 0.0138, 0.0142], False), ([0.013, 0.02, 0.03], True), ([], False)):
        one = found.model_copy(update={"one_row": steps})
        assert one.busy is is_busy
        assert certainty(one).startswith("the machine is busy: 8 of 10 plain steps took 13.0 to 30.0 ms") is is_busy
    assert Calibration.model_validate_json(found.model_dump_json()) == found


def test_what_plans_need_is_measured_too(monkeypatch: pytest.MonkeyPatch, llm: LLM) -> None:
    found = _calibrated(monkeypatch, llm, CostCurve([1, 64], [0.01, 0.1]))
    context = llm.engine.context
    assert found.prompt_rows == [count for count in PROMPT_ROWS if count < context]
    assert len(found.prompt_seconds) == len(found.prompt_rows) > 0
    assert min(found.prompt_seconds) > 0
    assert found.steps > 0
    assert found.step_seconds > 0
    assert min(found.step_per_sequence, found.drafting_per_sequence) >= 0
    assert found.cells
    for one in found.rates:  # cells are rates, by claims
        alike = [
            cell
            for cell in found.cells
            if (cell.drafters, cell.depth, cell.rank) == (one.drafters, one.depth, one.rank)
        ]
        assert sum(cell.trials for cell in alike) == pytest.approx(one.trials)
        assert sum(cell.hits for cell in alike) == pytest.approx(one.hits)
    recorded = Recorded.read(found.model_dump_json(), "it")
    assert recorded.acceptance() is not None
    assert recorded.timing().forward(64, 1) == 0.1


def test_the_time_outside_of_the_loop_is_that_of_steps_that_decode_all(
    monkeypatch: pytest.MonkeyPatch, llm: LLM
) -> None:
    plain, clock = llm.plain(), Clock()
    monkeypatch.setattr("tokentree.calibrate.time", SimpleNamespace(perf_counter=clock))
    step = Scheduler.step

    def slower(self: Scheduler) -> list[Event]:
        events = step(self)
        inside = max((seq.metrics.steps[-1][2] for seq in self._active if seq.metrics.steps), default=0.0)
        clock.advance(inside + 0.25 * sum(bool(event.tokens) for event in events))
        return events

    monkeypatch.setattr(Scheduler, "step", slower)
    params = SamplingParams(max_tokens=9, ignore_eos=True)
    assert _outside(plain, PROMPTS[:1], params) == pytest.approx(0.25)
    assert _outside(plain, PROMPTS[:1] * 3, params) == pytest.approx(0.75)
    assert _outside(plain, [], params) == 0


def test_prompts_are_new_ones_each_time_and_none_is_left() -> None:
    engine, read = TableEngine(torch.zeros(8, 8), context=200), []
    reads = engine.verify

    def verify(*given: Any, **reading: Any) -> TargetOutput:
        read.append(reading["reading"][0][0].tokens)
        return reads(*given, **reading)

    engine.verify = verify  # type: ignore[method-assign]
    rows, seconds = prompt_costs(engine)
    assert rows == [64, 128]
    assert all(0 < taken < 10 for taken in seconds)
    assert sorted(map(len, read)) == [65] * 3 + [129] * 3
    assert len({tuple(ids[:64]) for ids in read}) == 6
    assert engine._committed == {}
