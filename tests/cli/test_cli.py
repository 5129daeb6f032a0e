"""The command, as a user types it."""

from __future__ import annotations

import functools
import json
import logging
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import typer.main

from tests import forked
from tests.tiny_models import save_model, tiny, tiny_tokenizer
from tokentree.calibrate import Calibration
from tokentree.check import Verdict
from tokentree.cli import main as cli

Command = Callable[..., tuple[int, str, str]]
made = functools.cache(typer.main.get_command)  # a process makes its commands once, which takes a while


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("model"), tiny("llama", vocab_size=300), tiny_tokenizer())


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Command:
    """The command, in this process. What it sets of logging, as if the process were its own, doesn't outlast a test."""
    monkeypatch.setattr(typer.main, "get_command", made)
    for name in ("tokentree.serve", "uvicorn", "uvicorn.error"):
        logger = logging.getLogger(name)
        for part in ("handlers", "propagate", "level"):
            monkeypatch.setattr(logger, part, getattr(logger, part))

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
    _, _, err = run("generate", "one two one two", "-m", folder, "-d", folder, "--compare", "--max-tokens", 9)
    assert "identical: all" in err
    assert "mean accepted length" in err
    _, _, err = run("generate", "one two one two", "-m", folder, "--stats", "--max-tokens", 9)
    assert "identical" not in err


def test_show_tree_marks_the_accepted_path_and_the_bonus(run: Command, folder: Path) -> None:
    words = ["generate", "one two", "-m", folder, "-d", folder, "--shape", "2x1", "--max-tokens", 6, "--no-chat"]
    _, _, err = run(*words, "--show-tree")
    assert "step 1" in err
    assert "accepted" in err
    assert "bonus" in err


def test_sampling_options_and_a_seed_give_one_text(run: Command, folder: Path) -> None:
    options = ["--temperature", 1, "--top-p", 0.9, "--top-k", 50, "--min-p", 0.01, "--repetition-penalty", 1.1]
    words = ["generate", "one", "-m", folder, *options, "--seed", 3, "--max-tokens", 8, "--json"]
    assert json.loads(run(*words)[1])["token_ids"] == json.loads(run(*words)[1])["token_ids"]


def test_depth_and_branching_are_a_shape(run: Command, folder: Path) -> None:
    words = ["generate", "one", "-m", folder, "-d", folder, "--max-tokens", 8, "--json"]
    ours = json.loads(run(*words, "--depth", 2, "--branching", 2)[1])["metrics"]
    assert ours["drafted_tokens"] == json.loads(run(*words, "--shape", "2x2")[1])["metrics"]["drafted_tokens"]


def test_a_dash_reads_standard_input(folder: Path) -> None:
    options = ["-m", str(folder), "--max-tokens", "4", "--json", "--threads", "1"]
    words = [sys.executable, "-m", "tokentree", "generate", "-", *options]
    done = forked.run(words, input="one two")
    assert json.loads(done.stdout)["token_ids"]
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["generate", "", "-m", "FOLDER"], "the prompt is empty"),
        (["generate", "one " * 700, "-m", "FOLDER"], "no room for an answer"),
        (["generate", "a", "-m", "FOLDER", "--drafter", "foo"], "unknown drafter 'foo'"),
        (["generate", "a", "-m", "FOLDER", "--quantization", "int3"], "unknown quantization 'int3'"),
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
        (["generate", "a", "-m", "FOLDER", "--reference", "./none.txt"], "can't read the reference"),
        (["generate", "a", "-m", "FOLDER", "--shape", "cost:curve=1"], "is not an option of this shape"),
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


def _prompt_file(folder: Path, name: str, *prompts: str) -> Path:
    file = folder / name
    file.write_text("".join(json.dumps({"prompt": prompt}) + "\n" for prompt in prompts))
    return file


