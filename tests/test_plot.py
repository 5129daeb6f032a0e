"""Pictures of steps, and the commands that draw."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from tests.test_medusa import random_heads
from tests.test_report import some_run
from tests.tiny_models import save_model, tiny, tiny_pair, tiny_tokenizer
from tokentree import cli
from tokentree.heads.saved import About, write_heads
from tokentree.tree import TokenTree
from tokentree.tree_pictures import Recorder, Step, _places, common_step, draw_mask, draw_tree

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
