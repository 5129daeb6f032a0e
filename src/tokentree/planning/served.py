"""The steps of a server under load: the application itself, on a port of this machine, and clients in a process of
their own."""

from __future__ import annotations

import asyncio
import gc
import json
import sys
from collections.abc import Callable, Iterator
from collections.abc import Sequence as SequenceOf
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import uvicorn

from tokentree.decoder import Decoder
from tokentree.errors import OptionError
from tokentree.llm import LLM
from tokentree.planning import asking
from tokentree.planning.counting import Counting
from tokentree.planning.load import read_lines
from tokentree.sequence import Sequence
from tokentree.serve.app import create_app
from tokentree.serve.protocol import ChatRequest
from tokentree.serve.run import listen
from tokentree.serve.settings import Settings


@dataclass(frozen=True)
class Step:
    """A step, as the loop's clock saw it. Times are in seconds.

    Args:
        began, ended: when.
        decoded, read: when the requests of its texts came, by id: of those that were decoded, and of those whose
            prompts were read.
        over: ids of the texts that ended with it.
        tokens: that came.
        rows: of the forward.
        forward: what that took.
        drafting: what making drafts took. None: none were asked for.
        reused: tokens whose KV was there already, of each prompt that was read.
    """

    began: float
    ended: float
    decoded: dict[int, float]
    read: dict[int, float]
    over: frozenset[int]
    tokens: int
    rows: int
    forward: float
    drafting: float | None
    reused: list[int] = field(default_factory=list)


@dataclass(frozen=True)
class Load:
    """So many clients that ask one after another.

    Args:
        clients: how many.
        bodies: what they ask for, in turns: chats, in JSON.
        seconds: after which they leave.
    """

    clients: int
    bodies: SequenceOf[str]
    seconds: float


@dataclass(frozen=True)
class Part:
    """What a server did for so many clients: its steps in their order."""

    clients: int
    steps: list[Step] = field(default_factory=list)


class Clocked(Decoder):
    """A loop that remembers its steps.

    Args:
        of: the loop that it is otherwise.

    Attributes:
        steps: all that it made.
    """

    def __init__(self, of: Decoder) -> None:
        super().__init__(of.engine, of.drafter, of.shape, of.accept, of.watch, of.clock)
        self.steps = list[Step]()

    def _stepped(self, seqs: list[Sequence], reading: list[Sequence], rows: int, times: list[float]) -> None:
        drafts = bool(seqs) and isinstance(self.shape, Counting) and not self.shape.resting
        step = Step(
            times[0], self.clock(), {seq.id: seq.made for seq in seqs}, {seq.id: seq.made for seq in reading},
            frozenset(seq.id for seq in seqs if seq.finished), sum(seq.metrics.steps[-1][1] for seq in seqs), rows,
            times[2] - times[1], times[1] - times[0] if drafts else None,
            [seq.metrics.reused_tokens for seq in reading],
        )  # fmt: skip
        self.steps.append(step)


class _Server(uvicorn.Server):
    """Leaves signals to the program that it is a part of."""

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


def read_requests(path: str | Path) -> list[str]:
    """The bodies of chats in a JSON-lines file, without the names of models.

    Raises:
        OptionError, PromptError: as `read_lines`.
    """
    lines = read_lines(path, "the requests", ChatRequest, "chat request")
    return [json.dumps(json.loads(line) | {"model": None}) for line, _ in lines]


def served(llm: LLM, settings: Settings, load: Load, tell: Callable[[], None] = lambda: None) -> Part:
    """What a server with this model does under a load. ``llm`` gets a loop that is clocked.

    Args:
        tell: called behind it.

    Raises:
        OptionError: if the server refuses one of the requests.
    """
    llm.decoder = Clocked(llm.decoder)
    asyncio.run(_serve(llm, settings, load))
    tell()
    return Part(load.clients, llm.decoder.steps)


async def _serve(llm: LLM, settings: Settings, load: Load) -> None:
    sock, app = listen("127.0.0.1", 0), create_app(settings, llm)
    server = _Server(uvicorn.Config(app, log_config=None, lifespan="off", ws="none", server_header=False))
    serving = asyncio.create_task(server.serve([sock]))
    gc.freeze()  # as `tokentree serve` does
    try:
        await _asked(f"http://127.0.0.1:{sock.getsockname()[1]}", load)
    finally:
        gc.unfreeze()
        await app.state.service.close()
        server.should_exit = True
        await serving


async def _asked(url: str, load: Load) -> None:
    """Lets the clients ask, until they leave."""
    program, pipe = str(Path(asking.__file__)), asyncio.subprocess.PIPE
    words = sys.executable, "-P", program, url, str(load.clients), str(load.seconds)
    process = await asyncio.create_subprocess_exec(*words, stdin=pipe, stdout=pipe)
    try:
        out, _ = await process.communicate("\n".join(load.bodies).encode())
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
    if process.returncode:
        raise OptionError(f"the clients of the server ended with the status {process.returncode}")
    if (said := json.loads(out)["error"]) is not None:
        raise OptionError(f"the server didn't answer a request: {said}")
