"""Who answers in a chat, and what an answer is made of."""

from __future__ import annotations

from collections import Counter
from collections.abc import AsyncGenerator, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from tokentree.chat import Message
from tokentree.cli.trees import Step

KEPT = 16  # steps of an answer whose trees can be shown


@dataclass(frozen=True)
class Part:
    """A part of an answer, as it comes.

    Args:
        text: it may be empty.
        drafted: whether a drafter proposed it; False too where nobody tells.
    """

    text: str
    drafted: bool = False


@dataclass(frozen=True)
class Figures:
    """What answers cost. None is what isn't known.

    Args:
        tokens: new tokens.
        seconds: the time in which they came.
        forwards: of the target.
        by_drafter: accepted candidates by drafter. What several proposed counts for each.
        prompt_tokens: tokens of the prompt.
        reused_tokens: those of them whose KV was there already.
        cut: whether the answer ends at a limit of tokens.
        with_prompt: whether `seconds` holds the prompt's time too, and the way's to a server.
    """

    tokens: int | None = None
    seconds: float = 0.0
    forwards: int | None = None
    by_drafter: dict[str, int] = field(default_factory=dict)
    prompt_tokens: int | None = None
    reused_tokens: int | None = None
    cut: bool = False
    with_prompt: bool = False

    @property
    def tokens_per_second(self) -> float | None:
        """None if it isn't known."""
        return self.tokens / self.seconds if self.tokens and self.seconds else None

    @property
    def tokens_per_forward(self) -> float | None:
        """None if it isn't known."""
        return self.tokens / self.forwards if self.tokens and self.forwards else None


def sum_of(figures: Iterable[Figures]) -> Figures:
    """The figures of several answers together."""
    each, drafters = list(figures), Counter[str]()
    for one in each:
        drafters.update(one.by_drafter)

    def total(values: Iterable[int | None]) -> int | None:
        known = [value for value in values if value is not None]
        return sum(known) if known else None

    return Figures(
        total(one.tokens for one in each),
        sum(one.seconds for one in each),
        total(one.forwards for one in each),
        dict(drafters),
        total(one.prompt_tokens for one in each),
        total(one.reused_tokens for one in each),
        with_prompt=any(one.with_prompt for one in each),
    )


class Answerer(Protocol):
    """Answers conversations.

    Attributes:
        name: what answers, in words.
        figures: of the last answer, also of one that was stopped or failed.
        steps: the trees of its last steps, at most `KEPT`; empty before there is one.
        drafters: who proposes there.
    """

    name: str
    figures: Figures

    @property
    def steps(self) -> Sequence[Step]: ...

    @property
    def drafters(self) -> Sequence[str]: ...

    def answer(self, messages: Sequence[Message]) -> AsyncGenerator[Part]:
        """The answer to ``messages``. Closing it stops it.

        Raises:
            TokenTreeError: if there is none, or no more of it.
        """
        ...

    def speculate(self, on: bool) -> None:
        """Turns drafting on or off for the answers to come.

        Raises:
            OptionError: if it can't be chosen.
        """
        ...

    def check_trees(self) -> None:
        """Raises `OptionError` if no trees are told here."""
        ...

    async def close(self) -> None:
        """Lets go of what it holds."""
        ...
