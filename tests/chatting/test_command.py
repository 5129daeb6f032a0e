"""`tokentree chat`, as a user types it."""

from __future__ import annotations

import io
import json
import os
import pty
import re
import select
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.cli.test_cli import Command, folder, run  # noqa: F401  fixtures
from tests.forked import Forked
from tests.serve.serving import serving, tiny_llm
from tests.tiny_models import save_model, tiny, tiny_tokenizer
from tokentree import LLM, SamplingParams
from tokentree.chatting import terminal
from tokentree.chatting.session import Session

SLOWLY = """
import sys, time
from tokentree.__main__ import start
from tokentree.decoder import Decoder
step = Decoder.step
def slow(*args):
    time.sleep(0.05)
    step(*args)
    if sys.stderr.isatty():
        print("<step>", file=sys.stderr, flush=True)
Decoder.step = slow
start()
"""


@pytest.fixture
def lines(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"one two\nthree\n")))


@pytest.mark.usefixtures("lines")
def test_a_pipe_is_answered_line_by_line(
    run: Command,  # noqa: F811
    folder: Path,  # noqa: F811
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    sessions, answer_lines = list[Session](), terminal.pipe

    async def pipe(session: Session) -> None:
        sessions.append(session)
        await answer_lines(session)

    monkeypatch.setattr("tokentree.chatting.terminal.pipe", pipe)
    words = ["--max-tokens", 9, "--drafter", "suffix", "--shape", "2x1", "--memory", tmp_path / "memory"]
    code, out, err = run("chat", "-m", folder, *words, "--system", "be very very very short")
    llm, params = LLM(folder, "none"), SamplingParams(max_tokens=9)
    messages = [{"role": "system", "content": "be very very very short"}, {"role": "user", "content": "one two"}]
    first = llm.chat(messages, params).text
    messages += [{"role": "assistant", "content": first}, {"role": "user", "content": "three"}]
    assert (code, out) == (0, f"{first}\n{llm.chat(messages, params).text}\n")
    assert err == ""
    assert (tmp_path / "memory" / "suffix.safetensors").is_file()
    assert (sessions[0].figures[1].reused_tokens or 0) >= 16


@pytest.mark.usefixtures("lines")
def test_a_server_answers_line_by_line(run: Command, tmp_path: Path) -> None:  # noqa: F811
    key = tmp_path / "key"
    key.write_text("# of the server\nsecret\n")
    llm = tiny_llm()
    with serving(llm, keys=("secret",)) as server:
        words = ["--max-tokens", 9, "--temperature", 0, "--model", "tiny"]
        code, out, err = run("chat", "--url", server.url, "--api-key-file", key, *words)
        first = llm.chat([{"role": "user", "content": "one two"}], SamplingParams(max_tokens=9)).text
        assert (code, err) == (0, "")
        assert out.startswith(f"{first}\n")
        key.write_text("wrong\n")
        code, out, err = run("chat", "--url", server.url, "--api-key-file", key, *words)
        assert (code, out, err.count("\n")) == (2, "", 1)
        assert err.startswith("tokentree: the server refuses (status 401): ")


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ([], "there is nobody to chat with"),
        (["-m", "FOLDER", "--temperature", "-1"], "temperature=-1.0"),
        (["-m", "FOLDER", "--api-key-file", "FILE"], "--api-key-file goes with --url"),
        (["-m", "FOLDER", "--depth", "2", "--shape", "2x2"], "give one of them"),
        (["-m", "FOLDER", "--drafter", "foo"], "unknown drafter 'foo'"),
        (["-m", "./none"], "there is no folder"),
        (["-m", "FOLDER", "--memory", "FILE"], "is a file: name a folder"),
        (["--url", "nowhere"], "is no address of a server"),
        (["--url", "http://127.0.0.1:9"], "can't reach the server"),
        (["--url", "http://127.0.0.1:9", "--heads", "FOLDER", "--depth", "2"], "and --heads, --depth is for a model"),
        (["--url", "http://127.0.0.1:9", "--accept", "typical"], "and --accept is for a model here"),
        (["--url", "http://127.0.0.1:9", "--api-key-file", "FILE"], "there is no key in"),
        (["--url", "http://127.0.0.1:9", "--top-p", "2"], "top_p=2.0"),
    ],
)
def test_a_mistake_is_one_sentence_and_status_2(
    run: Command,  # noqa: F811
    folder: Path,  # noqa: F811
    tmp_path: Path,
    words: list[str],
    says: str,
) -> None:
    (tmp_path / "file").write_text("# no key\n")
    stand_ins = {"FOLDER": str(folder), "FILE": str(tmp_path / "file")}
    code, out, err = run("chat", *[stand_ins.get(word, word) for word in words])
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert says in err


