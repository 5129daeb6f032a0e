"""What a forward costs: the curve between its points, how it learns, and the file that keeps it."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.conftest import random_table
from tests.strategies import numbers
from tests.tiny_models import tiny
from tokentree.cache import cache_folder
from tokentree.costs import ROWS, CostFile, cost_curve, measure
from tokentree.engines.base import EngineInfo
from tokentree.engines.kv_engine import KVEngine
from tokentree.engines.table import TableEngine
from tokentree.engines.torch import TorchEngine
from tokentree.errors import OptionError
from tokentree.llm import LLM
from tokentree.shapes import CostCurve

PRESET = CostCurve([1, 4, 16], [0.5, 0.75, 1.5], 0.125)


def _same(one: CostCurve, other: CostCurve) -> bool:
    return (one.rows, one.points, one.per_sequence) == (other.rows, other.points, other.per_sequence)


def _watch(curve: CostCurve, truth: Callable[[int], float], times: int, most: int = 40, noise: float = 0.0) -> None:
    """Shows ``curve`` forwards of a machine whose forward over n rows takes ``truth(n)``."""
    generator = np.random.default_rng(0)
    for _ in range(times):
        rows = min(most, int(generator.geometric(0.12)))
        curve.observe(rows, 1, truth(rows) * float(np.exp(noise * generator.standard_normal())))


# -- the curve ------------------------------------------------------------------------------------------------------


def test_it_is_linear_between_points_and_goes_on_with_the_last_slope() -> None:
    curve = CostCurve([1, 4, 8], [1.0, 2.5, 4.5])
    assert [curve.seconds(n) for n in (1, 2, 4, 6, 8)] == pytest.approx([1.0, 1.5, 2.5, 3.5, 4.5])
    assert curve.seconds(108) == pytest.approx(54.5)
    assert curve.seconds(3000) == pytest.approx(1500.5)
    assert curve.upto(4)[:5] == pytest.approx([1.0, 1.0, 1.5, 2.0, 2.5])


def test_every_sequence_after_the_first_costs_the_same() -> None:
    curve = CostCurve([1, 4], [1.0, 2.0], 0.25)
    assert [curve.seconds(4, sequences) for sequences in (1, 2, 5)] == [2.0, 2.25, 3.0]
    assert curve.upto(4, 3)[4] == 2.5


@given(
    st.lists(st.integers(1, 60), min_size=2, max_size=6, unique=True),
    st.lists(st.floats(0.001, 9), min_size=6, max_size=6),
    st.lists(st.tuples(st.integers(1, 90), st.floats(0.0001, 50)), max_size=30),
)
def test_more_rows_never_take_less_time(
    rows: list[int], seconds: list[float], forwards: list[tuple[int, float]]
) -> None:
    curve = CostCurve(sorted(rows), seconds[: len(rows)])
    for n, took in forwards:
        curve.observe(n, 1, took)
    assert (np.diff(curve.upto(200)) >= -1e-9).all()
    assert curve.seconds(1) > 0


def test_it_follows_a_machine_that_got_slower() -> None:
    curve = CostCurve([1, 4, 16, 64], [1.0, 1.1, 1.6, 4.0])
    before = curve.copy()
    _watch(curve, lambda n: 3 * before.seconds(n), 400)
    assert [curve.seconds(n) for n in (1, 4, 8)] == pytest.approx([3 * before.seconds(n) for n in (1, 4, 8)], rel=0.1)


def test_one_number_of_rows_tells_of_the_others_too() -> None:
    curve = CostCurve([1, 4, 16, 64], [1.0, 1.1, 1.6, 4.0])
    for _ in range(100):
        curve.observe(4, 1, 2.2)
    assert curve.seconds(4) == pytest.approx(2.2, rel=0.02)
    assert 1.3 < curve.seconds(64) / 4.0 < 2.0  # partly: the curve may as well have another form


@settings(max_examples=12)
@given(numbers)
def test_it_takes_on_the_form_of_the_machine_it_runs_on(seed: int) -> None:
    slopes = np.random.default_rng(seed).choice([0, 0, 0.05, 0.5], len(ROWS) - 1)
    truth = CostCurve(ROWS, np.cumsum([1.0, *(slopes * np.diff(ROWS))]).tolist())
    curve = CostCurve(ROWS, [0.02 * n for n in ROWS])
    _watch(curve, truth.seconds, 1500, noise=0.03)
    assert curve.upto(24)[1:25] == pytest.approx(truth.upto(24)[1:25], rel=0.15)


def test_a_number_of_rows_that_was_cheaper_than_fewer_rows_becomes_dear_again_at_once() -> None:
    curve = CostCurve([1, 4, 8], [1.0, 1.1, 1.2])
    for _ in range(2000):
        curve.observe(4, 1, 1.1)
        curve.observe(8, 1, 1.0)
    assert [curve.seconds(n) for n in (1, 4, 8)] == pytest.approx([1, 1.05, 1.05], rel=0.1)
    for _ in range(100):
        curve.observe(4, 1, 1.1)
        curve.observe(8, 1, 2.0)
    assert [curve.seconds(n) for n in (4, 8)] == pytest.approx([1.1, 2.0], rel=0.1)


def test_a_point_that_was_measured_too_low_is_raised_from_what_is_believed_of_it() -> None:
    curve = CostCurve([1, 4, 8], [1.0, 3.0, 1.0])
    for _ in range(25):
        curve.observe(4, 1, 3.0)
        curve.observe(8, 1, 4.0)
    assert [curve.seconds(n) for n in (4, 8)] == pytest.approx([3.0, 4.0], rel=0.1)


def test_a_time_that_others_disturbed_moves_it_a_little() -> None:
    curve = PRESET.copy()
    curve.observe(4, 1, 1000 * curve.seconds(4))
    assert curve.seconds(4) < 1.1 * PRESET.seconds(4)


def test_a_clock_that_stands_still_teaches_nothing() -> None:
    curve = PRESET.copy()
    for _ in range(9):
        curve.observe(4, 1, 0.0)
    curve.first_seen(4, 0.0)
    assert _same(curve, PRESET)


def test_a_guess_takes_its_scale_from_the_first_forward() -> None:
    curve = CostCurve.guess()
    curve.first_seen(4, 0.022)
    assert [curve.seconds(n) for n in (1, 4, 16)] == pytest.approx([0.02, 0.022, 0.032])


def test_a_copy_learns_alone() -> None:
    curve = PRESET.copy()
    curve.observe(4, 1, 9.0)
    assert not _same(curve, PRESET)
    assert PRESET.points == [0.5, 0.75, 1.5]


@pytest.mark.parametrize(
    ("rows", "seconds"),
    [
        ([], []),
        ([1], [1.0]),
        ([1, 2], [1.0]),
        ([2, 1], [1.0, 2.0]),
        ([1, 1], [1.0, 2.0]),
        ([1, 2], [0.0, 1.0]),
        ([1, 2], [1.0, -1.0]),
    ],
)
def test_what_is_no_curve_raises(rows: list[int], seconds: list[float]) -> None:
    with pytest.raises(OptionError, match="two or more numbers of rows, ascending, each with a time above 0"):
        CostCurve(rows, seconds)


# -- measured, and kept in a file -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def engine() -> KVEngine:
    return TorchEngine(tiny("llama"))


@pytest.fixture
def file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("TOKENTREE_CACHE", str(tmp_path / "new" / "folder"))
    return tmp_path / "new" / "folder" / "costs.json"


@pytest.fixture
def preset(monkeypatch: pytest.MonkeyPatch) -> list[KVEngine]:
    """Measuring takes no time and finds `PRESET`; the engines that were measured."""
    measured: list[KVEngine] = []

    def fake(engine: KVEngine) -> CostCurve:
        measured.append(engine)
        return PRESET.copy()

    monkeypatch.setattr("tokentree.costs.measure", fake)
    return measured


def _refuse(_: KVEngine) -> NoReturn:
    raise AssertionError("it was measured again")


def test_a_curve_is_measured_once_and_then_read(engine: KVEngine, file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    curve = cost_curve(engine)
    assert curve.rows == list(ROWS)
    assert min(curve.points) > 0
    assert curve.per_sequence >= 0
    assert list(json.loads(file.read_text())["curves"]) == [engine.signature]
    assert {path.name for path in file.parent.iterdir()} == {"costs.json", ".costs.json.lock"}
    monkeypatch.setattr("tokentree.costs.measure", _refuse)
    assert _same(cost_curve(engine), curve)


def test_it_is_measured_again_when_asked(engine: KVEngine, file: Path, preset: list[KVEngine]) -> None:
    for again, times in ((False, 1), (False, 1), (True, 2)):
        assert _same(cost_curve(engine, again), PRESET)
        assert len(preset) == times


def test_an_engine_without_a_signature_is_measured_anew(file: Path, preset: list[KVEngine]) -> None:
    class Nameless(TableEngine):
        @property
        def info(self) -> EngineInfo:
            return dataclasses.replace(super().info, signature="")

    for times in (1, 2):
        cost_curve(Nameless(random_table(4)))
        assert len(preset) == times
    assert not file.exists()


def test_a_curve_belongs_to_a_model_a_dtype_and_so_many_threads(file: Path, preset: list[KVEngine]) -> None:
    engines = [
        TorchEngine(tiny("llama")),
        TorchEngine(tiny("llama", torch.bfloat16)),
        TorchEngine(tiny("llama", num_hidden_layers=1)),
        TorchEngine(tiny("qwen2")),
        TorchEngine(tiny("llama"), attention="sdpa"),
    ]
    for one in engines:
        cost_curve(one)
    assert len(preset) == 5
    cost_curve(TorchEngine(tiny("llama", seed=1)))  # other weights cost the same
    assert len(preset) == 5
    threads = torch.get_num_threads()
    torch.set_num_threads(threads + 1)
    try:
        cost_curve(engines[0])
    finally:
        torch.set_num_threads(threads)
    assert len(preset) == 6
    assert len(CostFile.model_validate_json(file.read_text()).curves) == 6


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"{",
        b"[]",
        b"\xff\xfe",
        b'{"curves": 3}',
        b'{"curves": {"SIGNATURE": {"rows": [1, 2]}}}',
        b'{"curves": {"SIGNATURE": {"rows": [1], "seconds": [1.0], "per_sequence": 0.0}}}',
        b'{"curves": {"SIGNATURE": {"rows": [1, 2], "seconds": [1.0, -1.0], "per_sequence": 0.0}}}',
        b'{"curves": {"SIGNATURE": {"rows": [1, 2], "seconds": [1.0, NaN], "per_sequence": 0.0}}}',
        b'{"curves": {"SIGNATURE": {"rows": [1, 2], "seconds": [1.0, 1e400], "per_sequence": 0.0}}}',
        b'{"curves": {"SIGNATURE": {"rows": [1, 2], "seconds": [1.0, 1e300], "per_sequence": 0.0}}}',
        b'{"curves": {"SIGNATURE": {"rows": [1, 2], "seconds": [1.0, 2.0], "per_sequence": NaN}}}',
        b'{"curves": {"SIGNATURE": {"rows": [1, 2], "seconds": [1.0, 2.0], "per_sequence": -1.0}}}',
        b'{"curves": {"SIGNATURE": {"rows": [0, 2], "seconds": [1.0, 2.0], "per_sequence": 0.0}}}',
        b'{"curves": {"SIGNATURE": {"rows": [-5, 2], "seconds": [1.0, 2.0], "per_sequence": 0.0}}}',
        b'{"curves": {"SIGNATURE": {"rows": [1, 9000000000], "seconds": [1.0, 2.0], "per_sequence": 0.0}}}',
    ],
)
def test_a_file_that_holds_no_curves_is_replaced(
    engine: KVEngine, file: Path, preset: list[KVEngine], content: bytes
) -> None:
    file.parent.mkdir(parents=True)
    file.write_bytes(content.replace(b"SIGNATURE", engine.signature.encode()))
    with pytest.warns(UserWarning, match="is damaged: it is made again"):
        assert _same(cost_curve(engine), PRESET)
    assert _same(cost_curve(engine), PRESET)
    assert len(preset) == 1


def test_other_curves_in_the_file_stay(engine: KVEngine, file: Path, preset: list[KVEngine]) -> None:
    file.parent.mkdir(parents=True)
    file.write_text('{"curves": {"other": {"rows": [1, 2], "seconds": [1.0, 2.0], "per_sequence": 0.5}}}')
    cost_curve(engine)
    assert set(json.loads(file.read_text())["curves"]) == {"other", engine.signature}


def test_a_place_that_cannot_be_written_does_no_harm(
    engine: KVEngine, tmp_path: Path, preset: list[KVEngine], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "folder" / "costs.json").mkdir(parents=True)
    for name in ("file", "folder"):
        monkeypatch.setenv("TOKENTREE_CACHE", str(tmp_path / name))
        assert _same(cost_curve(engine), PRESET)
    assert len(preset) == 2
    assert (tmp_path / "file").is_file()


def test_the_cache_lies_where_users_expect_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TOKENTREE_CACHE", "/own")
    monkeypatch.setenv("XDG_CACHE_HOME", "/cache")
    monkeypatch.setenv("HOME", "/home/me")
    found = []
    for name in ("TOKENTREE_CACHE", "XDG_CACHE_HOME", "HOME"):
        found.append(cache_folder())
        monkeypatch.delenv(name)
    assert found == [Path("/own"), Path("/cache/tokentree"), Path("/home/me/.cache/tokentree")]


def test_measuring_leaves_no_kv_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = TorchEngine(tiny("llama"))
    measure(engine)
    assert not engine._kv
    verify, calls = engine.verify, list[int]()

    def breaks(*args: object) -> object:
        calls.append(1)
        if len(calls) == 5:
            raise MemoryError
        return verify(*args)  # type: ignore[arg-type]

    monkeypatch.setattr(engine, "verify", breaks)
    with pytest.raises(MemoryError):
        measure(engine)
    assert not engine._kv


def test_a_short_context_is_measured_as_far_as_it_goes() -> None:
    assert measure(TorchEngine(tiny("gpt2", n_positions=24))).rows == [1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 12]


def test_a_model_is_measured_when_a_shape_needs_it_and_once(file: Path, preset: list[KVEngine]) -> None:
    llm = LLM(tiny("llama"), "none")
    llm.using("ngram", "chain:3")
    assert not preset
    forms = [llm.using("ngram").decoder.shape, llm.using("ngram", "cost:nodes=8").decoder.shape]
    assert preset == [llm.engine]
    assert forms[0] is not forms[1]
