"""Pictures of steps, and the commands that draw."""

from __future__ import annotations

import errno
import io
import json
import re
import sys
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from matplotlib.colors import to_hex
from matplotlib.figure import Figure
from matplotlib.patches import FancyBboxPatch, PathPatch
from PIL import Image

from tests.bench.test_report import sample, some_run
from tests.conftest import by_night, shown
from tests.drafters.test_medusa import random_heads
from tests.tiny_models import save_model, tiny, tiny_pair, tiny_tokenizer
from tokentree.bench.pictures import draw_acceptance, draw_speed
from tokentree.bench.results import Run
from tokentree.cli import main as cli
from tokentree.errors import OptionError
from tokentree.heads.saved import About, write_heads
from tokentree.plots.cost import plot_cost
from tokentree.plots.drawing import BLUE, GREEN, GREY, INKS, ON_DARK, PAGE, SLATE, STYLE, readable, width, wrapped
from tokentree.plots.trees import (
    Panel,
    Recorder,
    Step,
    _places,
    common_step,
    draw_mask,
    draw_methods,
    draw_tree,
)
from tokentree.shapes import CostCurve
from tokentree.tree import TokenTree

Command = Callable[..., tuple[int | str | None, str]]


def some_step() -> Step:
    tree = TokenTree(np.array([5, 6, 7, 8, 9, 8]), np.array([-1, 0, 0, 1, 1, 2]))
    return Step(
        tree, [1.0, 0.5, 0.25, 0.6, 0.1, 0.9], ["", "ngram", "suffix", "ngram", "ngram", "suffix"], [0, 1, 3], 4
    )


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Command:
    def command(*words: object) -> tuple[int | str | None, str]:
        monkeypatch.setattr(sys, "argv", ["tokentree", "plot", *map(str, words)])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        return ended.value.code or 0, capsys.readouterr().err

    return command


def test_leaves_lie_one_below_another_and_what_has_something_below_it_in_the_middle() -> None:
    assert _places(some_step().tree, 3) == ([1.25, 0.5, 2.0, 0.0, 1.0, 2.0], 0.0)
    assert _places(some_step().tree, 1) == (
        [2.0, 1.0, 3.0, 1.0, 2.0, 3.0],
        0.0,
    )  # the bonus token has a place of its own
    assert _places(TokenTree.chain(1, []), 0) == ([0.0], 0.0)


@pytest.mark.parametrize("ending", ["png", "svg"])
def test_a_step_is_drawn_with_all_of_its_texts(tmp_path: Path, ending: str) -> None:
    texts = ["root", "one", "$two_", "three", "four", "three"]
    for draw in (draw_tree, draw_mask):
        file = tmp_path / f"{draw.__name__}.{ending}"
        draw(some_step(), texts, "end", file, "a title")
        assert file.stat().st_size > 4000


def test_the_command_draws_a_real_step(tmp_path: Path, run: Command) -> None:
    folder = save_model(tmp_path / "model", tiny("llama", vocab_size=300), tiny_tokenizer())
    args = ["one two three one two three one two", "-m", folder, "--drafter", "ngram", "--no-chat", "--max-tokens", 30]
    for name in ("tree", "mask"):
        assert run(name, *args, "--shape", "chain:4", "--out", tmp_path / f"{name}.svg")[0] == 0
        assert (tmp_path / f"{name}.svg").read_text().count("<path") > 5
    for options, message in (
        (["--step", 900], "there is no step 900"),
        (["--out", tmp_path / "tree.gif"], "is no picture's name"),
        (["--out", tmp_path], "is no picture's name"),
        (["--out", tmp_path / "none" / "tree.png"], "there is no folder"),
        (["--out", "/proc/tree.png"], "can't write the picture"),
        (["--max-tokens", 0], "max_tokens"),
    ):
        code, told = run("tree", *args, "--out", tmp_path / "tree.png", *options)
        assert code == 2
        assert message in told


