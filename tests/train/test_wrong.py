"""What is wrong with a training is told in one sentence, and nothing that was there is lost."""

from __future__ import annotations

import json
import math
import os
import resource
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from tests.conftest import by_night
from tests.tiny_models import save_model, some_tokens, tiny, tiny_tokenizer
from tokentree import LLM
from tokentree.cli.main import app
from tokentree.errors import OptionError, PairingError, PromptError, TokenTreeError
from tokentree.train import job
from tokentree.train.features import keep_features
from tokentree.train.keeping import keep_state, keep_tensors, keep_text, kept_state
from tokentree.train.loop import CHECKPOINT, Recipe
from tokentree.train.run import train_medusa
from tokentree.train.run_eagle import train_eagle
from tokentree.train.target import engine_of
from tokentree.train.texts import Text, read_texts
from tokentree.train.written import Kept

TEXT = {"text": "The quick brown fox jumps over the lazy dog."}
GOOD = "".join(json.dumps(TEXT | {"n": n}) + "\n" for n in range(12))


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("base"), tiny("llama", vocab_size=300), tiny_tokenizer())


def llm() -> LLM:
    return LLM(tiny("llama", vocab_size=300), tokenizer=tiny_tokenizer(), max_batch=4)


# -- data --------------------------------------------------------------------------------------------------------------

DATA = {
    "missing": (None, "can't read the training data"),
    "empty": (b"", "it is empty"),
    "lines without anything": (b"\n \n\r\n", "it is empty"),
    "binary": (bytes(range(256)) * 20, "it is not UTF-8 text"),
    "no JSON": (b"one\ntwo\n", "line 1 is not JSON, and 1 more lines are no texts"),
    "a number too long": (b"1" * 5000, "line 1 is not JSON"),
    "nested too deep": (b"[" * 100_000, "line 1 is not JSON"),
    "half a character": (rb'{"text": "a tree \ud83d and a long word"}', "half a character"),
    "no text": (b'{"question": 1}\n', 'has neither "text"'),
    "a role that is no text": (b'{"messages": [{"role": ["user"], "content": "a"}]}', "without a known role"),
    "too short": (b'{"text": "a"}\n{"text": ""}\n', "line 1 has fewer than 8 tokens"),
    "one text": (json.dumps(TEXT).encode(), "has one text"),
}


@pytest.mark.parametrize("kind", DATA)
def test_data_that_is_none_is_told_in_one_sentence(kind: str, base: Path, tmp_path: Path) -> None:
    content, message = DATA[kind]
    if content is not None:
        (tmp_path / "data").write_bytes(content)
    with pytest.raises(PromptError, match=message):
        read_texts(tmp_path / "data", tiny_tokenizer())
    args = ["train", "eagle", "-m", str(base), "--data", str(tmp_path / "data"), "--out", str(tmp_path / "out")]
    result = CliRunner().invoke(app, args)
    assert isinstance(result.exception, TokenTreeError)
    assert "\n" not in str(result.exception)


def test_a_folder_is_no_data(tmp_path: Path) -> None:
    with pytest.raises(PromptError, match="Is a directory"):
        read_texts(tmp_path, tiny_tokenizer())


def test_lines_end_at_line_feeds_alone(tmp_path: Path) -> None:
    texts = [f"a tree{mark}and an owl, word by word {n}" for n in range(2) for mark in "\u2028\u2029\x85\x0b\x1c"]
    lines = "\r\n".join(json.dumps({"text": text}, ensure_ascii=False) for text in texts)
    (tmp_path / "data").write_bytes(b"\xef\xbb\xbf" + lines.encode())
    found = read_texts(tmp_path / "data", tiny_tokenizer())
    assert not found.bad
    assert found.ids == [tiny_tokenizer()(text).input_ids for text in texts]


def test_what_a_chat_template_refuses_is_a_line_left_out(tmp_path: Path) -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = (
        "{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('no system here') }}{% endif %}"
        "{{ m.content }}{% endfor %}"
    )
    chat = {"messages": [{"role": "system", "content": "be kind"}, {"role": "user", "content": TEXT["text"]}]}
    (tmp_path / "data").write_text(GOOD + json.dumps(chat) + "\n")
    assert read_texts(tmp_path / "data", tokenizer).bad == [
        "line 13 is a conversation that the chat template refuses: no system here"
    ]