def test_bench_measures_batches(run: Command, folder: Path, tmp_path: Path) -> None:
    prompts = _prompt_file(tmp_path, "p.jsonl", "one two", "three four five", "six")
    words = ["bench", "-m", folder, "--prompts", prompts, "--max-tokens", 6, "--out", tmp_path / "out"]
    code, out, _ = run(*words, "--method", "plain", "--method", "ngram:2x1", "--batch", 2)
    assert code == 0
    assert "batch of 2" in out
    assert "up to the first loop" not in out
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    assert results["settings"]["batch"] == 2
    assert [(s["method"], s["prompt"], s["same_as_plain"]) for s in results["samples"]] == [
        ("plain", "1+2", True),
        ("ngram:2x1", "1+2", True),
    ]


def test_bench_lets_methods_learn_from_warm_prompts(run: Command, folder: Path, tmp_path: Path) -> None:
    prompts = _prompt_file(tmp_path, "p.jsonl", "one two")
    words = ["bench", "-m", folder, "--prompts", prompts, "--max-tokens", 40, "--ignore-eos", "--out", tmp_path]
    words += ["--method", "suffix:chain:4"]
    forwards = []
    for more in ([], ["--warm", prompts]):
        code, out, _ = run(*words, *more, "--force")
        results = json.loads((tmp_path / "results.json").read_text())
        assert (code, len(results["samples"])) == (0, 1)
        assert "up to the first loop" in out
        assert results["settings"]["warm"] == [str(file) for file in more[1:]]
        forwards.append(results["samples"][0]["metrics"]["target_forwards"])
    assert forwards[1] < forwards[0]


def test_bench_resumes_a_run_with_its_own_settings(run: Command, folder: Path, tmp_path: Path) -> None:
    prompts = _prompt_file(tmp_path, "p.jsonl", "one two", "three")
    words = ["bench", "-m", folder, "--prompts", prompts, "--method", "plain", "--out", tmp_path / "out"]
    assert run(*words, "--max-tokens", 6)[0] == 0
    before = (tmp_path / "out" / "results.json").read_text()
    assert run(*words, "--max-tokens", 6, "--resume")[0] == 0
    assert (tmp_path / "out" / "results.json").read_text() == before
    for more, says in ((["--resume"], "was made with other settings"), ([], "there is a run in")):
        code, _, err = run(*words, "--max-tokens", 7, *more)
        assert (code, err.count("\n")) == (2, 1)
        assert says in err
    assert (tmp_path / "out" / "results.json").read_text() == before
    assert run(*words, "--max-tokens", 7, "--force")[0] == 0
    assert (tmp_path / "out" / "results.json").read_text() != before


@pytest.mark.parametrize(
    ("more", "says"),
    [
        (["--method", "plain", "--resume"], "there is no run in"),
        (["--method", "plain", "--batch", 3], "there are 2 prompts: they fill no batch of 3"),
        (["--method", "transformers", "--batch", 2], "--batch measures this library's methods"),
        (["--method", "plain", "--batch", 2, "--warm", "PROMPTS"], "without --warm"),
        (["--method", "plain", "--warm", "./none.jsonl"], "can't read the prompt file"),
    ],
)
def test_bench_says_what_it_cannot_measure(
    run: Command, folder: Path, tmp_path: Path, more: list[object], says: str
) -> None:
    prompts = _prompt_file(tmp_path, "p.jsonl", "one two", "three")
    words = ["bench", "-m", folder, "--prompts", prompts, "--out", tmp_path / "out"]
    code, _, err = run(*words, *[prompts if word == "PROMPTS" else word for word in more])
    assert code == 2
    assert says in err
    assert not (tmp_path / "out").exists()


def test_a_reference_is_searched_and_changes_no_text(run: Command, folder: Path, tmp_path: Path) -> None:
    reference = tmp_path / "reference.txt"
    reference.write_text("zero one two three four")
    words = ["generate", "one two", "-m", folder, "--no-chat", "--drafter", "ngram", "--shape", "chain:3", "--json"]
    without = json.loads(run(*words, "--max-tokens", 2)[1])
    shown = json.loads(run(*words, "--max-tokens", 2, "--reference", reference, "--compare")[1])
    assert without["metrics"]["drafted_tokens"] == 0  # nothing stands twice in the prompt
    assert shown["metrics"]["drafted_tokens"] > 0
    assert shown["identical"] is True
    assert shown["token_ids"] == without["token_ids"]


