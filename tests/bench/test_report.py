"""The page of a run, and its pictures, of runs whose figures are known."""

from __future__ import annotations

import errno
import io
import re
import sys
from pathlib import Path
from typing import Any

import pytest
from markdown_it import MarkdownIt
from rich.console import Console

from tokentree.bench.figures import acceptance_by_depth, best_chain, gain, group_of, short_names
from tokentree.bench.live import watched
from tokentree.bench.markdown import block, code, plain
from tokentree.bench.page import insert, main_table, page
from tokentree.bench.report import summarise, table
from tokentree.bench.results import Run, Sample, new_run, peak_memory
from tokentree.cli import main as cli
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
    assert found.low is not None
    assert found.high is not None
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
    lines = [line.split(" | ") for line in text.splitlines() if line.startswith("| **`merged:cost`**")]
    assert lines[0][1:5] == ["100", "80%", "2.00", "26.7"]
    assert lines[0][5].startswith("2.67 (")
    assert lines[0][6].startswith("2.13 (")
    assert lines[0][7:] == ["2.67", "6/6 (100%) |"]
    assert "![speed](speed.png)" in text
    assert "| method | Q&A (3) | code (3) |" in text
    assert "| `merged:cost` | 2.00 (2.00 to 2.00) | 4.00 (4.00 to 4.00) |" in text
    assert "| `merged:cost` | 60% | 25% |" in text
    assert "| `merged:cost` | 7.50 (10%) | 60.00 (80%) | 7.50 (10%) |" in text
    assert "The best chain is `merged:chain:3`." in text


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


# -- what was not measured is not told -------------------------------------------------------------------------------


def of_prompts(*names: str) -> Run:
    run = some_run()
    run.samples = [one for one in run.samples if one.prompt in names]
    return run


def test_one_prompt_has_no_interval_however_many_turns_it_has() -> None:
    run = of_prompts("0")
    for turn in (1, 2):
        run.samples += [one.model_copy(update={"turn": turn, "decode_seconds": 9.0 + turn}) for one in run.samples[:3]]
    assert [one.turn for one in run.samples] == [0, 0, 0, 1, 1, 1, 2, 2, 2]
    found = gain(run.samples, "merged:cost", "plain")
    assert found is not None
    assert (found.prompts, found.low, found.high) == (1, None, None)
    text = page(run)
    assert re.search(r"\d to \d", text) is None
    assert "1 prompt, no interval." in text
    assert "3 turns of 1 prompt" in text


def test_turns_of_a_prompt_are_drawn_together() -> None:
    run = some_run()
    alone = gain(run.samples, "merged:cost", "plain")
    run.samples += [one.model_copy(update={"turn": 1}) for one in run.samples]
    assert gain(run.samples, "merged:cost", "plain") == alone  # the same turns again are no further evidence


def test_a_method_has_no_interval_against_itself() -> None:
    assert str(gain(some_run().samples, "plain", "plain")) == "1.00"


def test_what_was_never_measured_has_no_figure() -> None:
    run = some_run()
    for one in run.samples:
        if one.method == "plain":
            one.error, one.decoded_tokens, one.decode_seconds, one.token_ids, one.metrics = "bad", 0, 0.0, [], {}
    assert gain(run.samples, "merged:cost", "plain") is None
    assert {(row.speed_up, row.end_to_end, row.same_ids) for row in summarise(run)} == {(None, None, None)}
    row = next(line for line in page(run).splitlines() if line.startswith("| `plain`"))
    assert [cell.strip() for cell in row.strip("|").split("|")] == ["`plain`", *[""] * 7, "6 failed"]
    run.samples[0].decode_seconds = 0.0
    assert gain(run.samples, "plain", "plain") is None


@pytest.mark.parametrize(("kinds", "several"), [(("qa",), False), (("qa", "coding"), False), (("qa", "rag"), True)])
def test_tasks_and_categories_that_are_the_same_are_one_table(kinds: tuple[str, ...], several: bool) -> None:
    run = some_run()
    for one in run.samples:
        one.category = kinds[int(one.prompt) % len(kinds)]
    assert page(run).count("## By task") == 1
    assert page(run).count("## By category") == several


def test_end_to_end_is_times_the_first_method_everywhere() -> None:
    run = some_run()
    for one in run.samples:
        one.prefill_seconds = 10.0
    tree = summarise(run)[2]
    assert tree.speed_up == pytest.approx(60 / 22.5)
    assert tree.end_to_end == pytest.approx(120 / 82.5)
    assert f"{120 / 82.5:.2f}" in page(run)
    shown = Console(file=io.StringIO(), width=200)
    shown.print(table(run))
    told = shown.file.getvalue()  # type: ignore[attr-defined]
    assert "x plain" in told
    assert f"{120 / 82.5:.2f}" in told
    for word in ("End to end:", "Accepted:", "Ids as plain:"):
        assert word in told
        assert word in page(run)


def test_the_share_of_ids_that_are_plains_is_told() -> None:
    run = some_run()
    run.samples[2].token_ids[50], run.samples[2].same_as_plain = 0, False
    assert summarise(run)[2].ids == "5/6 (91.7%)"
    assert "5/6 (91.7%)" in page(run)
    assert "5/6 (91.7%)" in main_table(run)
    run.samples[2].token_ids = [*range(100), 7]  # one more, of 601
    assert summarise(run)[2].ids == "5/6 (99.8%)"


# -- texts as they are -----------------------------------------------------------------------------------------------

NASTY = ["a|b", "`", "a `b` c", "``", "a`b``c", "<b>x</b>", "$x_a$", "__init__", "*a*", "a\\|b", "[a](b)", "&lt;",
         "&amp", "~~a~~", "# a", " a ", " ", "", "\\", "- a", "<!-- x -->"]  # fmt: skip


