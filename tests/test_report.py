"""The page of a run, and its pictures, of runs whose figures are known."""

from __future__ import annotations

import io
import sys
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from tokentree import cli
from tokentree.bench.figures import acceptance_by_depth, best_chain, gain, group_of, short_names
from tokentree.bench.live import watched
from tokentree.bench.markdown import block, code, plain
from tokentree.bench.page import insert, main_table, page
from tokentree.bench.report import summarise, table
from tokentree.bench.results import Run, Sample, new_run, peak_memory
from tokentree.errors import OptionError


def sample(method: str, place: int, tokens: int, seconds: float, category: str = "qa", **metrics: Any) -> Sample:
    counted = {"new_tokens": tokens, "target_forwards": tokens // 2, "draft_seconds": 0.1 * seconds}
    counted |= {"verify_seconds": 0.8 * seconds, "accept_seconds": 0.1 * seconds, "drafted_tokens": tokens}
    return Sample(
        prompt=str(place), category=category, turn=0, method=method, order=0, token_ids=list(range(tokens)),
        decode_seconds=seconds, decoded_tokens=tokens, same_as_plain=True, metrics=counted | metrics,
    )  # fmt: skip


def some_run() -> Run:
    run = new_run({"model": "some/model.gguf", "dtype": "torch.bfloat16", "sampling": {"max_tokens": 10}})
    for place in range(6):
        kind = "qa" if place < 3 else "humaneval"
        run.samples += [
            sample("plain", place, 100, 10.0, kind),
            sample("merged:chain:3", place, 100, 8.0, kind),
            sample(
                "merged:cost", place, 100, 5.0 if place < 3 else 2.5, kind, accepted_by_depth=[30, 10],
                offered_by_depth=[50, 40], accepted_tokens=40, refused_steps=10,
            ),
        ]  # fmt: skip
    return run


def test_a_speed_up_is_that_of_pooled_rates_within_its_interval() -> None:
    samples = some_run().samples
    found = gain(samples, "merged:cost", "plain")
    assert found is not None
    assert found.value == pytest.approx(60 / 22.5)
    assert 2 <= found.low < found.value < found.high <= 4
    assert gain(samples, "merged:cost", "plain") == found
    same = gain([s for s in samples if s.category == "qa"], "merged:cost", "plain")
    assert same is not None
    assert (same.low, same.value, same.high) == pytest.approx((2, 2, 2))
    assert gain(samples, "merged:cost", "nothing") is None


def test_turns_that_one_of_them_failed_on_are_left_out() -> None:
    run = some_run()
    run.samples[2] = Sample(prompt="0", category="qa", turn=0, method="merged:cost", order=0, error="too long")
    found = gain(run.samples, "merged:cost", "plain")
    assert found is not None
    assert found.value == pytest.approx(50 / 17.5)


def test_categories_belong_to_tasks() -> None:
    assert [group_of(name) for name in ("rag", "humaneval_dev", "math_reasoning", "roleplay", "mine")] == [
        "Q&A", "code", "maths", "creative writing", "mine",
    ]  # fmt: skip


def test_the_page_says_what_was_measured() -> None:
    run = some_run()
    assert best_chain(run) == "merged:chain:3"
    text = page(run, [Path("speed.png")])
    lines = [line.split(" | ") for line in text.splitlines() if line.startswith("| **merged:cost**")]
    assert lines[0][1:5] == ["100", "80%", "2.00", "26.7"]
    assert lines[0][5].startswith("2.67 (")
    assert lines[0][6].startswith("2.13 (")
    assert lines[0][8] == "6/6 |"
    assert "![speed](speed.png)" in text
    assert "| method | Q&A | code |" in text
    assert "| merged:cost | 2.00 (2.00 to 2.00) | 4.00 (4.00 to 4.00) |" in text
    assert "| merged:cost | 7.50 (10%) | 60.00 (80%) | 7.50 (10%) |" in text
    assert "The best chain is merged:chain:3." in text


def test_acceptance_by_depth_is_pooled_over_samples() -> None:
    assert acceptance_by_depth(some_run().samples, "merged:cost") == [(1, 0.6, 300), (2, 0.25, 240)]
    assert acceptance_by_depth(some_run().samples, "plain") == []


def test_the_command_writes_page_and_pictures(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def run(*words: object) -> int | str | None:
        monkeypatch.setattr(sys, "argv", ["tokentree", "report", *map(str, words)])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        return ended.value.code

    some_run().save(tmp_path / "run")
    assert run(tmp_path / "run", "--out", tmp_path / "page") in (0, None)
    assert {file.name for file in (tmp_path / "page").iterdir()} == {"report.md", "speed.png", "acceptance.png"}
    assert "![acceptance](acceptance.png)" in (tmp_path / "page" / "report.md").read_text()
    capsys.readouterr()
    assert run(tmp_path / "nowhere") == 2
    assert run(tmp_path / "run", "--format", "gif") == 2
    assert "png or svg" in capsys.readouterr().err


def test_memory_is_told_where_the_system_knows_it() -> None:
    assert peak_memory() > 50


def test_the_main_table_goes_into_a_page_of_ones_own(tmp_path: Path) -> None:
    file = tmp_path / "README.md"
    file.write_text("before\n<!-- run -->old<!-- /run -->\nafter\n")
    for _ in range(2):  # it takes its own place again
        insert(main_table(some_run()), "run", file)
    text = file.read_text()
    assert text.startswith("before\n<!-- run -->\n\nmodel, bfloat16, ")
    assert text.endswith("\n\n<!-- /run -->\nafter\n")
    assert "| **merged:cost** | 26.7 | 2.67 | 2.13 |" in text
    assert "old" not in text
    with pytest.raises(OptionError, match="has no <!-- other -->"):
        insert("", "other", file)
    with pytest.raises(OptionError, match="can't be read"):
        insert("", "run", tmp_path / "none.md")


def test_files_in_a_table_have_no_folders() -> None:
    run = some_run()
    for one in run.samples:
        one.method = one.method.replace("merged:cost", "llama.cpp:/some/where/model.gguf:lookup:3")
    assert "| **llama.cpp:model.gguf:lookup:3** |" in main_table(run)


def test_a_run_is_shown_while_it_goes_on() -> None:
    for terminal in (True, False):
        run, shown = some_run(), io.StringIO()
        console = Console(file=shown, force_terminal=terminal, width=140)
        waiting, run.samples = run.samples[9:], run.samples[:9]
        with watched(console, run, 18) as progress:
            for one in waiting:
                run.samples.append(one)
                progress(one)
            progress(Sample(prompt="7", category="qa", turn=0, method="merged:cost", order=0, error="too long"))
        assert "merged:cost failed on prompt 7: too long" in shown.getvalue()
        assert ("all categories" in shown.getvalue()) == terminal
        assert ("merged:chain:3" in shown.getvalue()) == terminal
