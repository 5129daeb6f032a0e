"""`LLM` for asyncio: one thread makes the steps, and coroutines wait for what comes of them."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import AsyncGenerator, Iterable
from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass, field
from types import TracebackType

from tokentree.errors import OptionError, StepError
from tokentree.inputs import Prompt
from tokentree.kernels.threads import check_fork
from tokentree.llm import LLM, Result
from tokentree.pieces import Piece
from tokentree.sampling import SamplingParams
from tokentree.scheduler import Event, Scheduler
from tokentree.sequence import Sequence
from tokentree.sharing import AHEAD

__all__ = ["AsyncLLM", "AsyncStream"]


BEHIND = 0.1  # seconds after which deadlines are looked at again where all requests wait for their readers


@dataclass(eq=False)
class _Owner:
    """Who waits for the events of some requests."""

    loop: asyncio.AbstractEventLoop
    requests: int
    inbox: asyncio.Queue[Event] = field(default_factory=asyncio.Queue)
    told: int = 0  # events; the thread counts these
    read: int = 0  # and the reader these

    def tell(self, event: Event) -> None:
        """From any thread."""
        self.told += 1
        with contextlib.suppress(RuntimeError):  # the loop is closed, and nobody waits any more
            self.loop.call_soon_threadsafe(self.inbox.put_nowait, event)

    @property
    def is_behind(self) -> bool:
        """Whether so many events are unread that no more should come."""
        return self.told - self.read >= AHEAD * self.requests


class AsyncLLM:
    """An `LLM` for asyncio. Its requests are coroutines.

    One thread makes the steps. Requests join and leave between steps. Closing the `AsyncLLM`, or leaving ``async
    with``, ends that thread and interrupts all requests. Other threads may use ``llm`` at the same time: steps take
    turns.

    A request whose events nobody reads stops 16 steps ahead of its reader. It takes no part in steps then, and is the
    first to lose its memory.

    Args:
        llm: the model. It can still be used by itself.
        max_batch: the largest number of requests that are decoded together. Others wait, in the order of their arrival.
            By default that of ``llm``.

    Raises:
        OptionError: if ``llm`` isn't an `LLM`, or ``max_batch`` is below 1.
    """

    def __init__(self, llm: LLM, max_batch: int | None = None) -> None:
        if not isinstance(llm, LLM):
            raise OptionError(f"AsyncLLM takes an LLM, and {type(llm).__name__} is none")
        if max_batch is not None and (type(max_batch) is not int or max_batch < 1):
            raise OptionError(f"max_batch={max_batch!r} must be at least 1")
        self.llm = llm
        self._scheduler = llm.scheduler(max_batch or llm.max_batch)
        self._owners: dict[int, _Owner] = {}
        self._wake, self._closed = threading.Event(), False
        self._broken: BaseException | None = None
        self._thread = threading.Thread(target=self._work, name="tokentree", daemon=True)
        self._thread.start()

    async def __aenter__(self) -> AsyncLLM:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self.close()

    async def close(self) -> None:
        """Interrupts all requests, and waits until the thread has ended."""
        self._closed = True
        self._wake.set()
        await asyncio.to_thread(self._thread.join)

    def stream(
        self, prompt: Prompt, params: SamplingParams | None = None, *,
        reference: Prompt | Iterable[Prompt] | None = None,
    ) -> AsyncStream:  # fmt: skip
        """Decodes one prompt and gives out each token as it comes: ``async for piece in llm.stream(...)``. It begins
        with the first token that is asked for. If the request fails, iterating raises its error behind the last token.

        Raises:
            OptionError, PromptError: as `LLM.stream`.
            ForkError: in a process that was forked from one that had used a model.
        """
        check_fork()
        return AsyncStream(self, self.llm.streamed(prompt, params, reference))

    async def generate(
        self, prompts: Prompt | Iterable[Prompt], params: SamplingParams | SequenceOf[SamplingParams] | None = None, *,
        reference: Prompt | Iterable[Prompt] | None = None,
    ) -> list[Result]:  # fmt: skip
        """As `LLM.generate`. If the task is cancelled, so are the requests.

        Raises:
            OptionError: with beam search too: that is `LLM.generate`'s.
            PromptError, RequestError, ModelError, StepError: as `LLM.generate`.
        """
        requests = self.llm.requests(prompts, params, reference)
        seqs = [request for request in requests if isinstance(request, Sequence)]
        if any(seq.params.num_beams > 1 for seq in seqs):
            raise OptionError("AsyncLLM searches no beams: use LLM.generate")
        async for _ in self.events(seqs):
            pass
        results = [self.llm.result(one) if isinstance(one, Sequence) else one for one in requests]
        if results and all(one.error is not None for one in results):
            raise results[0].error  # type: ignore[misc]
        return results

    def abort(self, request_id: int) -> None:
        """Ends a request as it is, with the finish reason "interrupted"; does nothing if it has ended. Any thread may
        call it."""
        if owner := self._owners.pop(request_id, None):
            self._scheduler.cancel(request_id)
            owner.tell(Event(request_id, [], "interrupted"))

    async def events(self, seqs: SequenceOf[Sequence]) -> AsyncGenerator[Event]:
        """The events of ``seqs``, until all have ended. Requests are aborted if the caller stops iterating earlier."""
        check_fork()
        owner, left = _Owner(asyncio.get_running_loop(), len(seqs)), set[int]()
        try:
            for seq in seqs:
                self._owners[seq.id] = owner
                left.add(seq.id)
                self._scheduler.add(seq)
            self._wake.set()
            if self._closed:
                self._check_thread()
                raise OptionError("this AsyncLLM is closed: make another one of the same LLM")
            while left:
                event = await owner.inbox.get()
                was_behind = owner.is_behind
                owner.read += 1
                if was_behind:
                    self._wake.set()
                self._check_thread()
                if event.finish_reason is not None:
                    left.discard(event.request_id)
                yield event
        finally:
            for request_id in left:
                self.abort(request_id)

    @property
    def scheduler(self) -> Scheduler:
        """Whose steps its thread makes. Others may read what it counts."""
        return self._scheduler

    def check(self, seconds: float) -> None:
        """Looks whether requests get on.

        Raises:
            StepError: if the thread that makes steps has ended by an error, or there are requests and it has made no
                step for so long.
        """
        self._check_thread()
        if self._scheduler.still > seconds:
            raise StepError(f"no step was made for {self._scheduler.still:.0f} seconds, and there are requests")

    def _check_thread(self) -> None:
        """Raises `StepError` if the thread that makes steps has ended by an error."""
        if self._broken is not None:
            raise StepError(f"the thread that decodes has ended: {self._broken}") from self._broken

    # -- the thread ------------------------------------------------------------------------------------------------

    def _work(self) -> None:
        try:
            while not self._closed:
                owners = dict(self._owners)
                held = {request_id for request_id, owner in owners.items() if owner.is_behind}
                idle = self._scheduler.idle
                if idle or len(held) == len(owners):
                    self._wake.wait(None if idle else BEHIND)
                    self._wake.clear()
                if idle:
                    continue
                for event in self._scheduler.step(held):
                    last = event.finish_reason is not None
                    owner = self._owners.pop(event.request_id, None) if last else self._owners.get(event.request_id)
                    if owner is not None:
                        owner.tell(event)
        except BaseException as error:  # noqa: BLE001  the thread ends, and nobody may wait for it
            self._broken = error
        self._closed = True
        for request_id in list(self._owners):
            self.abort(request_id)


class AsyncStream:
    """The tokens of one request as they come.

    Attributes:
        request_id: for `AsyncLLM.abort`.
    """

    def __init__(self, owner: AsyncLLM, seq: Sequence) -> None:
        self._owner, self._seq, self.request_id = owner, seq, seq.id
        self._pieces = self._iterate()

    def __aiter__(self) -> AsyncGenerator[Piece]:
        return self._pieces

    async def close(self) -> None:
        """Stops decoding."""
        await self._pieces.aclose()

    @property
    def result(self) -> Result:
        """What there is so far, also after an interruption or an error."""
        return self._owner.llm.result(self._seq)

    async def _iterate(self) -> AsyncGenerator[Piece]:
        pieces = self._owner.llm.pieces(self._seq)
        events = self._owner.events([self._seq])
        try:
            async for event in events:
                for piece in pieces.of(event):
                    yield piece
                if event.error is not None:
                    raise event.error
        finally:
            await events.aclose()
