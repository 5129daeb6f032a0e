"""Wrong uses of every command: one sentence on standard error, exit status 2, and what was there stays."""

from __future__ import annotations

import io
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.cli.test_cli import Command, run  # noqa: F401  a fixture
from tests.tiny_models import save_model, tiny, tiny_tokenizer
from tokentree.bench.results import Run

MODEL = "-m model --max-tokens 3"
RUN = "--prompts p.jsonl --method plain --out"

# Words, and a part of what is said. They run in a folder with what `place` puts there; \xff is a byte that is no text.
USES = [
    *[(f"generate a {MODEL} {option}", says) for option, says in (
        ("b", "unexpected extra argument"),
        ("--nothing", "no such option: --nothing"),
        ("--model", "requires an argument"),
        ("--compile=3", "does not take a value"),
        ("--temperature -1", "temperature=-1.0"),
        ("--temperature nan", "temperature=nan"),
        ("--temperature inf", "temperature=inf"),
        ("--temperature hot", "'--temperature'"),
        ("--top-p 2", "top_p=2.0"),
        ("--top-p 0", "top_p=0.0"),
        ("--top-p nan", "top_p=nan"),
        ("--top-k -1", "top_k=-1"),
        ("--top-k 1.5", "'--top-k'"),
        ("--min-p 2", "min_p=2.0"),
        ("--repetition-penalty 0", "repetition_penalty=0.0"),
        ("--repetition-penalty nan", "repetition_penalty=nan"),
        ("--seed x", "'--seed'"),
        ("--seed -1", "seed=-1"),
        ("--seed 1180591620717411303424", "seed="),
        ("--max-tokens 0", "max_tokens=0"),
        ("--max-tokens -1", "max_tokens=-1"),
        ("--num-beams 0", "num_beams=0"),
        ("--num-beams 2 --num-return-sequences 3", "at most num_beams"),
        ("--num-beams 2 --temperature 1", "num_beams goes with"),
        ("--num-beams 2 --show-tree", "leave it out with --num-beams"),
        ("--num-beams 2 --early-stopping maybe", "early_stopping"),
        ("--length-penalty nan", "length_penalty=nan"),
        ("--stop \xff", "--stop is not UTF-8 text"),
        ("--stop=", "can't be empty"),
        ("--reference none", "can't read the reference 'none': No such file"),
        ("--reference .", "can't read the reference '.': Is a directory"),
        ("--reference bytes", "it is not UTF-8 text"),
        ("--reference nul", "it has NUL bytes"),
        ("--reference empty", "the reference is empty"),
        ("--reference=", "'--reference': it is empty: name a file or a folder"),
        ("--reference p.jsonl --reference=", "'--reference': it is empty: name a file or a folder"),
        ("--reference /dev/zero", "it doesn't end within"),
        ("--memory=", "'--memory': it is empty: name a file or a folder"),
        ("--heads=", "'--heads': it is empty: name a file or a folder"),
        ("--memory text", "is a file: name a folder"),
        ("--memory /dev/full", "is a file: name a folder"),
        ("--memory /proc/x", "can't write to the folder '/proc/x'"),
        ("--memory text/x", "can't write to the folder 'text/x'"),
        ("--depth 0", "must be at least 1"),
        ("--branching -1", "must be at least 1"),
        ("--depth 2 --shape 2x2", "give one of them"),
        ("--depth 40 --branching 40", "too large to verify"),
        ("--depth 100000 --branching 1", "too large to verify"),
        ("--depth 99999999999999999999 --branching 1", "too large to verify"),
        ("--depth 1 --branching 99999999999999999999", "too large to verify"),
        ("--shape zz", "is not a shape"),
        ("--shape chain:0", "at least 1"),
        ("--shape chain:x", "is not a shape"),
        ("--shape chain:99999999", "too large to verify"),
        ("--shape chain:9999999999", "is not a shape"),
        (f"--shape chain:{'9' * 5000}", "is not a shape"),
        ("--shape 99999x99999", "too large to verify"),
        ("--shape 2x0", "at least 1"),
        ("--shape paths:[[", "not a list of rank paths"),
        ("--shape paths:[[-1]]", "ranks count from 0"),
        (f"--shape paths:[[{'9' * 5000}]]", "not a list of rank paths"),
        (f"--shape paths:{'[' * 50_000}", "not a list of rank paths"),
        ("--shape dynamic:nodes=0", "nodes of at least 2"),
        ("--shape dynamic:nodes=x", "is not an option of this shape"),
        ("--shape dynamic:nodes=99999999999999", "too large to verify"),
        ("--shape adaptive:mass=nan", "are probabilities"),
        ("--shape optimal:nodes=4000,depth=4000", "at most 512 nodes"),
        ("--shape choices", "give heads"),
        ("--shape cost:curve=1", "is not an option of this shape"),
        ("--drafter foo", "unknown drafter 'foo'"),
        ("--drafter +", "unknown drafter ''"),
        ("--drafter draft_model", "needs draft_model"),
        ("--drafter medusa", "needs heads"),
        ("--drafter eagle", "needs heads"),
        ("--accept foo", "unknown acceptance rule"),
        ("--accept rejection", "use accept='match'"),
        ("--dtype int3", "unknown dtype"),
        ("--quantization int3", "unknown quantization"),
        ("--quantization gguf", "name a model by its .gguf file"),
        ("--device tpu", "device 'tpu' can't be used"),
        ("--device=", "device '' can't be used"),
        ("--threads 0", "'--threads'"),
        ("--threads x", "'--threads'"),
        ("--heads none", "none"),
        ("--heads folder", "folder"),
        ("--heads text", "text"),
        ("--heads broken", "broken"),
        ("-d none/x/y", "there is no folder"),
        ("-d folder", "has no config.json"),
        ("-d broken", "broken"),
    )],
    *[(f"generate a -m {model}", says) for model, says in (
        ("", "requires an argument"),
        ("./none", "there is no folder './none'"),
        ("folder", "has no config.json"),
        ("./text", "'./text' is a file, where a model is"),
        ("./none.gguf", "there is no file './none.gguf'"),
        ("tiny.gguf", "can't load"),
        ("broken", "can't load"),
        (".", "the folder '.' has no config.json"),
        ("/dev/null", "there is no folder '/dev/null'"),
    )],
    ("generate", "missing argument 'prompt' (tokentree generate -h)"),
    ("generate a", "missing option '--model'"),
    (f"generate \xff {MODEL}", "the prompt is not UTF-8 text"),
    (f"generate {'a' * 2000} {MODEL}", "no room for an answer"),
    *[(f"check {MODEL} {option}", says) for option, says in (
        ("", "missing option '--prompts'"),
        ("--prompts none", "can't read the prompt file 'none': No such file"),
        ("--prompts .", "can't read the prompt file '.': Is a directory"),
        ("--prompts bytes", "it is not UTF-8 text"),
        ("--prompts /dev/zero", "it doesn't end within"),
        ("--prompts=", "'--prompts': it is empty: name a file or a folder"),
        ("--prompts empty", "has no prompts"),
        ("--prompts text", "line 1 of 'text' is not JSON"),
        ("--prompts p.jsonl --accept best_path", "changes the output by design"),
        ("--prompts p.jsonl --per-category 0", "'--per-category'"),
        ("--prompts p.jsonl --max-tokens 0", "max_tokens=0"),
        ("--prompts p.jsonl --shape z", "is not a shape"),
    )],
    *[(f"bench {MODEL} {option}", says) for option, says in (
        ("--prompts p.jsonl --method plain", "missing option '--out'"),
        ("--prompts p.jsonl --out new", "missing option '--method'"),
        ("--prompts p.jsonl --method foo --out new", "'foo' is not a method"),
        ("--prompts p.jsonl --method plain --method plain --out new", "given twice"),
        ("--prompts p.jsonl --method ngram:zz --out new", "is not a shape"),
        ("--prompts p.jsonl --method medusa:chain:2 --out new", "needs heads"),
        ("--prompts p.jsonl --method transformers:x --out new", "is not a method"),
        ("--prompts p.jsonl --method transformers:assisted:2 --out new", "needs a draft model"),
        (f"--prompts p.jsonl {RUN} new", "have the id"),
        (f"--prompts p.jsonl --method transformers:lookup:{'9' * 20} --out new", "is not a method"),
        (f"{RUN}=", "'--out': it is empty: name a file or a folder"),
        (f"{RUN} text", "'text' is a file: name a folder"),
        (f"{RUN} text/x", "can't write to the folder"),
        (f"{RUN} /proc/x", "can't write to the folder '/proc/x'"),
        (f"{RUN} /dev/full", "is a file"),
        (f"{RUN} run", "there is a run in 'run'"),
        (f"{RUN} spoilt", "there is a run in 'spoilt'"),
        (f"{RUN} run --resume", "was made with other settings"),
        (f"{RUN} spoilt --resume", "there is no run in 'spoilt/results.json'"),
        (f"{RUN} new --resume", "there is no run in 'new/results.json'"),
        (f"{RUN} new --resume --force", "give one of them"),
        (f"{RUN} new --batch 0", "'--batch'"),
        (f"{RUN} new --heads none", "there is no folder 'none' with heads"),
        (f"{RUN} new --temperature -1", "temperature=-1.0"),
        (f"{RUN} new --warm none", "can't read the prompt file"),
    )],
    *[(f"calibrate {MODEL} {option}", says) for option, says in (
        ("--prompts none", "can't read the prompt file"),
        ("--prompts empty", "has no prompts"),
        ("--plot x", "is no picture's name"),
        ("--plot none/x.png", "there is no folder"),
        ("--max-tokens 0", "max_tokens=0"),
        ("--serving none", "can't read the requests 'none'"),
        ("--serving empty", "has no requests"),
        ("--serving text", "line 1 of 'text' is no chat request"),
        ("--serving-seconds 0", "'--serving-seconds'"),
    )],
    ("report", "missing argument 'folder'"),
    ("report none", "there is no run in 'none/results.json'"),
    ("report folder", "there is no run in 'folder/results.json'"),
    ("report text", "there is no run in 'text/results.json'"),
    ("report spoilt", "there is no run in 'spoilt/results.json'"),
    ("report run --format bmp", "--format is png or svg"),
    ("report run --out=", "'--out': it is empty: name a file or a folder"),
    ("plot speedup run --out=", "'--out': it is empty: name a file or a folder"),
    ("plot foo", "no such command 'foo'"),
    (f"plot tree a {MODEL} --out x", "is no picture's name"),
    (f"plot tree a {MODEL} --out none/x.png", "there is no folder"),
    (f"plot tree \xff {MODEL} --out x.png", "the prompt is not UTF-8 text"),
    (f"plot mask a {MODEL} --out x.png --step 99", "there is no step 99"),
    (f"plot tree a {MODEL} --out x.png --step 0", "'--step'"),
    ("plot speedup none --out x.png", "there is no run in 'none/results.json'"),
    ("plot speedup spoilt --out x.png", "there is no run in 'spoilt/results.json'"),
    ("plot acceptance none --out x.png", "there is no run in 'none/results.json'"),
    ("plot cost -m model --out /proc/x.png", "/proc/x.png"),
    *[(f"theory {option}", says) for option, says in (
        ("--alpha 2", "alpha is a probability"),
        ("--alpha nan", "alpha is a probability"),
        ("--depth 0", "at least 1"),
        ("--branching 0", "at least 1"),
        ("--branching 100 --depth 100", "over a million leaves"),
        (f"--branching 1 --depth {'9' * 8}", "too long to work out"),
        (f"--depth {'9' * 20}", "too long to work out"),
        (f"--branching {'9' * 20}", "over a million leaves"),
        (f"--trials {'9' * 20}", "at most"),
        ("--curve large.json", "1 to 1,000,000 rows"),
        ("--curve below.json", "1 to 1,000,000 rows"),
        ("--curve dear.json", "costs at least 0"),
        ("--curve /dev/zero", "it doesn't end within"),
        ("--ranks a,b", "--ranks takes numbers"),
        ("--ranks=", "--ranks takes numbers"),
        ("--ranks 0.9,0.9", "add up to 1"),
        ("--ranks nan", "are probabilities"),
        ("--curve none", "can't read the cost curve 'none': No such file"),
        ("--curve .", "Is a directory"),
        ("--curve bytes", "it is not UTF-8 text"),
        ("--curve text", "no cost curve"),
        ("--trials 0", "at least 2 trials"),
        ("--seed -1", "'--seed'"),
        ("--draft-cost -1", "at least 0"),
        ("--draft-cost nan", "at least 0"),
    )],
    ("simulate none --curve curve.json", "there is no run in 'none/results.json'"),
    ("simulate run --curve large.json", "1 to 1,000,000 rows"),
    ("simulate run --curve none", "can't read the cost curve"),
    ("simulate run --curve curve.json --drafting nan", "drafting is a factor"),
    ("train foo", "no such command 'foo'"),
    ("train medusa", "missing option '--model'"),
    ("train eagle -m model --data p.jsonl --out h --version 2", "--version is 1"),
    ("train medusa -m model --data self --out h --tokens 0", "'--tokens'"),
    ("train medusa -m model --data /dev/zero --out h", "it doesn't end within"),
    ("train eagle -m model --data self --out=", "'--out': it is empty: name a file or a folder"),
    ("train medusa -m model --data p.jsonl --out h --precision int3", "'--precision'"),
    ("foo", "no such command 'foo' (tokentree -h)"),
    ("--nothing", "no such option: --nothing (tokentree -h)"),
    ("generat a", "did you mean 'generate'"),
]  # fmt: skip


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a model, prompts, a run, and much that is none of these."""
    root = tmp_path_factory.mktemp("place")
    save_model(root / "model", tiny("llama", vocab_size=300), tiny_tokenizer())
    for name in ("folder", "broken", "spoilt", "run"):
        (root / name).mkdir()
    texts = {
        "p.jsonl": '{"prompt": "one two"}\n{"prompt": "three"}\n',
        "empty": "",
        "text": "no JSON",
        "nul": "a\0b",
        "broken/config.json": "{",
        "spoilt/results.json": '{"command": 3}',
        "large.json": '{"rows": [1, 99999999999999999999], "seconds": [1, 2]}',
        "below.json": '{"rows": [0, 2], "seconds": [1, 2]}',
        "dear.json": '{"rows": [1, 2], "seconds": [1, 2], "per_sequence": 1e999}',
        "curve.json": '{"rows": [1, 2], "seconds": [1, 2]}',
    }
    for name, text in texts.items():
        (root / name).write_text(text)
    (root / "bytes").write_bytes(bytes(range(256)))
    (root / "tiny.gguf").write_bytes(b"GGUF" + bytes(36))
    Run(command="", started="", commit=None, versions={}, machine={}, settings={}).save(root / "run")
    return root


def _files(root: Path) -> dict[str, bytes]:
    return {str(file): file.read_bytes() if file.is_file() else b"" for file in root.rglob("*")}


@pytest.mark.parametrize(("line", "says"), USES, ids=lambda part: part[:60])
def test_a_wrong_use_is_one_sentence(
    run: Command,  # noqa: F811
    place: Path,
    monkeypatch: pytest.MonkeyPatch,
    line: str,
    says: str,
) -> None:
    monkeypatch.chdir(place)
    before = _files(place)
    words = line.replace("\xff", os.fsdecode(b"\xff")).split(" ")
    code, out, err = run(*[word for word in words if word])
    assert (code, out) == (2, ""), err
    assert err.startswith("tokentree: ")
    assert err.count("\n") == 1, err
    assert says.casefold() in err.casefold(), err
    assert _files(place) == before


def test_an_argument_may_not_be_empty(run: Command) -> None:  # noqa: F811
    code, out, err = run("report", "")
    assert (code, out) == (2, "")
    assert "folder': it is empty: name a file or a folder" in err.casefold()


def test_a_model_may_be_the_folder_that_the_command_runs_in(
    run: Command,  # noqa: F811
    place: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    given = run("generate", "one", "-m", place / "model", "--max-tokens", 5)
    monkeypatch.chdir(place / "model")
    assert run("generate", "one", "-m", ".", "--max-tokens", 5) == given


def test_a_device_is_refused_in_a_sentence(run: Command, place: Path) -> None:  # noqa: F811
    code, _, err = run("generate", "one", "-m", place / "model", "--device", "mps")
    assert code == 2
    assert "device 'mps' can't be used" in err
    assert len(err) < 250


def test_there_are_many() -> None:
    assert len(USES) > 170


@pytest.mark.parametrize("words", [[], ["train"], ["plot"]])
def test_a_command_of_commands_alone_shows_its_help(run: Command, words: list[str]) -> None:  # noqa: F811
    code, out, err = run(*words)
    assert (code, out) == (2, "")
    assert err.startswith("Usage: tokentree")


def _raises(error: BaseException) -> Callable[..., None]:
    def fail(*_: object, **__: object) -> None:
        raise error

    return fail


@pytest.mark.parametrize(
    ("error", "code", "says"),
    [
        (OSError(28, "No space left on device", "x/y"), 2, "can't read or write 'x/y': No space left on device"),
        (OSError(18, "Invalid cross-device link", "a", None, "b"), 2, "can't read or write 'a' or 'b': Invalid"),
        (PermissionError(13, "Permission denied", b"a\xff"), 2, "can't read or write 'a\\udcff': Permission denied"),
        (OSError("two\nlines"), 2, "can't write: two lines"),
        (UnicodeDecodeError("utf-8", b"\xff", 0, 1, "invalid start byte"), 2, "not UTF-8 text"),
        (MemoryError(), 2, "out of memory"),
        (BrokenPipeError(32, "Broken pipe"), 141, ""),
        (KeyboardInterrupt(), 130, ""),
    ],
)
def test_what_a_machine_refuses_is_one_sentence(
    run: Command,  # noqa: F811
    place: Path,
    monkeypatch: pytest.MonkeyPatch,
    error: BaseException,
    code: int,
    says: str,
) -> None:
    monkeypatch.setattr("tokentree.cli.generate.load", _raises(error))
    found, out, err = run("generate", "a", "-m", place / "model")
    assert (found, out) == (code, "")
    assert says in err
    assert err.count("\n") == (1 if says else 0)


def test_an_error_of_this_program_is_not_hidden(
    run: Command,  # noqa: F811
    place: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("tokentree.cli.generate.load", _raises(AssertionError("a mistake of ours")))
    with pytest.raises(AssertionError, match="a mistake of ours"):
        run("generate", "a", "-m", place / "model")


@pytest.mark.parametrize("cache", ["FILE", "/dev/full", "/proc/x", "/dev/full/x"])
def test_a_cache_that_cannot_be_written_is_no_error(
    run: Command,  # noqa: F811
    place: Path,
    monkeypatch: pytest.MonkeyPatch,
    cache: str,
) -> None:
    monkeypatch.setenv("TOKENTREE_CACHE", str(place / "text") if cache == "FILE" else cache)
    monkeypatch.setattr(sys, "stderr", io.StringIO())
    monkeypatch.setattr("warnings.filters", [])
    code, out, _ = run("generate", "one two", "-m", place / "model", "--max-tokens", 3)
    assert code == 0
    assert out.strip()


@pytest.mark.parametrize(
    ("text", "same"),
    [("one two\n", "one two"), ("one two\r\n", "one two"), ("one two\n\n", "one two\n"), ("one two", "one two")],
)
def test_a_newline_at_the_end_of_standard_input_is_not_part_of_the_prompt(
    run: Command,  # noqa: F811
    place: Path,
    monkeypatch: pytest.MonkeyPatch,
    text: str,
    same: str,
) -> None:
    options = ["-m", place / "model", "--max-tokens", 9, "--json"]
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(text.encode())))
    piped = run("generate", "-", *options)[1]
    given = run("generate", same, *options)[1]
    assert _ids(piped) == _ids(given)
    assert _ids(given) != _ids(run("generate", f"{same}\n", *options)[1])


def _ids(out: str) -> tuple[str, ...]:
    shown = json.loads(out)
    return (shown["metrics"]["prompt_tokens"], *shown["token_ids"])


@pytest.mark.parametrize(
    ("content", "says"),
    [(b"", "is empty"), (b" \n", "is empty"), (b"a\xff", "not UTF-8"), (b"\xed\xa0\xbd", "not UTF-8"), (b"\0", "NUL")],
)
def test_standard_input_that_is_no_text_is_one_sentence(
    run: Command,  # noqa: F811
    place: Path,
    monkeypatch: pytest.MonkeyPatch,
    content: bytes,
    says: str,
) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(content)))
    code, out, err = run("generate", "-", "-m", place / "model")
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert says in err


def test_a_terminal_as_standard_input_is_one_sentence(
    run: Command,  # noqa: F811
    place: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    class Terminal(io.TextIOWrapper):
        def isatty(self) -> bool:
            return True

    monkeypatch.setattr(sys, "stdin", Terminal(io.BytesIO()))
    code, _, err = run("generate", "-", "-m", place / "model")
    assert (code, err.count("\n")) == (2, 1)
    assert "standard input is a terminal" in err
