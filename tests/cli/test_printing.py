"""What the command prints: the text as it is, on standard output, and all else on standard error."""

from __future__ import annotations

import codecs
import json
import os
import pty
import re
import subprocess
import sys
import termios
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from rich.table import Table
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from tests.cli.test_cli import Command, run  # noqa: F401  a fixture
from tests.conftest import all_pairs, by_night
from tests.tiny_models import save_model, tiny
from tokentree.cli import main as cli
from tokentree.cli import terminal
from tokentree.cli.show import comparison
from tokentree.metrics import Metrics

# What formatters change: markup, emoji, links, numbers; what they expand, strip, wrap or end lines at.
ODD = (
    *("[bold]", "[/]", "[/red]", ":smile:", "a[:x:2]", "test:runner:1", "http://a.b", "1.5", "'", "None", "\\[x]"),
    *("\t", "tab\tb", "\r", "\r\n", "\f", "\v", "\b", "\a", "\x1b[31m", "\x1b", "\x9b", "\x85", "\u2028", " ", "  "),
    *("\n", "é", "→", "🏃", "x" * 70, "\u200b"),
)
WORDS = ("one", "two")
GENERATE = ("--temperature", 99, "--seed", 3, "--max-tokens", 200, "--drafter", "recycling", "--shape", "4x2")


@pytest.fixture(scope="module")
def odd(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model that writes all of `ODD`, without a chat template."""
    return _model(tmp_path_factory.mktemp("odd"), ODD)


@pytest.fixture(scope="module")
def calm(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same without what terminals obey."""
    return _model(tmp_path_factory.mktemp("calm"), tuple(token for token in ODD if not terminal.ESCAPES.search(token)))


def _model(folder: Path, tokens: tuple[str, ...]) -> Path:
    vocab = {token: number for number, token in enumerate((*tokens, *WORDS))}
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token="one"))
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.WhitespaceSplit(), decoders.Fuse()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, clean_up_tokenization_spaces=False)
    return save_model(folder, tiny("llama", vocab_size=len(vocab)), fast)


@pytest.fixture(scope="module")
def text(odd: Path) -> str:
    """What the model writes under `GENERATE`."""
    from tokentree import LLM, SamplingParams

    params = SamplingParams(temperature=99, seed=3, max_tokens=200)
    return LLM(odd, "none").generate("one two", params)[0].text


def test_the_text_has_all_that_formatters_change(text: str) -> None:
    missing = [token for token in ODD if token not in text]
    assert len(missing) < 6, missing
    assert not {"[bold]", ":smile:", "\t", "\r", "\f", "\x1b[31m", "\u2028"} & set(missing)


def test_the_text_is_printed_as_it_is(run: Command, odd: Path, text: str) -> None:  # noqa: F811
    code, out, err = run("generate", "one two", "-m", odd, *GENERATE)
    assert (code, out) == (0, text + "\n")
    assert "no chat template" in err
    assert run("generate", "one two", "-m", odd, *GENERATE, "--no-chat")[2] == ""
    shown = json.loads(run("generate", "one two", "-m", odd, *GENERATE, "--json")[1])
    assert shown["text"] + "\n" == out


@pytest.mark.parametrize("more", ["--stats", "--show-tree", "--compare"])
def test_what_is_told_of_it_goes_to_standard_error(
    run: Command,  # noqa: F811
    odd: Path,
    text: str,
    more: str,
) -> None:
    code, out, err = run("generate", "one two", "-m", odd, *GENERATE, more)
    assert (code, out) == (0, text + "\n")
    assert {"--stats": "mean accepted length", "--show-tree": "step 1: ", "--compare": "identical"}[more] in err


def test_trees_are_printed_as_they_are(run: Command, odd: Path) -> None:  # noqa: F811
    words = ["generate", "one two", "-m", odd, "-d", odd, "--shape", "38x1", "--max-tokens", 6, "--no-chat"]
    err = run(*words, "--show-tree")[2]
    for token in ("[bold]", "[/]", "a[:x:2]", "test:runner:1", ":smile:", "tab\tb", "x" * 70):
        assert f"── {token!r}  0." in err or f"── {token!r}  bonus" in err, token
    assert all(ord(character) >= 32 for character in err.replace("\n", ""))  # what isn't printable is spelled out
    assert "probable the drafter" in err


