"""A conversation, turn by turn."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from contextlib import aclosing

from tokentree.chat import Message, whole
from tokentree.chatting.answers import Answerer, Figures, Part
from tokentree.errors import OptionError, PromptError


class Session:
    """A conversation with one who answers. It knows no terminal.

    What was asked stays as it is until it is answered. An answer that is stopped or fails stays as far as it came.

    Args:
        answerer: who answers.
        system: the message that stands before all others; none if empty.

    Attributes:
        messages: the conversation.
        figures: of all answers so far.
        speculating: whether answers are drafted.
    """

    def __init__(self, answerer: Answerer, system: str = "") -> None:
        self.answerer, self.messages = answerer, list[Message]()
        self.figures, self.speculating = list[Figures](), True
        self.set_system(system)

    def ask(self, text: str) -> None:
        """Adds what the user says. It takes the place of a question that has no answer.

        Raises:
            PromptError: if it is no text.
        """
        if not whole(text, "message").strip():
            raise PromptError("the message is empty")
        if self._last == "user":
            self.messages.pop()
        self.messages.append({"role": "user", "content": text})

    def ask_again(self) -> None:
        """Takes the last answer back, if there is one.

        Raises:
            OptionError: if nothing was asked.
        """
        if not any(message["role"] == "user" for message in self.messages):
            raise OptionError("there is nothing to answer yet")
        while self._last != "user":
            self.messages.pop()

    async def answer(self) -> AsyncGenerator[Part]:
        """The answer to the last question, as it comes.

        Raises:
            TokenTreeError: as `Answerer.answer`.
        """
        written = list[str]()
        try:
            async with aclosing(self.answerer.answer(self.messages)) as parts:
                async for part in parts:
                    written.append(part.text)
                    yield part
        finally:
            self.figures.append(self.answerer.figures)
            if text := "".join(written):
                self.messages.append({"role": "assistant", "content": text})

    def set_system(self, text: str) -> None:
        """Sets the message that stands before all others; an empty one takes it away.

        Raises:
            PromptError: if it is no text.
        """
        if self.messages and self.messages[0]["role"] == "system":
            del self.messages[0]
        if text:
            self.messages.insert(0, {"role": "system", "content": whole(text, "system message")})

    def speculate(self, on: bool) -> None:
        """Turns drafting on or off.

        Raises:
            OptionError: as `Answerer.speculate`.
        """
        self.answerer.speculate(on)
        self.speculating = on

    @property
    def _last(self) -> str | None:
        return str(self.messages[-1]["role"]) if self.messages else None
