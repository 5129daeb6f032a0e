"""What load tests leave for plans, and how both are compared."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from benchmarks.planned import compared
from benchmarks.serving import Load, keep_sample

from tokentree.planning.load import read_trace


def test_lengths_of_a_load_test_are_a_trace(tmp_path: Path) -> None:
    ended = {2: ("one", 20, 16), 4: ("two", 0, 4), 0: ("one", 0, 4), 3: ("three", 31, 0), 1: ("four", 9, 2)}
    keep_sample({1: Load(lengths=ended), 4: Load(lengths={0: ("one", 0, 3)})}, tmp_path / "sample")
    alone, four = (read_trace(tmp_path / "sample" / f"{clients}.jsonl") for clients in (1, 4))
    lines = [(one.prompt, one.prompt_tokens, one.output_tokens) for one in alone]
    assert lines == [("0", 20, 4), ("2", 9, 2), ("0", 20, 16)]  # as they were asked; nobody knows how long "two" is
    assert [(one.prompt, one.prompt_tokens, one.output_tokens) for one in four] == [("0", 20, 3)]


def test_each_figure_of_both_is_compared() -> None:
    figures: dict[str, Any] = {"tokens_a_second": 100.0, "gap_p95": 0.02, "gap_p50": None, "first_token_p50": 0.0}
    load = {"servers": {"plain": {"clients": {"4": figures}}, "transformers": {"clients": {"4": figures}}}}
    foretold = dict.fromkeys(("tokens_a_second", "gap_p95", "gap_p50", "first_token_p50", "first_token_p95"), 0.025)
    ways = ("plain", "speculation")
    plans = [{"loads": [{"load": f"{n} clients", "method": way} | foretold for way in ways]} for n in (4, 8)]
    found = compared(json.loads(json.dumps(load)), plans)
    assert [(one["server"], one["clients"], one["figure"], one["off"]) for one in found] == [
        ("plain", 4, "tokens_a_second", -0.9998), ("plain", 4, "gap_p95", 0.25),
    ]  # fmt: skip