def test_beams_are_printed_as_they_are(run: Command, odd: Path) -> None:  # noqa: F811
    words = ["generate", "one two", "-m", odd, "--num-beams", 30, "--num-return-sequences", 30, "--max-tokens", 2]
    out = run(*words)[1]
    beams = json.loads(run(*words, "--json")[1])["tree"]["beams"]
    assert out == "".join(f"{beam['score']:.4f}  {beam['text']}\n" for beam in beams)
    assert "[" in out
    assert "\t" in out


def test_names_from_files_are_printed_as_they_are(run: Command, odd: Path, tmp_path: Path) -> None:  # noqa: F811
    names = ("[bold]b[/]", ":smile:", "a[:x:2]" + "y" * 150, "1.5", "漢字é")
    prompts = tmp_path / "p [red].jsonl"
    prompts.write_text("".join(json.dumps({"prompt": "one", "id": n, "category": n}) + "\n" for n in names))
    words = ["bench", "-m", odd, "--prompts", prompts, "--out", tmp_path / "o [red]", "--max-tokens", 3]
    code, out, err = run(*words, "--method", "plain", "--method", "ngram:paths:[[0],[1]]")
    assert (code, err) == (0, "")
    for shown in (*names, "ngram:paths:[[0],[1]]", f"{tmp_path}/o [red]/results.json"):
        assert shown in out, shown


def test_what_a_terminal_would_obey_in_a_name_is_spelled(run: Command, odd: Path, tmp_path: Path) -> None:  # noqa: F811
    name = "a\x1b[2J\rb\n\tc\u202e"
    prompts = tmp_path / "p.jsonl"
    prompts.write_text(json.dumps({"prompt": "one", "id": name, "category": name}) + "\n")
    words = ["bench", "-m", odd, "--prompts", prompts, "--out", tmp_path / "o", "--max-tokens", 3]
    out = run(*words, "--method", "plain", "--method", "ngram:2x2")[1]
    assert "a\\x1b[2J\\rb\\n\\tc\\u202e\n" in out
    assert not set(out) & {"\x1b", "\r", "\t", "\u202e"}


@pytest.mark.parametrize("name", ["a  b", "a\tb", "a\nb"])
def test_a_mistake_names_a_path_as_it_is(run: Command, name: str) -> None:  # noqa: F811
    assert f"can't read the prompt file {name!r}" in run("check", "-m", "m", "--prompts", name)[2]


# -- terminals --------------------------------------------------------------------------------------------------------


@contextmanager
def screen(monkeypatch: pytest.MonkeyPatch, columns: int, **environment: str) -> Iterator[Callable[[], str]]:
    """Puts a terminal in the place of both standard streams; gives what was written to it, once it is asked."""
    for name in ("NO_COLOR", "FORCE_COLOR"):
        monkeypatch.delenv(name, raising=False)
    for name, value in {"TERM": "xterm", "COLUMNS": str(columns)}.items() | environment.items():
        monkeypatch.setenv(name, value)
    master, slave = pty.openpty()
    modes = termios.tcgetattr(slave)
    modes[1] &= ~termios.OPOST  # newlines stay what they are
    termios.tcsetattr(slave, termios.TCSANOW, modes)
    seen = list[bytes]()

    def read() -> None:
        with open(master, "rb", buffering=0) as file:
            try:
                while part := file.read(4096):
                    seen.append(part)
            except OSError:  # the other end was closed
                return

    reader = threading.Thread(target=read)
    reader.start()
    stream = open(slave, "w", encoding="utf-8")  # noqa: SIM115  closed below
    with monkeypatch.context() as patch:
        patch.setattr(sys, "stdout", stream)
        patch.setattr(sys, "stderr", stream)

        def shown() -> str:
            stream.close()
            reader.join()
            return b"".join(seen).decode()

        yield shown


def _main(monkeypatch: pytest.MonkeyPatch, *words: object) -> None:
    monkeypatch.setattr(sys, "argv", ["tokentree", *map(str, words)])
    with pytest.raises(SystemExit):
        cli.main()


PLAIN = [{"NO_COLOR": "1"}, {"TERM": "dumb"}]


@pytest.mark.parametrize(("environment", "columns"), all_pairs([{}, *PLAIN], [20, 200]), ids=str)
def test_a_terminal_shows_the_text_whatever_its_width(
    monkeypatch: pytest.MonkeyPatch, odd: Path, text: str, environment: dict[str, str], columns: int
) -> None:
    # nothing that is coloured may stand behind an escape of the model's own
    words = ["generate", "one two", "-m", odd, *GENERATE, "--no-chat"]
    with screen(monkeypatch, columns, **environment) as shown:
        _main(monkeypatch, *words)
        seen = shown()
    seen = seen[seen.rindex("\x1b[?25h") + 6 :].removeprefix("\r\x1b[1A\x1b[2K") if "\x1b[?25h" in seen else seen
    assert text in seen.replace("\x1b[32m", "").replace("\x1b[0m", "")
    before = min(text.index(mark) for mark in ("\x1b", "\x9b", "\x85") if mark in text)
    assert text[before:] + "\n" in seen
    if environment in PLAIN:
        assert "\x1b[32m" not in seen


