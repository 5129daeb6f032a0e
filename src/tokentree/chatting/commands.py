"""What is typed in a chat: a message, or a command."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from tokentree.chatting.answers import Figures, sum_of
from tokentree.chatting.saved import load, save
from tokentree.chatting.session import Session
from tokentree.cli.terminal import spelled
from tokentree.cli.trees import drawn, scale
from tokentree.errors import OptionError

STEPS = 3  # whose trees /tree shows by default


@dataclass(frozen=True)
class Done:
    """What came of a line.

    Args:
        told: to the user.
        asks: whether the conversation waits for an answer now.
        ends: whether the chat is over.
    """

    told: str = ""
    asks: bool = False
    ends: bool = False


def typed(session: Session, line: str) -> Done:
    """Does what a line says. A message is what doesn't begin with a slash, or begins with two, of which one is left
    out.

    Raises:
        TokenTreeError: if it can't be done.
    """
    if not line.strip():
        return Done()
    if line.startswith("/") and not line.startswith("//"):
        name, rest = [*line.strip().split(None, 1), ""][:2]
        if name not in COMMANDS:
            raise OptionError(f"there is no command {name}: /help lists them, and // begins a message with a slash")
        return COMMANDS[name].do(session, rest.strip())
    session.ask(line.removeprefix("/"))
    return Done(asks=True)


def _plain(session: Session, rest: str) -> Done:
    session.speculate(not session.speculating)
    return Done("speculation is on" if session.speculating else "speculation is off: plain decoding")


def _tree(session: Session, rest: str) -> Done:
    answerer = session.answerer
    answerer.check_trees()
    if not rest.isdecimal() and rest:
        raise OptionError(f"/tree {rest}: give the number of steps")
    steps = list(answerer.steps)
    if not steps:
        return Done("there are no steps yet")
    count = min(int(rest[:9] or STEPS), len(steps))
    names = answerer.drafters
    trees = [
        drawn(step, f"last step but {left}" if left else "last step", len(names) > 1)
        for left, step in zip(reversed(range(count)), steps[len(steps) - count :])
    ]
    return Done("\n".join([scale(names), *trees]) if trees else "")


def _stats(session: Session, rest: str) -> Done:
    if not session.figures:
        return Done("there is no answer yet")
    lines = [f"last answer: {figures_text(session.figures[-1])}"]
    if len(session.figures) > 1:
        lines.append(f"all {len(session.figures)} answers: {figures_text(sum_of(session.figures))}")
    return Done("\n".join(lines))


def figures_text(figures: Figures) -> str:
    """What answers cost, on a line."""
    if not figures.tokens:
        return "no figures"
    told = [f"{figures.tokens} tokens"]
    if figures.tokens_per_second is not None:
        told.append(f"{figures.tokens_per_second:.1f} tokens/s" + (", prompt included" if figures.with_prompt else ""))
    if figures.tokens_per_forward is not None:
        told.append(f"{figures.tokens_per_forward:.2f} tokens a forward")
    if figures.by_drafter:
        accepted = ", ".join(f"{spelled(name)} {count}" for name, count in figures.by_drafter.items())
        told.append(f"accepted by drafter: {accepted}")
    if figures.prompt_tokens is not None:
        known = f", {figures.reused_tokens} known before" if figures.reused_tokens is not None else ""
        told.append(f"prompt {figures.prompt_tokens} tokens{known}")
    return "; ".join(told)


def _save(session: Session, rest: str, over: bool = False) -> Done:
    file = _file(rest, "/save")
    save(session.messages, file, over)
    return Done(f"{_counted(session)} in {spelled(str(file))}")


def _load(session: Session, rest: str) -> Done:
    session.messages[:] = load(_file(rest, "/load"))
    return Done(_counted(session) + ("; /retry answers the last one" if session.messages[-1]["role"] == "user" else ""))


def _counted(session: Session) -> str:
    count = len(session.messages)
    return f"{count} message{'s' if count != 1 else ''}"


def _file(rest: str, command: str) -> Path:
    if not rest:
        raise OptionError(f"{command} needs the name of a file")
    try:
        return Path(rest).expanduser()
    except RuntimeError:
        raise OptionError(f"{command} {rest}: there is no such home") from None


def _system(session: Session, rest: str) -> Done:
    session.set_system(rest)
    return Done("the system message is set" if rest else "there is no system message")


def _retry(session: Session, rest: str) -> Done:
    session.ask_again()
    return Done(asks=True)


def _help(session: Session, rest: str) -> Done:
    width = max(len(f"{name} {command.takes}") for name, command in COMMANDS.items()) + 2
    lines = [f"{f'{name} {command.takes}':<{width}}{command.told}" for name, command in COMMANDS.items()]
    keys = "Alt-Enter begins a new line. Ctrl-C stops an answer. Ctrl-D ends the chat."
    return Done("\n".join([*lines, "", keys]))


@dataclass(frozen=True)
class Command:
    """A command: what it takes, what help tells of it, and what it does."""

    takes: str
    told: str
    do: Callable[[Session, str], Done]


COMMANDS = {
    "/plain": Command("", "turn speculation off, or on again", _plain),
    "/tree": Command("[N]", f"the trees of the last N steps, {STEPS} by default", _tree),
    "/stats": Command("", "tokens a second, tokens a forward, accepted by drafter", _stats),
    "/save": Command("FILE", "write the conversation to a new file; /save! replaces one", _save),
    "/save!": Command("FILE", "the same, also over a file that is there", lambda on, rest: _save(on, rest, over=True)),
    "/load": Command("FILE", "go on with a conversation that was saved", _load),
    "/system": Command("TEXT", "set the system message; without TEXT, take it away", _system),
    "/retry": Command("", "answer the last message again", _retry),
    "/help": Command("", "this list", _help),
    "/quit": Command("", "end the chat", lambda session, rest: Done(ends=True)),
}
