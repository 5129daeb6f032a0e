"""A chat in a terminal, and through pipes."""

from __future__ import annotations

import asyncio
import io
import os
import signal
import stat
import sys
import time
from collections.abc import AsyncGenerator, Sequence
from pathlib import Path
from typing import Any

import pytest
from prompt_toolkit.input import create_pipe_input
from prompt_toolkit.output import DummyOutput

from tests.chatting.talks import ByHeart
from tokentree import OptionError
from tokentree.chat import Message
from tokentree.chatting import terminal
from tokentree.chatting.answers import Figures, Part
from tokentree.chatting.remote import RemoteError
from tokentree.chatting.session import Session
from tokentree.chatting.terminal import converse, pipe
from tokentree.cli.terminal import harmless

ENTER, NEW_LINE, UP, TAB, END, STOP = "\r", "\x1b\r", "\x1b[A", "\t", "\x04", "\x03"


def chat(session: Session, *keys: str, history: Path | None = None) -> None:
    """A chat in which these keys are pressed; the terminal is ended behind them."""
    with create_pipe_input() as keyboard:
        keyboard.send_text("".join(keys))
        asyncio.run(asyncio.wait_for(converse(session, history, keyboard, DummyOutput()), 30))


async def _typed(session: Session, steps: list[tuple[str, str | None]]) -> None:
    with create_pipe_input() as keyboard:
        prompt = terminal.prompt_of(None, keyboard, DummyOutput())
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(terminal, "prompt_of", lambda *_: prompt)
            talk = asyncio.create_task(converse(session))
            for keys, seen in steps:
                pressed = time.monotonic()
                keyboard.send_text(keys)
                while seen is not None and prompt.default_buffer.text != seen:
                    await asyncio.sleep(0.01)
                    if time.monotonic() > pressed + 1:  # what was typed before is read beside the first key
                        pressed = time.monotonic()
                        keyboard.send_text(keys)
            await talk


def typing(session: Session, *steps: tuple[str, str | None]) -> None:
    """As `chat`, by somebody who waits until a line looks as it should; with None, for nothing."""
    asyncio.run(asyncio.wait_for(_typed(session, list(steps)), 30))


def asked(session: Session) -> list[str]:
    return [message["content"] for message in session.messages if message["role"] == "user"]


Captured = pytest.CaptureFixture[str]


def test_what_is_typed_is_answered(capsys: Captured) -> None:
    session = Session(ByHeart("one", "two"))
    chat(
        session,
        "1?",
        ENTER,
        ENTER,
        "  ",
        ENTER,
        "/stats",
        ENTER,
        "a",
        NEW_LINE,
        "b",
        ENTER,
        "/quit",
        ENTER,
        "no",
        ENTER,
    )
    out, err = capsys.readouterr()
    assert out == "one\ntwo\n"
    assert asked(session) == ["1?", "a\nb"]
    assert err.startswith("somebody: /help lists the commands")
    assert "last answer: 10 tokens" in err


def test_what_is_wrong_is_told_and_the_chat_goes_on(capsys: Captured) -> None:
    session = Session(ByHeart(["on", RemoteError("it is\x1b gone")], "two"))
    chat(session, "/nothing", ENTER, "1?", ENTER, "2?", ENTER, END)
    out, err = capsys.readouterr()
    assert out == "on\ntwo\n"
    assert "there is no command /nothing" in err
    assert "it is\\x1b gone\n" in err


def test_ctrl_c_drops_a_line_and_ctrl_d_ends_the_chat(capsys: Captured) -> None:
    session = Session(ByHeart("one"))
    chat(session, "no", STOP, "1?", ENTER, END, "2?", ENTER)
    assert asked(session) == ["1?"]
    assert capsys.readouterr().out == "one\n"


def test_lines_can_be_edited_and_come_again() -> None:
    session = Session(ByHeart("one", "two"), "be short")
    again = (UP, "abc"), ("!" + ENTER, "")
    typing(
        session,
        ("ac\x1b[Db", "abc"),
        (ENTER, ""),
        *again,
        ("/sys", "/sys"),
        (TAB, "/system"),
        (" hm" + ENTER + END, None),
    )
    assert asked(session) == ["abc", "abc!"]
    assert session.messages[0]["content"] == "hm"


def test_what_was_typed_is_kept_where_that_is_asked_for_alone(tmp_path: Path) -> None:
    file = tmp_path / "new" / "history"
    chat(Session(ByHeart("one")), "a secret", ENTER, END)
    assert not file.exists()
    chat(Session(ByHeart("one")), "a secret", ENTER, END, history=file)
    assert "a secret" in file.read_text()
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    assert stat.S_IMODE(file.parent.stat().st_mode) == 0o700
    session = Session(ByHeart("one"))
    file.chmod(0o644)
    chat(session, "another", ENTER, END, history=file)
    assert "a secret" in file.read_text()
    assert "another" in file.read_text()
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    with pytest.raises(OptionError, match="can't keep a history in"):
        chat(session, history=file / "history")