def test_a_file_is_no_terminal_whatever_variables_say(
    run: Command,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
    odd: Path,
    text: str,
) -> None:
    for name in ("FORCE_COLOR", "TTY_COMPATIBLE", "CLICOLOR_FORCE"):
        monkeypatch.setenv(name, "1")
    assert run("generate", "one two", "-m", odd, *GENERATE, "--no-chat", "--stats")[1] == text + "\n"
    err = run("generate", "one two", "-m", odd, *GENERATE, "--no-chat", "--stats")[2]
    assert "mean accepted length" in err
    assert "\x1b" not in err


@pytest.mark.parametrize("columns", [20, 40, 60, 80, 100, 200])
def test_no_width_cuts_a_table(monkeypatch: pytest.MonkeyPatch, columns: int) -> None:
    numbers = [[f"{10.0**row + column:.1f}" for column in range(8)] for row in range(5)]
    table = Table(title="a title that is much longer than twenty characters", caption="a caption, likewise")
    for name in ("method", *"abcdefg", "h" * 20):
        table.add_column(name, justify="right", overflow="fold" if name == "method" else "ellipsis")
    for row, cells in enumerate(numbers):
        table.add_row(f"a-method-with-a-long-name-{row}", *cells)
    with screen(monkeypatch, columns) as shown:
        terminal.show(terminal.consoles()[0], table)
        seen = shown()
    assert table.columns[0].header == "method"
    assert "a title that is much longer than twenty characters" in seen
    assert "a caption, likewise" in seen
    assert "…" not in seen
    assert [cell for cells in numbers for cell in cells if cell not in seen] == []
    lines = [line for line in seen.splitlines() if "│" in line]
    assert bool(lines) == (columns > 80)
    assert all(len(re.sub("\x1b\\[[0-9;]*m", "", line)) <= columns for line in lines)


def test_green_is_what_was_drafted_and_is_explained(
    monkeypatch: pytest.MonkeyPatch, calm: Path, run: Command  # noqa: F811
) -> None:  # fmt: skip
    monkeypatch.setattr(terminal, "coloured", lambda stream: True)
    monkeypatch.setattr("tokentree.cli.show.coloured", lambda stream: True)
    words = ["generate", "one two", "-m", calm, "--max-tokens", 40, "--no-chat"]
    code, out, err = run(*words, "-d", calm, "--shape", "2x2")
    shown = json.loads(run(*words, "-d", calm, "--shape", "2x2", "--json")[1])
    assert code == 0
    assert out.count("\x1b[32m") == shown["metrics"]["accepted_tokens"] > 0
    assert out.replace("\x1b[32m", "").replace("\x1b[0m", "") == shown["text"] + "\n"
    assert "tokens that were drafted, and confirmed by the model" in err
    assert "\x1b[32m" not in run(*words, "--drafter", "none")[1]


# -- encodings, and streams that are closed or full -------------------------------------------------------------------


def _shell(line: str, **names: str) -> subprocess.CompletedProcess[bytes]:
    line = re.sub(r"\btokentree (?=[a-z-])", f"{sys.executable} -m tokentree ", line)
    own = ("PYTHONIOENCODING", "PYTHONUTF8", "LC_ALL", "LANG")
    environment = {name: value for name, value in os.environ.items() if name not in own} | names
    return subprocess.run(["bash", "-c", line], capture_output=True, env=environment, check=False)


@pytest.mark.parametrize(
    ("encoding", "as_json"), all_pairs(["cp1252", "ascii", "latin-1", "utf-16", "shift-jis"], [False, True])
)
def test_what_an_encoding_lacks_is_escaped(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, odd: Path, text: str, encoding: str, as_json: bool
) -> None:
    out, err = (tmp_path / name for name in ("out", "err"))
    with monkeypatch.context() as patch, out.open("w", encoding=encoding) as o, err.open("w", encoding=encoding) as e:
        patch.setattr(sys, "stdout", o)
        patch.setattr(sys, "stderr", e)
        words = ["--json"] if as_json else ["--show-tree", "--stats"]
        _main(monkeypatch, "generate", "one two", "-m", odd, *GENERATE, *words)
    written = out.read_bytes().decode(encoding)
    err.read_bytes().decode(encoding)
    if as_json:
        assert json.loads(written)["text"] == text
    else:
        assert written == codecs.decode(codecs.encode(text + "\n", encoding, "backslashreplace"), encoding)