def test_the_busiest_step_is_the_one_that_accepted_the_most() -> None:
    recorder = Recorder(["ngram"])
    short = Step(TokenTree.chain(1, [2]), [1.0, 0.5], ["", "ngram"], [0], 3)
    recorder.steps = [short, some_step(), short, some_step()]
    assert recorder.busiest() == 2


def test_steps_that_begin_at_the_same_place_are_set_side_by_side() -> None:
    one, three = Step(TokenTree.chain(1, [2]), [1.0, 0.5], ["", "a"], [0], 3), some_step()
    first, other = Recorder(["a"]), Recorder(["b"])
    first.steps, other.steps = [one, three, one, three], [three, one, three]
    assert first.starts() == [0, 1, 4, 5]
    assert other.starts() == [0, 3, 4]
    assert common_step([first, other]) == [one, three]  # at 0 and at 4 alike: the first


def test_draft_models_and_heads_are_drawn_side_by_side(tmp_path: Path, run: Command) -> None:
    target, draft = tiny_pair(target_vocab=300, draft_vocab=300)
    folder = save_model(tmp_path / "model", target, tiny_tokenizer())
    smaller = save_model(tmp_path / "draft", draft, tiny_tokenizer())
    write_heads(tmp_path / "heads", random_heads(48), "tiny", 300, About())
    args = ["one two three", "-m", folder, "-d", smaller, "--heads", tmp_path / "heads", "--no-chat", "--max-tokens", 9]
    assert run("methods", *args, "--out", tmp_path / "methods.svg")[0] == 0
    drawn = (tmp_path / "methods.svg").read_text()
    assert drawn.count("<path") > 20


