"""What load tests leave for plans, and how both are compared."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from benchmarks.planned import compared
from benchmarks.serving import keep_sample

from tokentree.planning.load import read_trace


def test_lengths_of_a_load_test_are_a_trace(tmp_path: Path) -> None:
    asked = [("one", 20, 16), ("two", 0, 4), ("one", 0, 4), ("three", 31, 0), ("four", 9, 2)]
    keep_sample(asked, tmp_path / "sample.jsonl")
    lines = [(one.prompt, one.prompt_tokens, one.output_tokens) for one in read_trace(tmp_path / "sample.jsonl")]
    assert lines == [("0", 20, 16), ("0", 20, 4), ("1", 9, 2)]  # nobody knows how long "two" is


def test_each_figure_of_both_is_compared() -> None:
    figures: dict[str, Any] = {"tokens_a_second": 100.0, "gap_p95": 0.02, "gap_p50": None, "first_token_p50": 0.0}
    load = {"servers": {"plain": {"clients": {"4": figures}}, "transformers": {"clients": {"4": figures}}}}
    foretold = dict.fromkeys(("tokens_a_second", "gap_p95", "gap_p50", "first_token_p50", "first_token_p95"), 0.025)
    plans = [{"load": f"{n} clients", "method": way} | foretold for n in (4, 8) for way in ("plain", "speculation")]
    found = compared(json.loads(json.dumps(load)), {"loads": plans})
    assert [(one["server"], one["clients"], one["figure"], one["off"]) for one in found] == [
        ("plain", 4, "tokens_a_second", -0.9998), ("plain", 4, "gap_p95", 0.25),
    ]  # fmt: skip