def test_a_text_with_half_a_pair_of_surrogates_is_valid_json(capsys: pytest.CaptureFixture[str]) -> None:
    terminal.write_json({"text": "a\ud83d→", "score": float("-inf"), "more": (1.5, float("nan"))})
    assert json.loads(capsys.readouterr().out) == {"text": "a\ud83d→", "score": None, "more": [1.5, None]}


ENCODINGS = [{"PYTHONIOENCODING": "cp1252"}, {"LC_ALL": "C", "PYTHONCOERCECLOCALE": "0"}]


@pytest.mark.parametrize("names", by_night(ENCODINGS, but=ENCODINGS[:1]))
def test_a_process_in_another_encoding_ends_well(names: dict[str, str]) -> None:
    done = _shell("tokentree theory --trials 50 && tokentree generate -h", PYTHONUTF8="0", **names)
    assert done.returncode == 0
    assert done.stderr == b""
    assert b"tree, 2 children" in done.stdout


@pytest.mark.parametrize(
    ("line", "code", "says"),
    [
        ("tokentree --help >&-", 2, "tokentree: standard output is closed: there is nowhere to print to\n"),
        ("tokentree --help >/dev/full", 2, "tokentree: can't write: No space left on device\n"),
        ("tokentree --version >/dev/full", 2, "tokentree: can't write: No space left on device\n"),
        ("tokentree --version 2>&-", 0, ""),
        ("tokentree --nothing 2>&-", 2, ""),
        ("tokentree --nothing 2>/dev/full", 2, ""),
        ("tokentree --version | true; exit ${PIPESTATUS[0]}", 141, ""),
        ("tokentree --help 2>&1 | true; exit ${PIPESTATUS[0]}", 141, ""),
        ("tokentree generate - -m x <&-", 2, "tokentree: can't read standard input: it is closed\n"),
        ("tokentree generate - -m x </dev/null", 2, "tokentree: the prompt is empty: give at least one token\n"),
        ("printf '\\xff' | tokentree generate - -m x", 2, "tokentree: can't read standard input: it is not UTF-8 text"),
        ("head -c 9 /dev/zero | tokentree generate - -m x", 2, "it has NUL bytes, so it is not text\n"),
        ("tokentree generate $'a\\xff' -m x", 2, "the prompt is not UTF-8 text: it has '\\udcff' at character 1"),
    ],
)
def test_a_stream_that_is_closed_or_full_is_one_sentence_or_none(line: str, code: int, says: str) -> None:
    done = _shell(line)
    err = done.stderr.decode()
    assert done.returncode == code, err
    assert says in err
    assert err.count("\n") == (1 if says else 0), err


# -- what is said of a comparison -------------------------------------------------------------------------------------


def test_no_speed_is_claimed_where_no_forward_was_saved(run: Command, odd: Path) -> None:  # noqa: F811
    words = ["generate", "one two", "-m", odd, "--max-tokens", 30, "--compare"]
    err = run(*words, "--drafter", "none")[2]
    assert "identical: all 30 token ids are those of plain decoding; 30 forwards instead of 30, too few saved" in err
    assert "the speed of plain" not in err


def test_a_speed_says_how_it_was_timed() -> None:
    from tokentree.llm import Result

    def result(forwards: int, seconds: float) -> Result:
        metrics = Metrics(new_tokens=30, target_forwards=forwards, decode_seconds=seconds)
        return Result("", [1] * 30, "length", None, metrics, [1])

    told = comparison(result(15, 1.0), result(30, 2.0))
    assert "15 forwards instead of 30; 2.00x the speed of plain (decoding alone, each timed once" in told
    for forwards in (28, 30):
        assert "too few saved for a speed that one run could tell" in comparison(result(forwards, 1.0), result(30, 2.0))


def test_memory_is_written_after_beams_too(run: Command, odd: Path, tmp_path: Path) -> None:  # noqa: F811
    words = ["generate", "one two", "-m", odd, "--num-beams", 2, "--max-tokens", 5, "--drafter", "suffix"]
    assert run(*words, "--memory", tmp_path / "m")[0] == 0
    assert (tmp_path / "m" / "suffix.safetensors").is_file()
