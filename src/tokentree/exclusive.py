"""What decoding is shielded from: other threads, and torch's global state."""

from __future__ import annotations

import functools
import threading
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from types import TracebackType
from typing import Any, Concatenate, ParamSpec, Protocol, TypeVar, cast

import torch

from tokentree.errors import RequestError
from tokentree.kernels.threads import forked, use_here

P = ParamSpec("P")
R = TypeVar("R")
EXACT = ("none", "ieee")  # what torch calls products of float32 that are none of fewer bits


class Exclusive:
    """A lock that lets one thread at a time use an engine and the drafters that draft for it. Its owner may take it
    again. Who has just left it comes behind those that wait. While it is held, no gradients are kept, and torch's
    global state is as `neutral` has it.

    Raises:
        ForkError: on entering, in a process whose parent had used a model.
    """

    def __init__(self) -> None:
        # who waits for the first holds the second, which whoever comes later needs before
        self._held, self._next = threading.RLock(), threading.Lock()
        self._owner, self._depth, self._stepping = 0, 0, False
        self._state = ExitStack()
        self._left = deque[Callable[[], None]]()

    def __enter__(self) -> None:
        if self._owner == threading.get_ident():
            self._depth += 1
            return
        use_here()
        try:
            with self._next:
                self._held.acquire()
            self._begin()
        except BaseException:  # Ctrl-C: whoever comes next must not wait for this thread
            if self._held._is_owned():  # type: ignore[attr-defined]
                self._state.close()
                self._owner, self._depth = 0, 0
                while self._held._is_owned():  # type: ignore[attr-defined]
                    self._held.release()
            raise

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._depth > 1:
            self._depth -= 1
        else:
            self._end()

    def __reduce__(self) -> tuple[type[Exclusive], tuple[()]]:
        return Exclusive, ()  # a copy of what it guards has a lock of its own

    @contextmanager
    def step(self) -> Iterator[None]:
        """Holds it for a step. What users gave is called there: processors, rules, watchers.

        Raises:
            RequestError: if these ask for another step of the same engine, which may not begin in the midst of one.
        """
        with self:
            if self._stepping:
                raise RequestError(
                    "a model can't write another text in the midst of a step: processors, rules and watchers may use "
                    "another LLM"
                )
            self._stepping = True
            try:
                yield
            finally:
                self._stepping = False

    def when_free(self, work: Callable[[], None]) -> None:
        """Has ``work`` done while the lock is held: now, if nobody holds it, and otherwise by its owner, before it is
        given away. It waits for nobody, since a garbage collector may call it anywhere. In a process that was `forked`
        there is nothing to do."""
        if forked():
            return
        self._left.append(work)
        if self._owner != threading.get_ident() and self._held.acquire(blocking=False):
            self._begin()
            self._end()

    def _begin(self) -> None:
        self._owner, self._depth = threading.get_ident(), 1
        if not getattr(_thread, "shielded", False):
            self._state.callback(setattr, _thread, "shielded", False)
            _thread.shielded = True
            self._state.enter_context(torch.inference_mode())
            self._state.enter_context(neutral())

    def _end(self) -> None:
        try:
            with self._state:
                while self._left:
                    self._left.popleft()()
        finally:
            self._owner, self._depth = 0, 0
            self._held.release()


_thread = threading.local()  # whether this thread holds such a lock already, and so needs no other shield


class _Locked(Protocol):
    @property
    def lock(self) -> Exclusive: ...


L = TypeVar("L", bound=_Locked)


def exclusive(method: Callable[Concatenate[L, P], R]) -> Callable[Concatenate[L, P], R]:
    """A method that holds its object's ``lock``."""

    @functools.wraps(method)
    def locked(self: L, *args: P.args, **kwargs: P.kwargs) -> R:
        with self.lock:
            return method(self, *args, **kwargs)

    return cast(Callable[Concatenate[L, P], R], locked)


def stepping(method: Callable[Concatenate[L, P], R]) -> Callable[Concatenate[L, P], R]:
    """A method that is a step under its object's ``lock``."""

    @functools.wraps(method)
    def locked(self: L, *args: P.args, **kwargs: P.kwargs) -> R:
        with self.lock.step():
            return method(self, *args, **kwargs)

    return cast(Callable[Concatenate[L, P], R], locked)


@contextmanager
def neutral() -> Iterator[None]:
    """No autocast, the CPU as default device, and products of float32 in float32 on CPUs, whatever the caller has set.
    The default type is left alone, since torch has one for all threads: what computes here names its types. Precision
    is one for all threads too, and the caller's again when no thread is in here any more.
    """
    kinds = [kind for kind in ("cpu", "cuda") if torch.is_autocast_enabled(kind)]
    elsewhere = torch.get_default_device().type != "cpu"
    with _shared:
        if not (kinds or elsewhere):
            yield
            return
        with ExitStack() as stack:
            for kind in kinds:
                stack.enter_context(torch.autocast(kind, enabled=False))
            if elsewhere:
                stack.enter_context(torch.device("cpu"))
            yield


class _Shared:
    """The precision of products on CPUs: float32's own as long as any thread is inside."""

    def __init__(self) -> None:
        self._mutex, self._inside = threading.RLock(), 0
        self._precision = "none"

    def __enter__(self) -> None:
        backend: Any = torch.backends.mkldnn
        products = backend.matmul
        with self._mutex:
            if not self._inside:
                self._precision = products.fp32_precision
            self._inside += 1
            if products.fp32_precision not in EXACT:
                products.fp32_precision = "ieee"

    def __exit__(self, *error: Any) -> None:
        backend: Any = torch.backends.mkldnn
        products = backend.matmul
        with self._mutex:
            self._inside -= 1
            if not self._inside and self._precision not in EXACT and products.fp32_precision == "ieee":
                products.fp32_precision = self._precision


_shared = _Shared()