def test_any_two_drafters_are_drawn_side_by_side(tmp_path: Path, run: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    target, draft = tiny_pair(target_vocab=300, draft_vocab=300)
    folder = save_model(tmp_path / "model", target, tiny_tokenizer())
    smaller = save_model(tmp_path / "draft", draft, tiny_tokenizer())
    for name in ("a", "b"):
        write_heads(tmp_path / name / "medusa", random_heads(48), "tiny", 300, About())
    one, two = (["--heads", tmp_path / name / "medusa"] for name in ("a", "b"))
    drawn = list[list[Panel]]()
    monkeypatch.setattr("tokentree.plots.trees.draw_methods", lambda panels, _: drawn.append(panels))
    out = tmp_path / "methods.svg"
    args = ["methods", "one two three", "-m", folder, "--no-chat", "--max-tokens", 9, "--out", out]
    for options, titles in (
        ([*one, *two], ["a/medusa: ", "b/medusa: "]),
        (["-d", smaller, "-d", folder], ["draft: ", "model: "]),
        (["--drafter", "ngram", "--drafter", "suffix+recycling"], ["ngram: ", "suffix+recycling: "]),
        (["-d", smaller, *one, "--drafter", "ngram"], ["draft: ", "a/medusa: ", "ngram: "]),
        (["--drafter", "draft_model", "-d", smaller, *one], ["draft: ", "a/medusa: "]),
    ):
        assert run(*args, *options)[0] == 0
        panels = drawn.pop()
        assert len(panels) == len(titles)
        assert all(panel.title.startswith(title) for panel, title in zip(panels, titles, strict=True))
        if titles == ["draft: ", "model: "]:  # each draft model by itself
            one_by_one = [set(panel.step.proposers[1:]) for panel in panels]
            assert [len(names) for names in one_by_one] == [1, 1]
            assert one_by_one[0] != one_by_one[1]
    for options, message in (
        ([], "nothing to compare"),
        ([*one], "nothing to compare"),
        ([*one, "--heads", tmp_path / "none"], "there is no folder"),
        (["--drafter", "ngram", "--drafter", "medusa"], "needs heads"),
        (["--drafter", "ngram", "--drafter", "nothing"], "unknown drafter"),
    ):
        code, told = run(*args, *options)
        assert (code, told.count("\n")) == (2, 1)
        assert message in told


def test_the_cost_of_a_forward_is_drawn(tmp_path: Path, run: Command) -> None:
    folder = save_model(tmp_path / "model", tiny("llama", vocab_size=300), tiny_tokenizer())
    assert run("cost", "-m", folder, "--out", tmp_path / "cost.png")[0] == 0
    assert (tmp_path / "cost.png").stat().st_size > 10_000


def test_runs_are_drawn(tmp_path: Path, run: Command) -> None:
    some_run().save(tmp_path / "run")
    for name in ("speedup", "acceptance"):
        assert run(name, tmp_path / "run", "--out", tmp_path / f"{name}.png")[0] == 0
        assert (tmp_path / f"{name}.png").stat().st_size > 10_000
    few = some_run()
    few.samples = [s for s in few.samples if s.method == "plain"]
    few.save(tmp_path / "few")
    for name, message in (("speedup", "nothing to compare it with"), ("acceptance", "too few steps")):
        code, told = run(name, tmp_path / "few", "--out", tmp_path / "few.png")
        assert code == 2
        assert message in told


def test_what_is_no_run_is_told_in_one_sentence_and_nothing_is_lost(tmp_path: Path, run: Command) -> None:
    whole = json.loads(some_run().save(tmp_path).read_text())
    out, file = tmp_path / "kept.png", tmp_path / "results.json"
    out.write_text("mine")
    broken = json.loads(json.dumps(whole))
    broken["samples"][2]["metrics"]["draft_seconds"] = float("nan")
    for content, message in (
        (None, "No such file"),
        (b"", "no whole JSON file"),
        (json.dumps(whole)[:-900].encode(), "no whole JSON file"),
        (b"\xff\xfe", "not UTF-8"),
        (b"[]", "there is no run in"),
        (json.dumps({"model": "llama"}).encode(), "command: "),
        (json.dumps(broken).encode(), "samples.2.metrics.draft_seconds"),
        (json.dumps(whole | {"samples": []}).encode(), "no samples yet"),
    ):
        file.unlink(missing_ok=True)
        if content is not None:
            file.write_bytes(content)
        for name in ("speedup", "acceptance"):
            code, told = run(name, tmp_path, "--out", out)
            assert (code, told.count("\n")) == (2, 1), told
            assert message in told
    assert run("speedup", file, "--out", out)[0] == 2  # the file itself is no folder
    assert out.read_text() == "mine"


def test_where_the_disk_is_full_what_was_there_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(figure: Figure, file: Path, **_: object) -> None:
        file.write_bytes(b"half")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Figure, "savefig", full)
    file = tmp_path / "tree.png"
    file.write_text("mine")
    with pytest.raises(OptionError, match=r"can't write the picture .*: No space left on device"):
        draw_tree(some_step(), list("abcdef"), "end", file, "a title")
    assert [(other.name, other.read_text()) for other in tmp_path.iterdir()] == [("tree.png", "mine")]


