"""The command, as a user types it."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.tiny_models import save_model, tiny, tiny_tokenizer
from tokentree import cli
from tokentree.check import Verdict

Command = Callable[..., tuple[int, str, str]]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("model"), tiny("llama", vocab_size=300), tiny_tokenizer())


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Command:
    def command(*words: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["tokentree", *map(str, words)])
        with pytest.raises(SystemExit) as stopped:
            cli.main()
        code = stopped.value.code
        out = capsys.readouterr()
        return code if isinstance(code, int) else 0, out.out, out.err

    return command


def test_generate_streams_the_text(run: Command, folder: Path) -> None:
    code, out, _ = run("generate", "one two three one two", "-m", folder, "--no-chat", "--max-tokens", 12)
    assert code == 0
    assert out.strip()


def test_json_is_one_object_with_what_was_asked(run: Command, folder: Path) -> None:
    options = ["--no-chat", "--max-tokens", 12, "--compare", "--json"]
    code, out, _ = run("generate", "one two three one two", "-m", folder, *options)
    shown = json.loads(out)
    assert code == 0
    assert {"text", "token_ids", "finish_reason", "metrics"} <= set(shown)
    assert shown["identical"] is True
    assert shown["token_ids"] == shown["plain"]["token_ids"]
    assert shown["metrics"]["new_tokens"] == len(shown["token_ids"])


def test_compare_says_identical_of_ids_that_were_compared(run: Command, folder: Path) -> None:
    _, out, _ = run("generate", "one two one two", "-m", folder, "-d", folder, "--compare", "--max-tokens", 9)
    assert "identical: all" in out
    assert "mean accepted length" in out
    _, out, _ = run("generate", "one two one two", "-m", folder, "--stats", "--max-tokens", 9)
    assert "identical" not in out


def test_show_tree_marks_the_accepted_path_and_the_bonus(run: Command, folder: Path) -> None:
    _, out, _ = run(
        "generate",
        "one two",
        "-m",
        folder,
        "-d",
        folder,
        "--shape",
        "2x1",
        "--show-tree",
        "--max-tokens",
        6,
        "--no-chat",
    )
    assert "step 1" in out
    assert "accepted" in out
    assert "bonus" in out


def test_sampling_options_and_a_seed_give_one_text(run: Command, folder: Path) -> None:
    options = ["--temperature", 1, "--top-p", 0.9, "--top-k", 50, "--min-p", 0.01, "--repetition-penalty", 1.1]
    words = ["generate", "one", "-m", folder, *options, "--seed", 3, "--max-tokens", 8, "--json"]
    assert json.loads(run(*words)[1])["token_ids"] == json.loads(run(*words)[1])["token_ids"]


def test_depth_and_branching_are_a_shape(run: Command, folder: Path) -> None:
    words = ["generate", "one", "-m", folder, "-d", folder, "--max-tokens", 8, "--json"]
    ours = json.loads(run(*words, "--depth", 2, "--branching", 2)[1])["metrics"]
    assert ours["drafted_tokens"] == json.loads(run(*words, "--shape", "2x2")[1])["metrics"]["drafted_tokens"]


def test_a_dash_reads_standard_input(folder: Path) -> None:
    words = [sys.executable, "-m", "tokentree", "generate", "-", "-m", str(folder), "--max-tokens", "4", "--json"]
    done = subprocess.run(words, input="one two", capture_output=True, text=True, check=True)
    assert json.loads(done.stdout)["token_ids"]
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["generate", "", "-m", "FOLDER"], "the prompt is empty"),
        (["generate", "one " * 700, "-m", "FOLDER"], "no room for an answer"),
        (["generate", "a", "-m", "FOLDER", "--drafter", "foo"], "unknown drafter 'foo'"),
        (["generate", "a", "-m", "FOLDER", "--shape", "zz"], "is not a shape"),
        (["generate", "a", "-m", "FOLDER", "--depth", "0"], "must be at least 1"),
        (["generate", "a", "-m", "FOLDER", "--depth", "2", "--shape", "2x2"], "give one of them"),
        (["generate", "a", "-m", "FOLDER", "--temperature", "-1"], "temperature=-1.0"),
        (["generate", "a", "-m", "FOLDER", "--accept", "foo"], "unknown acceptance rule"),
        (["generate", "a", "-m", "FOLDER", "--accept", "rejection"], "use accept='match'"),
        (["generate", "a", "-m", "FOLDER", "--dtype", "int3"], "unknown dtype"),
        (["generate", "a", "-m", "FOLDER", "--drafter", "draft_model"], "needs draft_model"),
        (["generate", "a", "-m", "./none.gguf"], "there is no file"),
        (["generate", "a", "-m", "./none"], "there is no folder"),
        (["check", "-m", "FOLDER", "--prompts", "./none.jsonl"], "can't read the prompt file"),
        (["bench", "-m", "FOLDER", "--prompts", "./none.jsonl", "--method", "plain", "--out", "o"], "can't read"),
    ],
)
def test_a_mistake_is_one_sentence_and_status_2(run: Command, folder: Path, words: list[str], says: str) -> None:
    code, out, err = run(*[str(folder) if word == "FOLDER" else word for word in words])
    assert code == 2
    assert says in err
    assert err.startswith("tokentree: ")
    assert err.count("\n") == 1
    assert not out


def test_an_unknown_option_is_status_2(run: Command, folder: Path) -> None:
    code, _, err = run("generate", "a", "-m", folder, "--nothing")
    assert code == 2
    assert "Traceback" not in err


def test_check_counts_and_fails_on_wrong(
    run: Command, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    prompts = tmp_path / "p.jsonl"
    prompts.write_text('{"prompt": "one two one two"}\n{"turns": ["three"]}\n')
    words = ["check", "-m", folder, "--prompts", prompts, "--max-tokens", 8]
    assert run(*words)[:2] == (0, "2 identical, 0 ties, 0 WRONG\n")
    verdicts = [Verdict("tie", 8, 3, (0.1,), 0.2), Verdict("WRONG", 8, 1, (3.0,), 0.2)]
    monkeypatch.setattr("tokentree.check.check", lambda *_: verdicts)
    code, out, _ = run(*words)
    assert code == 1
    assert "0 identical, 1 ties, 1 WRONG" in out
    assert json.loads(run(*words, "--json")[1])["WRONG"] == 1


def test_bench_prints_tables_and_leaves_results(run: Command, folder: Path, tmp_path: Path) -> None:
    prompts = tmp_path / "p.jsonl"
    prompts.write_text('{"prompt": "one two one two", "category": "c"}\n')
    words = ["bench", "-m", folder, "--prompts", prompts, "--max-tokens", 6, "--out", tmp_path / "out"]
    code, out, _ = run(*words, "--method", "plain", "--method", "ngram:2x1")
    assert code == 0
    assert "all categories" in out
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    assert [s["method"] for s in results["samples"]] == ["plain", "ngram:2x1"]


def test_an_interrupted_stream_prints_what_it_had(run: Command, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from tokentree.decoder import Decoder

    steps, step = [], Decoder.step

    def interrupt(self: Decoder, seqs: list[object]) -> None:
        steps.append(1)
        if len(steps) == 4:
            raise KeyboardInterrupt
        step(self, seqs)  # type: ignore[arg-type]

    monkeypatch.setattr(Decoder, "step", interrupt)
    code, out, err = run("generate", "one two", "-m", folder, "--drafter", "none", "--max-tokens", 30, "--stats")
    assert code == 0
    assert "interrupted" in out
    assert "Traceback" not in err
