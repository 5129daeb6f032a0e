"""A server from its start to its end: the model is loaded while it answers, and requests that are under way are
finished when it is told to end."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import logging
import socket
import threading
from collections.abc import Callable
from functools import partial
from types import FrameType

import uvicorn

from tokentree.errors import OptionError
from tokentree.llm import LLM
from tokentree.serve.app import create_app
from tokentree.serve.service import Service
from tokentree.serve.settings import Settings
from tokentree.serve.structured import prepare

LOG = logging.getLogger("tokentree.serve")
LEVELS = ("debug", "info", "warning", "error")
LAST_ANSWERS = 5  # seconds for answers that are out already, behind all requests


def listen(host: str, port: int) -> socket.socket:
    """A socket that takes connections from now on. What they send goes out at once: an answer's head and body are two
    parts, and the second would wait for some 40 ms until a client says that it has the first.

    Raises:
        OptionError: if there can be none.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        sock = socket.create_server((host, port), family=family, backlog=2048)
    except (OSError, OverflowError) as error:
        said = getattr(error, "strerror", None) or str(error)
        raise OptionError(f"can't listen on {host}, port {port}: {said}") from None
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)  # connections inherit it, and asyncio doesn't set it
    return sock


def log_to_stderr(level: str) -> None:
    """From now on the server says on standard error what it does."""
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    for name in ("tokentree.serve", "uvicorn"):
        logger = logging.getLogger(name)
        logger.handlers, logger.propagate = [handler], False
        logger.setLevel(level.upper())
    logging.getLogger("uvicorn.error").setLevel(max(logging.WARNING, logging.getLevelName(level.upper())))


class _Server(uvicorn.Server):
    """Tells ``on_signal`` of signals, instead of ending at once."""

    def __init__(self, config: uvicorn.Config, on_signal: Callable[[], object]) -> None:
        super().__init__(config)
        self._on_signal = on_signal

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        self._on_signal()


def serve(settings: Settings, load: Callable[[], LLM], sock: socket.socket, drain_timeout: float) -> LLM | None:
    """Answers requests until a signal ends it. Returns the model, or None if it wasn't loaded by then.

    Args:
        load: makes the model, in a thread.
        drain_timeout: the seconds that requests have to end then. A second signal interrupts them.

    Raises:
        Exception: what ``load`` raised.
    """
    return asyncio.run(_Run(settings, load, sock, drain_timeout).run())


class _Run:
    def __init__(self, settings: Settings, load: Callable[[], LLM], sock: socket.socket, drain_timeout: float) -> None:
        self._load, self._sock, self._drain_timeout = load, sock, drain_timeout
        if hasattr(socket, "TCP_USER_TIMEOUT"):  # of connections whose answer is over as well; they inherit it
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, int(1000 * settings.stall_timeout))
        self._app = create_app(settings)
        self._service: Service = self._app.state.service
        self._first, self._second = asyncio.Event(), asyncio.Event()  # signals

    async def run(self) -> LLM | None:
        loop = asyncio.get_running_loop()
        config = uvicorn.Config(
            self._app, log_config=None, lifespan="off", ws="none", server_header=False,
            timeout_graceful_shutdown=LAST_ANSWERS,
        )  # fmt: skip
        server = _Server(config, partial(loop.call_soon_threadsafe, self._signalled))
        serving = asyncio.create_task(server.serve([self._sock]))
        loaded = loop.create_future()
        threading.Thread(target=self._load_into, args=(loop, loaded), name="loading", daemon=True).start()
        ending = asyncio.create_task(self._first.wait())
        address = self._sock.getsockname()
        LOG.info("listening on http://%s:%s", f"[{address[0]}]" if ":" in address[0] else address[0], address[1])
        try:
            await asyncio.wait({loaded, ending, serving}, return_when=asyncio.FIRST_COMPLETED)
            if loaded.done():
                self._service.start(loaded.result())
                gc.freeze()  # a full collection would stop all threads for as long as it takes to look at a model
                LOG.info("ready")
                await asyncio.wait({ending, serving}, return_when=asyncio.FIRST_COMPLETED)
                await self._drain()
            return loaded.result() if loaded.done() else None
        finally:
            await self._service.close()
            server.should_exit = True
            await serving
            ending.cancel()

    def _signalled(self) -> None:
        (self._second if self._first.is_set() else self._first).set()

    def _load_into(self, loop: asyncio.AbstractEventLoop, loaded: asyncio.Future[LLM]) -> None:
        found: LLM | None = None
        failed: BaseException | None = None
        try:
            found = self._load()
            prepare(found)
        except BaseException as error:  # noqa: BLE001  raised again by who waits for it
            failed = error

        def tell() -> None:
            if failed is not None:
                loaded.set_exception(failed)
            elif found is not None:
                loaded.set_result(found)

        with contextlib.suppress(RuntimeError):  # the server has ended
            loop.call_soon_threadsafe(tell)

    async def _drain(self) -> None:
        """Waits for requests that are under way."""
        LOG.info("ending: no more requests are taken")
        draining = asyncio.create_task(self._service.drain(self._drain_timeout))
        hurry = asyncio.create_task(self._second.wait())
        await asyncio.wait({draining, hurry}, return_when=asyncio.FIRST_COMPLETED)
        if not draining.done() or not draining.result():
            LOG.warning("requests that are under way are interrupted")
        for task in (draining, hurry):
            task.cancel()