def test_without_matplotlib_the_extra_is_named(tmp_path: Path, run: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    some_run().save(tmp_path)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    code, told = run("speedup", tmp_path, "--out", tmp_path / "speed.png")
    assert (code, told) == (2, "tokentree: drawing needs matplotlib: pip install 'tokentree[plot]'\n")


# -- pictures for any page -------------------------------------------------------------------------------------------


def luminance(colour: str) -> float:
    parts = [int(colour[place : place + 2], 16) / 255 for place in (1, 3, 5)]
    linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def contrast(one: str, other: str) -> float:
    low, high = sorted((luminance(one), luminance(other)))
    return (high + 0.05) / (low + 0.05)


def test_ink_and_tones_can_be_read_on_light_and_dark_pages() -> None:
    for page in ("#ffffff", "#0d1117"):
        assert contrast(INKS[".png"], page) > 4
        assert min(contrast(tone, page) for tone in (BLUE, GREEN, GREY)) > 3
    assert min(contrast(tone, "#ffffff") for tone in (BLUE, GREEN, SLATE)) > 4.5  # white text on them
    assert contrast(INKS[".pdf"], "#ffffff") > 12
    assert contrast(ON_DARK, "#0d1117") > 12


ENDINGS = ("png", "svg", "pdf")


def pictures(folder: Path, ending: str) -> list[Path]:
    texts = ["root", " one", "$two_", "three", "four", "three"]
    tree, mask, speed, rates, cost = (
        folder / f"{name}.{ending}" for name in ("tree", "mask", "speed", "rates", "cost")
    )
    draw_tree(some_step(), texts, "end", tree, "a title")
    draw_mask(some_step(), texts, "end", mask, "a title")
    draw_speed(some_run(), speed)
    draw_acceptance(some_run(), rates)
    plot_cost(CostCurve([1, 8, 64], [0.01, 0.011, 0.05]), "an engine", cost)
    return [tree, mask, speed, rates, cost]


@pytest.mark.parametrize("ending", by_night(ENDINGS, but=["svg"]))
def test_pictures_have_no_background_and_the_same_bytes_each_time(tmp_path: Path, ending: str) -> None:
    first = [file.read_bytes() for file in pictures(tmp_path, ending)]
    assert [file.read_bytes() for file in pictures(tmp_path, ending)] == first
    for content in first:
        if ending == "png":
            pixels = np.asarray(Image.open(io.BytesIO(content)))
            assert pixels.shape[2] == 4
            assert {int(pixels[y, x, 3]) for y in (0, -1) for x in (0, -1)} == {0}
            assert (pixels[..., 3] == 0).mean() > 0.5
        elif ending == "svg":
            assert b"prefers-color-scheme: dark" in content
            assert set(re.findall(rb"(?:fill|stroke): (#[0-9a-f]{6})", content)) >= {INKS[".svg"].encode()}
            assert b"#ffffff" not in content.partition(b"figure_1")[2].split(b"axes_1")[0]
        else:
            assert b"/FontFile2" in content or b"/FontDescriptor" in content
            assert b"/Type3" not in content


def test_endings_count_in_either_case(tmp_path: Path) -> None:
    draw_tree(some_step(), list("abcdef"), "end", tmp_path / "TREE.PNG", "a title")
    assert (tmp_path / "TREE.PNG").read_bytes().startswith(b"\x89PNG")


STRANGE = ["$x_a$", "$", r"$\nomacro{$", "日本語", "\U0001f680", "a\u2028b", "\ud83d", "\x00", "a\nb\tc", "|`<b>&",
           "%s {0}", "العربية", "e\u0301", "x" * 300, ""]  # fmt: skip


THREE = [STRANGE[start : start + 3] for start in range(0, len(STRANGE), 3)]


@pytest.mark.parametrize("texts", by_night(THREE, but=THREE[:2]), ids=shown)
def test_any_text_can_be_drawn(tmp_path: Path, texts: list[str]) -> None:
    """Where a font lacks a sign matplotlib warns, and a warning is an error here."""
    for text, ending in zip(texts, ("png", "svg", "pdf"), strict=True):
        draw_methods([Panel(text, some_step(), [text] * 6, text)], tmp_path / f"methods.{ending}")
    for title, other in zip(texts, texts[1:] + texts[:1], strict=True):
        draw_mask(some_step(), texts * 2, title, tmp_path / "mask.png", other)
    run, names = some_run(), {"merged:cost": texts[0] or "x", "merged:chain:3": texts[1] or "y"}
    for one in run.samples:
        one.method, one.category = names.get(one.method, one.method), texts[2]
    draw_speed(run, tmp_path / "speed.png")
    assert draw_acceptance(run, tmp_path / "acceptance.png")
    for text in texts:
        plot_cost(CostCurve([1, 8, 64], [0.01, 0.011, 0.05]), text, tmp_path / "cost.png")


def test_a_text_on_one_line_is_as_it_is_or_escaped() -> None:
    assert readable("a$b\n\u2028\x00") == r"a$b\n\u2028\x00"
    assert readable("x" * 99, 9) == "xxxx…xxxx"
    assert readable("\u2028" * 9, 16) == r"\u2028…\u2028"  # no escape is cut
    for text in ("recycling+suffix+ngram+medusa:cost", "x" * 200, "a b c", ""):
        told = wrapped(text, 1.0)
        assert len(told.split("\n")) <= 3
        assert all(width(line) <= 1.0 for line in told.split("\n"))
    assert wrapped("recycling+suffix+ngram:cost", 1.2).replace("\n", "") == "recycling+suffix+ngram:cost"


# -- what lies where -------------------------------------------------------------------------------------------------


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Takes the figures that would be written, laid out, with the texts that are drawn in ``shown``."""
    from matplotlib import style
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.text import Text

    found, own = list[Any](), Text.draw

    def draw_text(text: Text, *args: Any) -> None:
        found[-1].shown[id(text)] = text
        own(text, *args)

    monkeypatch.setattr(Text, "draw", draw_text)

    def draw(_: Path, make: Callable[[str], Any]) -> None:
        with style.context(["default", STYLE]):
            found.append(make("#7f7f7f"))
            found[-1].shown = {}
            FigureCanvasAgg(found[-1]).draw()  # type: ignore[no-untyped-call]

    for module in ("plots.trees", "bench.pictures", "plots.cost"):
        monkeypatch.setattr(f"tokentree.{module}.draw", draw)
    return found


def texts_of(figure: Any) -> list[Any]:
    return [text for text in figure.shown.values() if text.get_text().strip() and text.get_visible()]


def check_texts(figure: Any) -> None:
    """All texts lie within the picture, none on another; none is smaller than 8 points."""
    texts = texts_of(figure)
    assert min(text.get_fontsize() for text in texts) >= 8
    boxes = [(text.get_text(), text.get_window_extent()) for text in texts if text.get_rotation() in (0, 90)]
    for number, (text, box) in enumerate(boxes):
        assert box.x0 >= -1, text
        assert box.y0 >= -1, text
        assert box.x1 <= figure.bbox.x1 + 1, text
        assert box.y1 <= figure.bbox.y1 + 1, text
        for other, beside in boxes[:number]:
            across = min(box.x1, beside.x1) - max(box.x0, beside.x0)
            down = min(box.y1, beside.y1) - max(box.y0, beside.y0)
            assert across <= 1.5 or down <= 1.5, (text, other)


def many_methods(count: int) -> Run:
    run = some_run()
    names = ["plain", *(f"recycling+suffix+ngram+medusa:dynamic:nodes={n},depth=3" for n in range(count // 2))]
    names += [f"llama.cpp:some/folder/qwen2.5-coder-1.5b-q8.gguf:lookup:{n}" for n in range(count - count // 2)]
    kinds = ("qa", "summarization", "coding", "writing", "translation", "math", "stem")
    run.samples = [
        sample(name, place, 100, 10 / (1 + (7 * n % 11) / 5 + place / 50), kinds[place % 7], offered_by_depth=[90, 30],
               accepted_by_depth=[40 + n, 9])
        for place in range(14) for n, name in enumerate(names)
    ]  # fmt: skip
    return run


@pytest.mark.parametrize("count", [1, 2, 17])
def test_a_run_of_any_size_fits_a_page(tmp_path: Path, drawn: list[Any], count: int) -> None:
    run = many_methods(count)
    draw_speed(run, tmp_path)
    draw_acceptance(run, tmp_path)
    for figure in drawn:
        assert figure.get_figwidth() <= PAGE + 0.01
        check_texts(figure)
        assert all(axes.get_xlabel() or figure.get_supxlabel() for axes in figure.axes)
    bars = [(patch.get_y(), patch.get_width(), to_hex(patch.get_facecolor())) for patch in drawn[0].axes[0].patches]
    lengths = [length for _, length, _ in sorted(bars)]
    assert lengths == sorted(lengths, reverse=True)
    assert len(bars) == count
    assert {colour for _, _, colour in bars} == {tone.lower() for tone in (BLUE, GREY)[(count < 2) :]}
    assert len(drawn[1].axes) == count + 1  # plain has depths here too


def test_one_prompt_has_bars_without_intervals(tmp_path: Path, drawn: list[Any]) -> None:
    run = some_run()
    draw_speed(run, tmp_path)
    run.samples = [one for one in run.samples if one.prompt == "0"]
    draw_speed(run, tmp_path)
    several, one = ([text.get_text() for text in texts_of(figure)] for figure in drawn)
    assert "95% interval" in several
    assert "95% interval" not in one
    assert any("1 prompt, no interval" in text for text in one)


def test_methods_that_failed_stand_below_without_a_bar(tmp_path: Path, drawn: list[Any]) -> None:
    run = some_run()
    for one in run.samples:
        if one.method == "merged:cost":
            one.error, one.decoded_tokens, one.decode_seconds = "bad", 0, 0.0
    draw_speed(run, tmp_path)
    axes = drawn[0].axes[0]
    assert [label.get_text() for label in axes.get_yticklabels()] == ["merged:chain:3", "merged:cost"]
    assert len(axes.patches) == 1


@st.composite
def steps(draw: Any) -> Step:
    parents = [-1, *(draw(st.integers(0, node)) for node in range(draw(st.integers(0, 14))))]
    tokens = [draw(st.integers(0, 9)) + 10 * node for node in range(len(parents))]
    tree, path = TokenTree(np.array(tokens), np.array(parents)), [0]
    while tree.children[path[-1]] and draw(st.booleans()):
        path.append(int(draw(st.sampled_from(list(tree.children[path[-1]])))))
    return Step(tree, [0.5] * len(parents), ["ngram"] * len(parents), path, 4)


@given(steps(), st.lists(st.text("abc ", min_size=1, max_size=20), min_size=15, max_size=15))
@settings(max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_no_node_covers_an_edge_or_another_node(tmp_path: Path, drawn: list[Any], step: Step, texts: list[str]) -> None:
    drawn.clear()
    draw_tree(step, texts[: len(step.tree)], "end", tmp_path, "a title")
    axes = drawn[0].axes[0]
    boxes = [patch.get_window_extent() for patch in axes.patches if isinstance(patch, FancyBboxPatch)]
    edges = [patch for patch in axes.patches if isinstance(patch, PathPatch)]
    assert (len(boxes), len(edges)) == (len(step.tree) + 1, len(step.tree))
    for number, box in enumerate(boxes):
        for other in boxes[:number]:
            assert not (box.x0 < other.x1 and other.x0 < box.x1 and box.y0 < other.y1 and other.y0 < box.y1)
    for edge in edges:
        (line,) = map(np.array, edge.get_transform().transform_path(edge.get_path()).to_polygons(closed_only=False))
        inner = np.concatenate([np.linspace(a, b, 20) for a, b in pairwise(line)])
        for box in boxes:
            inside = (inner > [box.x0 + 1, box.y0 + 1]) & (inner < [box.x1 - 1, box.y1 - 1])
            assert not inside.all(1).any()
    check_texts(drawn[0])


def test_a_large_mask_is_drawn(tmp_path: Path, drawn: list[Any]) -> None:
    tree = TokenTree(np.arange(48), np.array([-1, *(node // 4 for node in range(47))]))
    draw_mask(Step(tree, [0.5] * 48, [""] * 48, [0, 1], 4), ["token"] * 48, "end", tmp_path, "a title")
    assert drawn[0].get_figwidth() <= PAGE + 2
    check_texts(drawn[0])


def test_a_tree_may_be_as_deep_as_it_likes() -> None:
    heights, bonus = _places(TokenTree.chain(1, list(range(2, 3000))), 5)
    assert (heights[0], heights[-1], bonus) == (0.5, 1.0, 0.0)
