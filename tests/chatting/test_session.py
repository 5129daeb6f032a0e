"""Turns and commands, without a terminal or a model."""

from __future__ import annotations

import json
import stat
from pathlib import Path

import pytest

from tests.chatting.talks import ByHeart, answered, step
from tokentree import OptionError, PromptError
from tokentree.chatting.answers import Figures, sum_of
from tokentree.chatting.commands import COMMANDS, figures_text, typed
from tokentree.chatting.remote import RemoteError
from tokentree.chatting.session import Session

USER, BOT, SYSTEM = "user", "assistant", "system"


def said(session: Session) -> list[tuple[str, str]]:
    return [(message["role"], message["content"]) for message in session.messages]


def test_turns_are_a_conversation() -> None:
    somebody = ByHeart("one", "two")
    session = Session(somebody, "be short")
    assert typed(session, "1?").asks
    assert answered(session) == "one"
    assert typed(session, " 2?\nor 3?").asks
    assert answered(session) == "two"
    assert said(session) == [(SYSTEM, "be short"), (USER, "1?"), (BOT, "one"), (USER, " 2?\nor 3?"), (BOT, "two")]
    assert somebody.heard == [session.messages[:2], session.messages[:4]]


def test_an_answer_that_is_stopped_stays_as_far_as_it_came() -> None:
    somebody = ByHeart("one", "two")
    session = Session(somebody)
    session.ask("1?")
    assert answered(session, most=2) == "on"
    assert somebody.closed == 1
    session.ask("2?")
    answered(session)
    assert said(session) == [(USER, "1?"), (BOT, "on"), (USER, "2?"), (BOT, "two")]
    assert len(session.figures) == 2


def test_an_answer_that_fails_stays_as_far_as_it_came_and_a_question_without_one_is_replaced() -> None:
    session = Session(ByHeart(["on", RemoteError("gone")], RemoteError("gone"), "three", "four"))
    session.ask("1?")
    for question, left in (("2?", [(USER, "1?"), (BOT, "on")]), ("3?", [(USER, "1?"), (BOT, "on"), (USER, "2?")])):
        with pytest.raises(RemoteError, match=r"^gone$"):
            answered(session)
        assert said(session) == left
        session.ask(question)
    assert said(session) == [(USER, "1?"), (BOT, "on"), (USER, "3?")]
    assert answered(session) == "three"
    assert typed(session, "/retry").asks
    assert said(session)[-1] == (USER, "3?")
    assert answered(session) == "four"
    assert said(session) == [(USER, "1?"), (BOT, "on"), (USER, "3?"), (BOT, "four")]


def test_the_system_message_is_set_replaced_and_taken_away() -> None:
    session = Session(ByHeart("one"))
    session.ask("1?")
    assert typed(session, "/system be short").told == "the system message is set"
    assert typed(session, "/system  be  long ").told
    assert said(session) == [(SYSTEM, "be  long"), (USER, "1?")]
    typed(session, "/system")
    assert said(session) == [(USER, "1?")]


def test_slashes_are_commands_and_two_of_them_are_one_in_a_message() -> None:
    session = Session(ByHeart())
    with pytest.raises(OptionError, match=r"^there is no command /hlp: /help lists them, and // begins a message"):
        typed(session, "/hlp me")
    with pytest.raises(OptionError, match="there is no command /saves"):
        typed(session, "/saves")
    assert said(session) == []
    assert typed(session, "//etc is a folder").asks
    assert said(session) == [(USER, "/etc is a folder")]
    assert typed(session, "/system\nbe\nshort").told
    assert said(session)[0] == (SYSTEM, "be\nshort")
    for line in ("", "  ", "\n"):
        assert not typed(session, line).asks
    assert typed(session, "/quit").ends


def test_help_tells_every_command() -> None:
    told = typed(Session(ByHeart()), "/help").told
    for name, command in COMMANDS.items():
        assert f"{name} {command.takes}".strip() in told
        assert command.told in told
    assert "Ctrl-C stops an answer" in told


@pytest.mark.parametrize("line", ["/retry", "/save", "/load", "/tree x", "/tree -1", "/save ~nobody-of-that-name/f"])
def test_a_command_that_cannot_be_done_is_a_sentence(line: str) -> None:
    session = Session(ByHeart())
    session.answerer.steps.append(step(("'a'", -1, True)))  # type: ignore[attr-defined]
    with pytest.raises(OptionError, match=r"^[^\n]+[^\n.]$"):
        typed(session, line)


def test_plain_turns_speculation_off_and_on() -> None:
    session = Session(ByHeart())
    assert typed(session, "/plain").told == "speculation is off: plain decoding"
    assert not session.speculating
    assert typed(session, "/plain").told == "speculation is on"
    session.answerer.drafters.clear()  # type: ignore[attr-defined]
    with pytest.raises(OptionError, match="nobody drafts"):
        typed(session, "/plain")
    assert session.speculating


# -- figures and trees ------------------------------------------------------------------------------------------------


def test_stats_tell_the_last_answer_and_all() -> None:
    session = Session(ByHeart("one", "two"))
    assert typed(session, "/stats").told == "there is no answer yet"
    session.ask("1?")
    answered(session)
    one = "10 tokens; 5.0 tokens/s; 2.50 tokens a forward; accepted by drafter: suffix 6; prompt 7 tokens"
    assert typed(session, "/stats").told == f"last answer: {one}"
    session.ask("2?")
    answered(session)
    both = "20 tokens; 5.0 tokens/s; 2.50 tokens a forward; accepted by drafter: suffix 12; prompt 14 tokens"
    assert typed(session, "/stats").told == f"last answer: {one}\nall 2 answers: {both}"