def test_a_model_without_a_chat_template_is_one_sentence(run: Command, tmp_path: Path) -> None:  # noqa: F811
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = None
    save_model(tmp_path, tiny("llama", vocab_size=300), tokenizer)
    code, out, err = run("chat", "-m", tmp_path)
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert "no chat template" in err


@pytest.mark.parametrize("package", ["prompt_toolkit", "httpx"])
def test_without_the_extra_it_is_one_sentence(
    run: Command, folder: Path, monkeypatch: pytest.MonkeyPatch, package: str  # noqa: F811
) -> None:  # fmt: skip
    monkeypatch.setitem(sys.modules, package, None)
    code, out, err = run("chat", "-m", folder)
    assert (code, out) == (2, "")
    assert err == f"tokentree: chatting needs {package}: pip install 'tokentree[chat]'\n"


class Terminal:
    """A process in a terminal of its own."""

    def __init__(self, *words: object) -> None:
        self._end, theirs = pty.openpty()
        begin, env = [sys.executable, *map(str, words)], os.environ | {"TERM": "xterm"}
        self._process = Forked(begin, env=env, stdin=theirs, stdout=theirs, stderr=theirs)
        os.close(theirs)
        self.seen = ""

    def wait(self, text: str, seconds: float = 120) -> None:
        """Waits until ``text`` came, behind what was waited for before."""
        end = time.monotonic() + seconds
        while text not in self.seen:
            assert time.monotonic() < end, self.seen
            assert self._read(), self.seen
        self.seen = self.seen.partition(text)[2]

    def _read(self) -> bool:
        if not select.select([self._end], [], [], 1)[0]:
            return True
        try:
            part = os.read(self._end, 4096)
        except OSError:  # the process has ended
            return False
        self.seen += part.decode(errors="replace")
        if "\x1b[6n" in self.seen:  # it asks where the cursor is
            self.press("\x1b[1;1R")
        self.seen = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", self.seen)  # colours and movements
        return bool(part)

    def press(self, keys: str) -> None:
        os.write(self._end, keys.encode())

    def status(self) -> int:
        while self._read():
            pass
        os.close(self._end)
        code: int = self._process.wait(60)
        return code


def test_ctrl_c_in_a_terminal_stops_the_answer_and_ctrl_d_ends_the_chat(folder: Path, tmp_path: Path) -> None:  # noqa: F811
    file = tmp_path / "chat.json"
    process = Terminal("-c", SLOWLY, "chat", "-m", folder, "--drafter", "ngram", "--threads", 1)
    process.wait("Ctrl-D ends the chat")
    for question in ("one two three", "four"):
        process.wait(">")
        process.press(f"{question}\r")
        for _ in range(5):  # the whole answer takes hundreds
            process.wait("<step>")
        process.press("\x03")
        process.wait("stopped: what is written stays in the conversation")
    process.wait(">")
    process.press(f"/save {file}\r")
    process.wait("4 messages in ")
    process.wait(">")
    process.press("\x04")
    assert process.status() == 0
    assert "Traceback" not in process.seen
    messages = json.loads(file.read_text("utf-8"))
    assert [message["role"] for message in messages] == ["user", "assistant"] * 2
    assert messages[2]["content"] == "four"
    whole = LLM(folder, "none").chat(messages[:1], SamplingParams(max_tokens=200)).text
    assert whole.startswith(messages[1]["content"].rstrip("\ufffd"))


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_a_chat_through_a_pipe(folder: Path, number: signal.Signals) -> None:  # noqa: F811
    words = [sys.executable, "-c", SLOWLY, "chat", "-m", str(folder), "--drafter", "none", "--threads", "1"]
    with Forked(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        process.stdin.write(b"one two three\n")
        process.stdin.flush()
        assert process.stdout.read(1)
        process.send_signal(number)
        _, err = process.communicate(timeout=120)
    assert (process.returncode, err) == (128 + number, b"")