def test_what_lookups_learnt_is_kept_in_a_folder(run: Command, folder: Path, tmp_path: Path) -> None:
    words = ["generate", "one two", "-m", folder, "--drafter", "suffix", "--shape", "chain:4", "--max-tokens", 40]
    words += ["--memory", tmp_path / "new" / "memory", "--json"]
    first, second = (json.loads(run(*words)[1]) for _ in range(2))
    assert (tmp_path / "new" / "memory" / "suffix.safetensors").is_file()
    assert second["token_ids"] == first["token_ids"]
    assert second["metrics"]["target_forwards"] < first["metrics"]["target_forwards"]


def test_memory_that_cannot_be_read_or_written_is_one_sentence(run: Command, folder: Path, tmp_path: Path) -> None:
    words = ["generate", "one two", "-m", folder, "--drafter", "suffix", "--shape", "2", "--max-tokens", 4, "--memory"]
    (tmp_path / "suffix.safetensors").write_text("no arrays")
    code, out, err = run(*words, tmp_path)
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert "can't read" in err
    code, out, err = run(*words, tmp_path / "suffix.safetensors")
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert "is a file: name a folder" in err


def test_calibrate_prints_the_curve_the_rates_and_the_trees(run: Command, folder: Path) -> None:
    code, out, _ = run("calibrate", "-m", folder, "--drafter", "recycling", "--max-tokens", 12)
    assert code == 0
    for title in ("T(n): one forward", "acceptance, where the parent was right", "the best fixed trees"):
        assert title in out
    assert "LlamaForCausalLM" in out
    assert "recycling" in out


def test_calibrate_as_json_is_all_that_was_found_and_can_be_drawn(run: Command, folder: Path, tmp_path: Path) -> None:
    prompts = _prompt_file(tmp_path, "p.jsonl", "one two one two one two")
    words = ["calibrate", "-m", folder, "--prompts", prompts, "--max-tokens", 12]
    code, out, err = run(*words, "--json", "--plot", tmp_path / "picture.png")
    assert code == 0
    found = Calibration.model_validate_json(out)
    assert found.rows[0] == 1
    assert [pick.batch for pick in found.picks] == [1, 2, 4, 8]
    assert (tmp_path / "picture.png").read_bytes().startswith(b"\x89PNG")
    assert "drawn into" in err


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("picture", "is no picture's name"),
        ("picture.txt", "end it in .pdf, .png, .svg"),
        ("none/picture.png", "there is no folder"),
    ],
)
def test_a_picture_that_cannot_be_drawn_is_told_before_anything_is_measured(
    run: Command, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, says: str
) -> None:
    monkeypatch.setattr(cli, "load", lambda *_, **__: pytest.fail("the model was loaded"))
    code, out, err = run("calibrate", "-m", folder, "--plot", tmp_path / name)
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert says in err


def test_drawing_without_matplotlib_says_what_to_install(
    run: Command, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    code, _, err = run("calibrate", "-m", folder, "--plot", tmp_path / "picture.png")
    assert code == 2
    assert "pip install 'tokentree[plot]'" in err


def test_an_interrupted_stream_prints_what_it_had(run: Command, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from tokentree.decoder import Decoder

    steps, step = [], Decoder.step

    def interrupt(self: Decoder, *args: object) -> None:
        steps.append(1)
        if len(steps) == 5:
            raise KeyboardInterrupt
        step(self, *args)  # type: ignore[arg-type]

    monkeypatch.setattr(Decoder, "step", interrupt)
    code, out, err = run("generate", "one two", "-m", folder, "--drafter", "none", "--max-tokens", 30, "--stats")
    assert code == 0
    assert out.strip()
    assert "interrupted" in err
    assert "Traceback" not in err