def test_what_is_not_known_is_not_told() -> None:
    assert figures_text(Figures()) == "no figures"
    assert figures_text(Figures(tokens=3)) == "3 tokens"
    assert (
        figures_text(Figures(tokens=3, prompt_tokens=9, reused_tokens=8)) == "3 tokens; prompt 9 tokens, 8 known before"
    )
    both = sum_of([Figures(tokens=3, by_drafter={"a": 1}), Figures(tokens=None, by_drafter={"a": 2, "b": 1})])
    assert (both.tokens, both.forwards, both.by_drafter) == (3, None, {"a": 3, "b": 1})


def test_trees_of_the_last_steps_are_drawn() -> None:
    somebody = ByHeart()
    session = Session(somebody)
    assert typed(session, "/tree").told == "there are no steps yet"
    somebody.steps = [
        step((f"'r{number}'", -1, True), ("'a'", 0, True), ("'b'", 0, False), ("'c'", 1, True)) for number in range(5)
    ]
    told = typed(session, "/tree 2").told.splitlines()
    assert told[0].startswith("numbers: how probable")
    assert told[1:6] == [
        "last step but 1: 'r3'",
        "├── 'a'  0.90  suffix  accepted",
        "│   └── 'c'  0.90  suffix  accepted",
        "│       └── 'bonus'  bonus",
        "└── 'b'  0.90  suffix",
    ]
    assert told[6] == "last step: 'r4'"
    assert typed(session, "/tree").told.count("bonus'  bonus") == 3
    assert typed(session, "/tree 99999999999999999999").told.count("bonus'  bonus") == 5
    somebody.drafters.clear()
    with pytest.raises(OptionError, match="no trees here"):
        typed(session, "/tree")


# -- files ------------------------------------------------------------------------------------------------------------


def test_a_conversation_is_saved_and_loaded(tmp_path: Path) -> None:
    session, other = Session(ByHeart("één"), "be short"), Session(ByHeart(), "be long")
    session.ask("1?")
    answered(session)
    file = tmp_path / "a chat.json"
    assert typed(session, f"/save {file}").told == f"3 messages in {file}"
    assert json.loads(file.read_text("utf-8")) == session.messages
    assert typed(other, f"/load {file}").told == "3 messages"
    assert other.messages == session.messages
    other.ask("2?")
    assert len(session.messages) == 3


def test_a_file_is_replaced_only_when_asked_for(tmp_path: Path) -> None:
    session, file = Session(ByHeart()), tmp_path / "chat.json"
    file.write_text("mine")
    file.chmod(0o640)
    session.ask("1?")
    with pytest.raises(OptionError, match=r"chat.json' is there already: /save! replaces it$"):
        typed(session, f"/save {file}")
    assert file.read_text() == "mine"
    typed(session, f"/save! {file}")
    assert said(session) == [(one["role"], one["content"]) for one in json.loads(file.read_text())]
    assert [one.name for one in tmp_path.iterdir()] == ["chat.json"]
    typed(session, f"/save! {tmp_path / 'new.json'}")
    link = tmp_path / "link.json"
    link.symlink_to(tmp_path / "new.json")
    session.ask("2?")
    typed(session, f"/save! {link}")
    assert link.is_symlink()
    assert "2?" in (tmp_path / "new.json").read_text()
    assert stat.S_IMODE(link.stat().st_mode) & 0o077 == stat.S_IMODE((tmp_path / "new.json").stat().st_mode) & 0o077


@pytest.mark.parametrize("command", ["/save", "/save!"])
@pytest.mark.parametrize("place", ["", "none/chat.json", "file/chat.json"])
def test_what_cannot_be_written_is_a_sentence(tmp_path: Path, command: str, place: str) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(OptionError, match=r"^[^\n]*(can't write|is a folder|there is no folder)[^\n]*$"):
        typed(Session(ByHeart()), f"{command} {tmp_path / place}")
    assert sorted(one.name for one in tmp_path.iterdir()) == ["file"]


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("no json", "is not JSON"),
        ("[" * 10**5, "is not JSON"),
        ("[]", "there is no message"),
        ('"hello"', "and not a text"),
        ("{}", "chat takes messages"),
        ('[{"role": "user"}]', "message 1 has no content"),
        ('[{"role": "user", "content": "a"}, {"role": "boss", "content": "b"}]', "unknown role 'boss'"),
        ('[{"role": "user", "content": [{"type": "image"}]}]', "reads text alone"),
        ('[{"role": "user", "content": "\\ud800"}]', "half of a character"),
    ],
)  # fmt: skip
def test_what_is_no_conversation_is_a_sentence_and_changes_nothing(tmp_path: Path, text: str, says: str) -> None:
    session, file = Session(ByHeart()), tmp_path / "chat.json"
    file.write_text(text)
    session.ask("1?")
    with pytest.raises(PromptError, match=says):
        typed(session, f"/load {file}")
    with pytest.raises(PromptError, match="can't read the conversation"):
        typed(session, f"/load {tmp_path / 'none'}")
    assert said(session) == [(USER, "1?")]


def test_a_question_that_was_loaded_can_be_answered(tmp_path: Path) -> None:
    session, file = Session(ByHeart("one")), tmp_path / "chat.json"
    file.write_text('{"messages": [{"role": "user", "content": [{"type": "text", "text": "1?"}]}]}')
    assert typed(session, f"/load {file}").told == "1 message; /retry answers the last one"
    assert typed(session, "/retry").asks
    assert answered(session) == "one"


def test_half_a_character_is_no_message() -> None:
    session = Session(ByHeart())
    for line in ("a\ud800", "/system \ud800"):
        with pytest.raises(PromptError, match="half of a character"):
            typed(session, line)
    assert said(session) == []