class Slow(ByHeart):
    """Ctrl-C comes while the answer does, after its third letter; then it waits, for good."""

    async def answer(self, messages: Sequence[Message]) -> AsyncGenerator[Part]:
        count = 0
        async for part in super().answer(messages):
            yield part
            count += 1
            if count == 3:
                os.kill(os.getpid(), signal.SIGINT)
                await asyncio.sleep(60)


def test_ctrl_c_stops_an_answer_and_not_the_chat(capsys: Captured) -> None:
    session = Session(Slow("one two three", "four five"))

    def own(*_: Any) -> None:
        pytest.fail("Ctrl-C reached what listened before")

    before = signal.signal(signal.SIGINT, own)
    try:
        chat(session, "1?", ENTER, "2?", ENTER, END)
        assert signal.getsignal(signal.SIGINT) is own
    finally:
        signal.signal(signal.SIGINT, before)
    out, err = capsys.readouterr()
    assert out == "one\nfou\n"
    assert err.count("stopped: what is written stays") == 2
    assert [message["content"] for message in session.messages] == ["1?", "one", "2?", "fou"]


def test_ctrl_c_between_answers_does_nothing() -> None:
    class Late(ByHeart):
        def check_trees(self) -> None:
            os.kill(os.getpid(), signal.SIGINT)

    session = Session(Late("one"))
    chat(session, "/tree", ENTER, "1?", ENTER, END)
    assert asked(session) == ["1?"]


def test_a_request_to_end_ends_the_chat_in_the_midst_of_an_answer() -> None:
    class Ended(ByHeart):
        async def answer(self, messages: Sequence[Message]) -> AsyncGenerator[Part]:
            async for part in super().answer(messages):
                yield part
                asyncio.get_running_loop().call_soon(_interrupt)
                await asyncio.sleep(60)

    somebody = Ended("one")
    session = Session(somebody)
    with pytest.raises(KeyboardInterrupt):
        chat(session, "1?", ENTER, "2?", ENTER)
    assert somebody.closed == 1
    assert [message["content"] for message in session.messages] == ["1?", "o"]


def _interrupt() -> None:
    raise KeyboardInterrupt


def test_an_answer_that_ends_at_a_limit_is_told(capsys: Captured) -> None:
    class Cut(ByHeart):
        async def answer(self, messages: Sequence[Message]) -> AsyncGenerator[Part]:
            async for part in super().answer(messages):
                yield part
            self.figures = Figures(cut=True)

    chat(Session(Cut("one")), "1?", ENTER, END)
    assert "the answer ends at the limit of tokens" in capsys.readouterr().err


def test_a_terminal_obeys_no_answer_and_shows_what_was_drafted(
    monkeypatch: pytest.MonkeyPatch, capsys: Captured
) -> None:  # fmt: skip
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    monkeypatch.setattr(terminal, "coloured", lambda stream: True)
    monkeypatch.setattr("tokentree.cli.terminal.coloured", lambda stream: True)
    chat(Session(ByHeart("a\x1b]0;B\x07\r\x9b2j\u202e\n\té東👩\u200d🔬")), "1?", ENTER, END)
    shown = capsys.readouterr().out
    assert shown == "a\\x1b]0;\x1b[32mB\x1b[0m\\x07\\r\\x9b2j\\u202e\n\té東👩\u200d🔬\n"


def test_what_a_terminal_obeys_is_spelled_and_nothing_else() -> None:
    for code in range(0x3000):
        letter, spelled = chr(code), harmless(chr(code))
        obeyed = letter not in "\n\t" and (code < 32 or 127 <= code < 160)
        turns = code in (0x200E, 0x200F, *range(0x2028, 0x202F), *range(0x2066, 0x206A))
        assert (spelled != letter) == (obeyed or turns), hex(code)


# -- pipes ------------------------------------------------------------------------------------------------------------


def piped(session: Session, monkeypatch: pytest.MonkeyPatch, content: bytes) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(content)))
    asyncio.run(pipe(session))


def test_each_line_of_a_pipe_is_a_turn_and_none_a_command(
    monkeypatch: pytest.MonkeyPatch, capsys: Captured
) -> None:  # fmt: skip
    session = Session(ByHeart("one\x1b[1m", "two", "three"))
    piped(session, monkeypatch, b"\xef\xbb\xbf1?\r\n\n/quit\n \n" + "é\u2028?".encode())
    assert asked(session) == ["1?", "/quit", "é\u2028?"]
    assert capsys.readouterr() == ("one\x1b[1m\ntwo\nthree\n", "")


def test_a_line_that_is_no_text_ends_it(monkeypatch: pytest.MonkeyPatch) -> None:
    session = Session(ByHeart("one"))
    with pytest.raises(OptionError, match=r"^line 2 of standard input is not UTF-8 text$"):
        piped(session, monkeypatch, b"1?\n\xff\n")
    assert len(session.messages) == 2
    monkeypatch.setattr(sys, "stdin", None)
    with pytest.raises(OptionError, match="standard input: it is closed"):
        asyncio.run(pipe(session))
