"""Requests: when they come, how long their prompts are, and how many tokens they ask for."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Annotated, Protocol, TypeVar

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from tokentree.errors import OptionError
from tokentree.planning.engine import CONTEXT, RIGHT
from tokentree.prompts import read_text

UNITS = {"s": 1, "second": 1, "min": 60, "minute": 60, "h": 3600, "hour": 3600, "day": 86400}
MOST_LENGTH, MOST_LENGTHS, MOST_CLIENTS = CONTEXT // 2 - 1, 100_000, 100_000
MOST_RATE = 1_000_000


@dataclass(frozen=True)
class Asked:
    """A request.

    Args:
        seconds: when it comes.
        prompt_tokens, output_tokens: its lengths.
        prompt: what tells its prompt from others, as a token. Requests with the same one begin alike.
        number: its place among all requests of the simulation, from 0 on.
    """

    seconds: float
    prompt_tokens: int
    output_tokens: int
    prompt: int
    number: int


class Load(Protocol):
    """Where requests come from.

    Attributes:
        name: how it is called in tables.
    """

    name: str

    def first(self) -> list[Asked]:
        """Those that come whatever becomes of others."""
        ...

    def after_arrival(self, asked: Asked) -> Asked | None:
        """The request that comes next, once ``asked`` has come."""
        ...

    def after_end(self, asked: Asked, seconds: float) -> list[Asked]:
        """The requests that come next, since ``asked`` ended at that time."""
        ...


# -- their lengths -----------------------------------------------------------------------------------------------------


class Line(BaseModel):
    """A line of a trace.

    Args:
        seconds: when it comes, in seconds from any beginning.
        prompt_tokens, output_tokens: its lengths.
        prompt: a name; requests with the same one have the same prompt, whose KV is reused.
    """

    model_config = ConfigDict(extra="forbid")

    seconds: Annotated[float, Field(ge=0, le=1e12, allow_inf_nan=False)] = 0.0
    prompt_tokens: Annotated[int, Field(ge=1, le=MOST_LENGTH)]
    output_tokens: Annotated[int, Field(ge=1, le=MOST_LENGTH)]
    prompt: str | None = None


M = TypeVar("M", bound=BaseModel)


def read_lines(path: str | Path, what: str, kind: type[M], one: str) -> list[tuple[str, M]]:
    """The lines of a JSON-lines file, and what they say.

    Args:
        what, one: what its content and each line of it are called.

    Raises:
        OptionError, PromptError: if the file can't be read, or has none; or a line is none, which is named.
    """
    found = list[tuple[str, M]]()
    for number, line in enumerate(read_text(path, what).split("\n"), start=1):
        if line.strip():
            try:
                found.append((line, kind.model_validate_json(line)))
            except ValidationError as error:
                first = error.errors(include_url=False, include_input=False)[0]
                said = ": ".join(filter(None, (".".join(map(str, first["loc"])), first["msg"])))
                raise OptionError(f"line {number} of {str(path)!r} is no {one}: {said}") from None
    if not found:
        raise OptionError(f"{str(path)!r} has no requests")
    return found


def read_trace(path: str | Path) -> list[Line]:
    """The requests of a JSON-lines file, the earliest first.

    Raises:
        OptionError, PromptError: as `read_lines`.
    """
    return sorted((line for _, line in read_lines(path, "the trace", Line, "request")), key=lambda line: line.seconds)


@dataclass(frozen=True)
class Lengths:
    """What requests are drawn from.

    Args:
        lines: each as likely as another. A prompt with a name is the same prompt each time. Others are new ones.
    """

    lines: SequenceOf[Line]

    @classmethod
    def of(cls, prompts: SequenceOf[int], outputs: SequenceOf[int], same_prompts: bool = False) -> Lengths:
        """Lengths that are drawn from these, each by itself.

        Args:
            same_prompts: whether each length is that of one prompt, which comes again and again.

        Raises:
            OptionError: if one is no length of a request.
        """
        if not prompts or not outputs or not all(1 <= count <= MOST_LENGTH for count in (*prompts, *outputs)):
            raise OptionError(f"prompts and outputs have 1 to {MOST_LENGTH:,} tokens")
        if len(prompts) * len(outputs) > MOST_LENGTHS:
            raise OptionError(f"there are at most {MOST_LENGTHS:,} pairs of lengths: put them into a file")
        named = [(count, str(place) if same_prompts else None) for place, count in enumerate(prompts)]
        pairs = product(named, outputs)
        return cls([Line(prompt_tokens=n, output_tokens=out, prompt=name) for (n, name), out in pairs])

    @property
    def tokens(self) -> tuple[float, float]:
        """Of a prompt and of an output, on average."""
        prompts, outputs = (sum(part) for part in zip(*((one.prompt_tokens, one.output_tokens) for one in self.lines)))
        return prompts / len(self.lines), outputs / len(self.lines)


class _Numbered:
    """Makes requests of lines, one after another."""

    def __init__(self) -> None:
        self._number, self._known = 0, dict[str, int]()

    def make(self, line: Line, seconds: float) -> Asked:
        """The next request."""
        number, name = self._number, line.prompt
        self._number += 1
        prompt = self._known.setdefault(name, number) if name is not None else number
        return Asked(seconds, line.prompt_tokens, line.output_tokens, RIGHT + 1 + prompt, number)


# -- where they come from ----------------------------------------------------------------------------------------------


class Random:
    """Requests that come at random times, a Poisson process, whatever becomes of others.

    Args:
        rate: requests a second.
        lengths: what they are drawn from.
        generator: draws.
        name: how it is called.

    Raises:
        OptionError: if the rate is none.
    """

    def __init__(self, rate: float, lengths: Lengths, generator: np.random.Generator, name: str | None = None) -> None:
        if not 0 < rate <= MOST_RATE:
            raise OptionError(f"a load has more than 0 and at most {MOST_RATE:,} requests a second")
        self.rate, self.name = rate, rate_name(rate) if name is None else name
        self._lengths, self._generator, self._made = lengths, generator, _Numbered()

    def first(self) -> list[Asked]:
        return [self._next(0.0)]

    def after_arrival(self, asked: Asked) -> Asked | None:
        return self._next(asked.seconds)

    def after_end(self, asked: Asked, seconds: float) -> list[Asked]:
        return []

    def _next(self, seconds: float) -> Asked:
        line = self._lengths.lines[int(self._generator.integers(len(self._lengths.lines)))]
        return self._made.make(line, seconds + float(self._generator.exponential(1 / self.rate)))


class Clients:
    """So many clients, each of which asks again as soon as it has its answer.

    With rounds, they share the requests of a round. Who finds none left waits until the last one has ended. Then all
    begin with the next round. Requests then come in the order of their lines, and from the first line on once all have
    come, so that a load test is gone through again as it was.

    Args:
        clients: how many.
        lengths: what their requests are drawn from, or taken in turns.
        generator: draws.
        turnaround: seconds between the last token of an answer and the next request.
        in_round: requests of a round. None: there are no rounds.

    Raises:
        OptionError: if there are none.
    """

    def __init__(
        self, clients: int, lengths: Lengths, generator: np.random.Generator, turnaround: float = 0.0,
        in_round: int | None = None,
    ) -> None:  # fmt: skip
        if not 1 <= clients <= MOST_CLIENTS or not 0 <= turnaround < math.inf:
            raise OptionError(f"there are 1 to {MOST_CLIENTS:,} clients, who wait for at least 0 seconds")
        self.clients, self.name = clients, f"{clients} client{'s' * (clients > 1)}"
        self._lengths, self._generator, self._made = lengths, generator, _Numbered()
        if in_round is not None and in_round < clients:
            raise OptionError(f"a round has a request for each of {clients} clients, and {in_round} are fewer")
        self._turnaround, self._in_round, self._asked, self._ended = turnaround, in_round, 0, 0
        self._turn = 0

    def first(self) -> list[Asked]:
        return self._together(0.0)

    def after_arrival(self, asked: Asked) -> Asked | None:
        return None

    def after_end(self, asked: Asked, seconds: float) -> list[Asked]:
        self._ended += 1
        if self._asked != self._in_round:
            return [self._next(seconds + self._turnaround)]
        return self._together(seconds + self._turnaround) if self._ended == self._in_round else []

    def _together(self, seconds: float) -> list[Asked]:
        """A request of each client, with which a round begins."""
        self._asked = self._ended = 0
        return [self._next(seconds) for _ in range(self.clients)]

    def _next(self, seconds: float) -> Asked:
        self._asked += 1
        lines = self._lengths.lines
        place = int(self._generator.integers(len(lines))) if self._in_round is None else self._turn % len(lines)
        self._turn += 1
        return self._made.make(lines[place], seconds)


class Trace:
    """Requests as they were recorded.

    Args:
        lines: the earliest first; the first one comes at once.
    """

    def __init__(self, lines: SequenceOf[Line], name: str = "trace") -> None:
        made = _Numbered()
        self.name, self._asked = name, [made.make(line, line.seconds - lines[0].seconds) for line in lines]

    def __len__(self) -> int:
        return len(self._asked)

    def first(self) -> list[Asked]:
        return list(self._asked)

    def after_arrival(self, asked: Asked) -> Asked | None:
        return None

    def after_end(self, asked: Asked, seconds: float) -> list[Asked]:
        return []


# -- how they are written ----------------------------------------------------------------------------------------------


def rate_of(text: str) -> float | None:
    """Requests a second, from a number of them in a second, or in another unit, such as ``20/min`` or ``1e6/day``; None
    if ``text`` isn't such a number."""
    found = re.fullmatch(r"(\d[\d_]*\.?\d*(?:e\d{1,2})?)(?:/(\w+))?", text.strip())
    if found is None or (found[2] or "s") not in UNITS:
        return None
    return float(found[1]) / UNITS[found[2] or "s"]


def rate_name(rate: float) -> str:
    """The same, as people say it."""
    return f"{rate:.3g}/s" if rate >= 1 else f"{60 * rate:.3g}/min" if rate >= 1 / 60 else f"{86400 * rate:.3g}/day"