def test_tokens_that_the_model_does_not_know_are_left_out(tmp_path: Path) -> None:
    (tmp_path / "data").write_text(GOOD)
    most = max(tiny_tokenizer()(TEXT["text"]).input_ids)
    assert not read_texts(tmp_path / "data", tiny_tokenizer(), vocab_size=most + 1).bad
    with pytest.raises(PromptError, match="line 1 has a token that the model doesn't know"):
        read_texts(tmp_path / "data", tiny_tokenizer(), vocab_size=most)


# -- numbers -----------------------------------------------------------------------------------------------------------

NUMBERS: list[tuple[str, dict[str, Any], str]] = [
    ("eagle", {"tokens": 0}, "tokens must be at least 1"),
    ("medusa", {"tokens": -5}, "tokens must be at least 1"),
    ("eagle", {"tokens": 10**18}, "GB free: ask for fewer tokens"),
    ("medusa", {"tokens": 10**30}, "GB free: ask for fewer tokens"),
    ("eagle", {"known_tokens": 0}, "known_tokens must be at least 1"),
    ("eagle", {"unroll": 10**9}, "farther than a text of this model"),
    ("eagle", {"taps": [0, 1, 9]}, "has hidden states 0 to 2"),
    ("medusa", {"num_heads": 0}, "num_heads must be at least 1"),
    ("medusa", {"num_heads": 400}, "look farther ahead than a text"),
    ("medusa", {"num_layers": 10**9}, "GB to be trained"),
    ("eagle", {"held_back": math.nan}, "share of the texts"),
]


@pytest.mark.parametrize(("kind", "options", "message"), NUMBERS)
def test_numbers_that_make_no_sense_are_told(
    kind: str, options: dict[str, Any], message: str, tmp_path: Path
) -> None:  # fmt: skip
    trains: Any = train_eagle if kind == "eagle" else train_medusa
    with pytest.raises((OptionError, PairingError), match=message):
        trains(llm(), "tiny", "self", tmp_path, **{"tokens": 100} | options)


@pytest.mark.parametrize(
    "options",
    [
        {"epochs": 0}, {"epochs": 10**9}, {"batch_size": 0}, {"learning_rate": math.nan}, {"learning_rate": math.inf},
        {"learning_rate": -1}, {"learning_rate": 0}, {"warmup_steps": -1}, {"seed": -1}, {"seed": 2**70},
        {"evaluate_every": 0}, {"patience": 0}, {"precision": "int8"}, {"max_norm": math.nan}, {"steps": 3},
    ],
)  # fmt: skip
def test_recipes_that_make_no_sense_are_told(options: dict[str, Any]) -> None:
    with pytest.raises(OptionError, match=f"^{next(iter(options))}="):
        Recipe(**options)


@pytest.mark.parametrize("more", [["--learning-rate", "nan"], ["--learning-rate", "inf"], ["--epochs", "0"],
                                  ["--epochs", "1000000000"], ["--tokens", "0"], ["--version", "2"]])  # fmt: skip
def test_the_command_tells_them_too(more: list[str], base: Path, tmp_path: Path) -> None:
    args = [
        "train",
        "eagle",
        "-m",
        str(base),
        "--data",
        "self",
        "--tokens",
        "50",
        "--out",
        str(tmp_path / "out"),
        *more,
    ]
    result = CliRunner().invoke(app, args)
    assert isinstance(result.exception, TokenTreeError) or result.exit_code == 2


def test_a_model_with_few_layers_has_hidden_states_for_a_head(tmp_path: Path) -> None:
    options: dict[str, Any] = {"known_tokens": 200, "unroll": 1, "tokens": 50}
    train_eagle(llm(), "tiny", "self", tmp_path, Recipe(batch_size=1), **options)
    assert LLM(tiny("llama", vocab_size=300), "eagle", heads=tmp_path, tokenizer=tiny_tokenizer()).generate([1])


# -- folders -----------------------------------------------------------------------------------------------------------


def test_a_file_is_no_folder_for_heads(base: Path, tmp_path: Path) -> None:
    (tmp_path / "out").write_text("mine")
    for out in (tmp_path / "out", tmp_path / "out" / "deeper"):
        with pytest.raises(OptionError, match=r"name a folder|can't write"):
            job.check_folder(out)
    with pytest.raises(OptionError, match="can't write"):
        job.check_folder(Path("/proc/heads"))
    assert (tmp_path / "out").read_text() == "mine"


FILES = ["config.json", "README.md", "model.safetensors", "medusa_lm_head.pt"]


