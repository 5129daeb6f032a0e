"""A chat in a terminal, and through pipes."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from collections.abc import Iterator
from contextlib import aclosing, contextmanager, suppress
from pathlib import Path

from prompt_toolkit import PromptSession
from prompt_toolkit.completion import WordCompleter
from prompt_toolkit.history import FileHistory, History, InMemoryHistory
from prompt_toolkit.input import Input
from prompt_toolkit.key_binding import KeyBindings, KeyPressEvent
from prompt_toolkit.output import Output

from tokentree.cache import ours, private
from tokentree.chatting.commands import COMMANDS, typed
from tokentree.chatting.session import Session
from tokentree.cli.terminal import GREEN, coloured, harmless, paint, say, spelled, write
from tokentree.errors import OptionError, TokenTreeError
from tokentree.prompts import checked_text

PROMPT, MORE = "> ", "  "


class Stopping:
    """Ctrl-C ends an answer, and never the chat. It takes effect in `answering` alone; elsewhere it does nothing."""

    def __init__(self) -> None:
        self._task: asyncio.Task[None] | None = None

    @contextmanager
    def listening(self) -> Iterator[None]:
        """In its block the event loop is told of Ctrl-C."""
        own, loop = signal.getsignal(signal.SIGINT), asyncio.get_running_loop()
        if own is signal.SIG_IGN:
            yield
            return
        loop.add_signal_handler(signal.SIGINT, self.stop)
        try:
            yield
        finally:
            loop.remove_signal_handler(signal.SIGINT)
            signal.signal(signal.SIGINT, own)

    def stop(self) -> None:
        """Ends the answer."""
        if self._task is not None:
            self._task.cancel()

    async def answering(self, session: Session) -> bool:
        """Prints an answer. Returns whether it was stopped.

        Raises:
            TokenTreeError: as `Session.answer`.
        """
        self._task = asyncio.create_task(print_answer(session))
        try:
            await self._task
        except asyncio.CancelledError:
            if not self._task.cancelled() or _cancelled():
                raise  # the chat itself is to end
            return True
        finally:
            self._task = None
        return False


def _cancelled() -> bool:
    task = asyncio.current_task()
    return task is not None and task.cancelling() > 0


async def print_answer(session: Session) -> None:
    """Prints an answer as it comes. On a terminal, what was drafted is green where there are colours, and what a
    terminal would obey is spelled; elsewhere the text goes out as it is."""
    colours, terminal, text = coloured(sys.stdout), sys.stdout.isatty(), ""
    try:
        async with aclosing(session.answer()) as parts:
            async for part in parts:
                text = harmless(part.text) if terminal else part.text
                if text:
                    write(paint(text, GREEN, sys.stdout) if colours and part.drafted else text)
    finally:
        write("\n")


async def converse(
    session: Session, history: Path | None = None, input: Input | None = None, output: Output | None = None
) -> None:
    """A chat in a terminal, to its end.

    Args:
        history: the file that keeps what is typed; None keeps it for this chat alone.
        input, output: of the prompt, by default the terminal's.

    Raises:
        OptionError: if ``history`` can't be written.
    """
    prompt, stopping = prompt_of(history, input, output), Stopping()
    say(f"{spelled(session.answerer.name)}: /help lists the commands, Ctrl-D ends the chat")
    with stopping.listening():
        while True:
            try:
                line = await prompt.prompt_async(handle_sigint=False)
            except KeyboardInterrupt:  # the line is dropped, as in a shell
                continue
            except EOFError:
                return
            if await _turn(session, line, stopping):
                return


async def _turn(session: Session, line: str, stopping: Stopping) -> bool:
    """Does what a line says, and tells what is wrong with it. Returns whether the chat is over."""
    try:
        done = typed(session, line)
        if done.told:
            say(done.told)
        if done.asks:
            stopped = await stopping.answering(session)
            if stopped:
                say("stopped: what is written stays in the conversation; /retry answers again")
            elif session.answerer.figures.cut:
                say("the answer ends at the limit of tokens (--max-tokens, or the context)")
    except TokenTreeError as error:
        say(spelled(str(error)))
        return False
    return done.ends


async def pipe(session: Session) -> None:
    """Answers each line of standard input. No line is a command.

    Raises:
        TokenTreeError: the first one, of a line that has no answer.
    """
    if sys.stdin is None:
        raise OptionError("can't read standard input: it is closed")
    for number, line in enumerate(sys.stdin.buffer, start=1):
        text = checked_text(_decoded(line, number).removesuffix("\n").removesuffix("\r"), "a line of standard input")
        if text.strip():
            session.ask(text)
            await print_answer(session)


def _decoded(line: bytes, number: int) -> str:
    try:
        return line.decode("utf-8-sig" if number == 1 else "utf-8")
    except UnicodeDecodeError:
        raise OptionError(f"line {number} of standard input is not UTF-8 text") from None


def prompt_of(history: Path | None, input: Input | None, output: Output | None) -> PromptSession[str]:
    """What reads messages: Enter sends one, and Alt-Enter begins a new line."""
    keys = KeyBindings()

    @keys.add("enter")
    def _send(event: KeyPressEvent) -> None:
        event.current_buffer.validate_and_handle()

    @keys.add("escape", "enter")
    def _new_line(event: KeyPressEvent) -> None:
        event.current_buffer.newline(copy_margin=False)

    kept: History = InMemoryHistory() if history is None else FileHistory(_file_of(history))
    completer = WordCompleter(list(COMMANDS), sentence=True)
    return PromptSession(
        PROMPT, history=kept, key_bindings=keys, multiline=True, prompt_continuation=MORE, completer=completer,
        complete_while_typing=False, input=input, output=output,
    )  # fmt: skip


def _file_of(history: Path) -> str:
    """The name of a file that is there, and that nobody else can read.

    Raises:
        OptionError: if there can be none.
    """
    try:
        private(history.parent)
        with suppress(FileExistsError):
            os.close(os.open(history, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600))
        if not ours(history):
            raise PermissionError(f"{str(history)!r} belongs to another user")
        history.chmod(0o600)
    except OSError as error:
        raise OptionError(f"can't keep a history in {str(history)!r}: {error.strerror or error}") from None
    return str(history)