def read(markdown: str) -> list[str]:
    """The texts that a Markdown reader shows in each cell, or line."""
    found = list[str]()
    for token in MarkdownIt("gfm-like", {"linkify": False}).parse(markdown):
        if token.type == "inline":
            shown = "".join(part.content for part in token.children or () if part.type in ("text", "code_inline"))
            marks = {part.content if part.type == "html_inline" else part.type for part in token.children or ()}
            assert marks <= {
                "text",
                "code_inline",
                "<code>",
                "</code>",
                "<span>",
                "</span>",
                "strong_open",
                "strong_close",
            }, marks
            found.append(shown)
    return found


@pytest.mark.parametrize("text", NASTY)
def test_no_text_is_markdown(text: str) -> None:
    shown = text if text.strip() else text.replace(" ", "\N{OPEN BOX}")
    for form in (code, plain):
        page = f"| x | {form(text)} | y |\n| --- | --- | --- |\n| x | {form(text)} | y |\n"
        assert [cell.strip() for cell in read(page)] == ["x", shown.strip(), "y"] * 2
        assert "".join(read(f"# {form(text)}")).strip() == shown.strip()


def test_lines_and_marks_that_cannot_be_seen_are_written_out() -> None:
    assert plain("a\nb\u2028c\x85d\ud83d") == "".join(
        f"{c}&#92;{n}" for c, n in zip("abcd", ("n", "u2028", "x85", "ud83d"))
    )
    assert "\u2028" not in code("a\u2028b")
    assert plain("test:runner:1") == "test<span>:</span>runner:1"  # GitHub draws a runner otherwise
    assert code("test:runner:1") == "`test:runner:1`"


def test_a_block_ends_where_it_ends() -> None:
    text = "a\n```\n# b\n````x"
    tokens = MarkdownIt().parse(block(text))
    assert [(token.type, token.content) for token in tokens] == [("fence", text + "\n")]


def test_a_run_with_such_texts_is_shown_as_it_is() -> None:
    run = some_run()
    for one in run.samples:
        one.method = one.method.replace("merged:cost", "a|`$<b>\u2028[:x:]")
        one.category = "c|`$"
    run.command, run.settings["model"] = "tokentree bench ```", "m|`$.gguf"
    assert read(page(run))[0] == "m|`$.gguf"
    assert r"a|`$<b>\u2028[:x:]" in read(page(run))
    assert "c|`$ (6)" in read(page(run))
    shown = Console(file=io.StringIO(), width=200, force_terminal=True)
    shown.print(table(run, "c|`$"))
    told = shown.file.getvalue()  # type: ignore[attr-defined]
    assert "[:x:]" in told


def test_files_of_one_name_in_two_folders_keep_their_folders() -> None:
    assert short_names(["x:a/m.gguf", "x:b/m.gguf", "y:c/m.gguf"]) == {
        "x:a/m.gguf": "x:a/m.gguf", "x:b/m.gguf": "x:b/m.gguf", "y:c/m.gguf": "y:m.gguf",
    }  # fmt: skip


# -- files -----------------------------------------------------------------------------------------------------------


def test_all_of_a_page_but_the_table_stays(tmp_path: Path) -> None:
    file = tmp_path / "page.md"
    file.write_bytes(b"\xef\xbb\xbfa\r\n<!-- run --><!-- /run -->\r\nb\rc\x0c\r\n")
    file.chmod(0o640)
    (tmp_path / "link.md").symlink_to(file)
    insert("one\ntwo", "run", tmp_path / "link.md")
    table = b"<!-- run -->\r\n\r\none\r\ntwo\r\n\r\n<!-- /run -->"
    assert file.read_bytes() == b"\xef\xbb\xbfa\r\n" + table + b"\r\nb\rc\x0c\r\n"
    assert (tmp_path / "link.md").is_symlink()
    assert file.stat().st_mode & 0o777 == 0o640
    for other in (tmp_path, Path("/dev/full"), tmp_path / "none.md", Path("/proc/self/mem")):
        with pytest.raises(OptionError, match=r"can't put a table into|has no <!-- run -->"):
            insert("x", "run", other)


def full(*_: object, **__: object) -> None:
    raise OSError(errno.ENOSPC, "No space left on device")


def test_where_the_disk_is_full_all_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    some_run().save(tmp_path)
    (tmp_path / "report.md").write_text("mine")
    before = {file.name: file.read_bytes() for file in tmp_path.iterdir()}
    monkeypatch.setattr(sys, "argv", ["tokentree", "report", str(tmp_path)])
    monkeypatch.setattr(Path, "replace", full)
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert ended.value.code == 2
    told = capsys.readouterr().err
    assert told.count("\n") == 1
    assert "No space left on device" in told
    with pytest.raises(OptionError, match="No space left"):
        some_run().save(tmp_path)
    assert {file.name: file.read_bytes() for file in tmp_path.iterdir()} == before


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
    assert "| **`merged:cost`** | 26.7 | 2.67 | 2.13 |" in text
    assert "old" not in text
    with pytest.raises(OptionError, match="has no <!-- other -->"):
        insert("", "other", file)
    with pytest.raises(OptionError, match="can't be read"):
        insert("", "run", tmp_path / "none.md")


def test_files_in_a_table_have_no_folders() -> None:
    run = some_run()
    for one in run.samples:
        one.method = one.method.replace("merged:cost", "llama.cpp:/some/where/model.gguf:lookup:3")
    assert "| **`llama.cpp:model.gguf:lookup:3`** |" in main_table(run)


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