@pytest.mark.parametrize("name", by_night(FILES, but=FILES[:1]))
def test_what_a_folder_holds_is_not_replaced(name: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text("mine")
    with pytest.raises(OptionError, match=f"holds {name} already"):
        train_medusa(llm(), "tiny", "self", tmp_path, Recipe(), num_heads=1, tokens=50)
    assert (tmp_path / name).read_text() == "mine"
    assert [file.name for file in tmp_path.iterdir()] == [name]
    train_medusa(llm(), "tiny", "self", tmp_path, Recipe(epochs=1), num_heads=1, tokens=50, force=True)
    assert name == "medusa_lm_head.pt" or (tmp_path / name).read_bytes() != b"mine"


def test_settings_may_change_while_nothing_is_trained(tmp_path: Path) -> None:
    with pytest.raises(OptionError, match="GB free"):
        train_medusa(llm(), "tiny", "self", tmp_path, Recipe(), num_heads=1, tokens=10**18)
    assert train_medusa(llm(), "tiny", "self", tmp_path, Recipe(), num_heads=1, tokens=50).texts.tokens >= 50


# -- damage ------------------------------------------------------------------------------------------------------------


def test_a_damaged_checkpoint_is_told(tmp_path: Path) -> None:
    options: dict[str, Any] = {"num_heads": 1, "tokens": 50}
    train_medusa(llm(), "tiny", "self", tmp_path, Recipe(), **options)
    file = tmp_path / "work" / CHECKPOINT
    whole = file.read_bytes()
    weight = torch.load(file, weights_only=True)["model"]["heads.weight"].numpy().tobytes()
    flipped = bytearray(whole)
    flipped[whole.index(weight) + 5] ^= 1
    for content in (b"", b"nonsense", whole[:-100], whole[: len(whole) // 2], bytes(flipped)):
        file.write_bytes(content)
        with pytest.raises(OptionError, match="is damaged: remove it"):
            train_medusa(llm(), "tiny", "self", tmp_path, Recipe(), **options)
    file.unlink()
    train_medusa(llm(), "tiny", "self", tmp_path, Recipe(), **options)


def test_damaged_hidden_states_are_computed_again(tmp_path: Path) -> None:
    model, texts = llm(), [some_tokens(9, seed=n) for n in range(20)]
    engine_of(model).capture()
    whole = keep_features(engine_of(model), texts, tmp_path, [2]).hidden
    for file in sorted(tmp_path.rglob("*.safetensors")):
        content = file.read_bytes()
        for at in (0, 9, len(content) // 2, len(content) - 3):
            flipped = bytearray(content)
            flipped[at] ^= 1
            file.write_bytes(flipped)
            assert torch.equal(keep_features(engine_of(model), texts, tmp_path, [2]).hidden, whole)
        file.write_bytes(content[:-50])
        assert torch.equal(keep_features(engine_of(model), texts, tmp_path, [2]).hidden, whole)


# -- a disk that is full -----------------------------------------------------------------------------------------------


@contextmanager
def no_room() -> Iterator[None]:
    """Files may not grow beyond a hundred bytes: the system then says so as of a full disk. Not for a whole test,
    since what it prints may go to a file."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_what_cannot_be_written_is_told_and_what_was_there_stays(tmp_path: Path) -> None:
    writes: dict[str, Callable[[Path], None]] = {
        "text": lambda file: keep_text(file, "x" * 1000),
        "tensors": lambda file: keep_tensors(file, {"x": torch.zeros(1000)}),
        "state": lambda file: keep_state(file, {"x": torch.zeros(1000)}),
    }
    for name, write in writes.items():
        file = tmp_path / name
        file.write_text("before")
        with no_room(), pytest.raises(OptionError, match="File too large"):
            write(file)
        assert file.read_text() == "before"
    assert len(list(tmp_path.iterdir())) == 3
    assert kept_state(tmp_path / "text") is None
    kept = Kept(tmp_path / "texts.jsonl", 0, 300)
    with no_room(), pytest.raises(OptionError, match="File too large"):
        kept.add({0: [Text([1] * 100)]})


@pytest.mark.skipif(os.geteuid() != 0 or sys.platform != "linux", reason="mounts a small file system")
@pytest.mark.parametrize("size", [16, 200])
def test_a_full_disk_is_told_in_one_sentence(size: int, base: Path, tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}k", "tmpfs", str(disk)], check=False).returncode:
        pytest.skip("file systems can't be mounted here")
    try:
        with pytest.raises(TokenTreeError, match=r"No space left on device|GB free"):
            train_medusa(llm(), "tiny", "self", disk / "out", Recipe(batch_size=32), num_heads=8, tokens=100)
        assert not (disk / "out" / "model.safetensors").exists()
    finally:
        subprocess.run(["umount", str(disk)], check=True)
