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

from tokentree.threads import check_fork

P = ParamSpec("P")
R = TypeVar("R")
EXACT = ("none", "ieee")  # what torch calls products of float32 that are none of fewer bits


class Exclusive:
    """A lock that lets one thread at a time use an engine and the drafters that draft for it, in the order in which
    they come. Its owner may take it again. While it is held, no gradients are kept, and torch's global state is as
    `neutral` has it.

    Raises:
        ForkError: on entering, in a process whose parent had used a model.
    """

    def __init__(self) -> None:
        self._mutex = threading.Lock()  # guards what is below, and is never held for long
        self._waiting: deque[threading.Lock] = deque()
        self._taken, self._owner, self._depth = False, 0, 0
        self._state = ExitStack()

    def __enter__(self) -> None:
        check_fork()
        me = threading.get_ident()
        if self._owner == me:
            self._depth += 1
            return
        with self._mutex:
            gate = threading.Lock() if self._taken else None
            self._taken = True
            if gate is not None:
                gate.acquire()
                self._waiting.append(gate)
        if gate is not None:
            self._wait(gate)
        self._owner, self._depth = me, 1
        try:
            self._state.enter_context(torch.inference_mode())
            self._state.enter_context(neutral())
        except BaseException:
            self.__exit__(None, None, None)
            raise

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._depth -= 1
        if not self._depth:
            try:
                self._state.close()
            finally:
                self._owner = 0
                self._hand_over()

    def _wait(self, gate: threading.Lock) -> None:
        """Waits until `_hand_over` opens ``gate``."""
        try:
            gate.acquire()
        except BaseException:  # Ctrl-C: whoever comes next must not wait for this thread
            with self._mutex:
                given_up = gate in self._waiting
                if given_up:
                    self._waiting.remove(gate)
            if not given_up:
                self._hand_over()
            raise

    def _hand_over(self) -> None:
        """To the thread that has waited longest, if there is one."""
        with self._mutex:
            if self._waiting:
                self._waiting.popleft().release()
            else:
                self._taken = False


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


@contextmanager
def neutral() -> Iterator[None]:
    """No autocast, the CPU as default device, float32 as default type, and products of float32 in float32 on CPUs,
    whatever the caller has set. What is one for all threads is the caller's again when no thread is in here any more.
    """
    with ExitStack() as stack:
        for kind in ("cpu", "cuda"):
            if torch.is_autocast_enabled(kind):
                stack.enter_context(torch.autocast(kind, enabled=False))
        if torch.get_default_device().type != "cpu":
            stack.enter_context(torch.device("cpu"))
        stack.enter_context(_shared)
        yield


class _Shared:
    """What torch has one of for all threads: neutral as long as any thread is inside."""

    def __init__(self) -> None:
        self._mutex, self._inside = threading.Lock(), 0
        self._dtype, self._precision = torch.float32, "none"

    def __enter__(self) -> None:
        backend: Any = torch.backends.mkldnn
        products = backend.matmul
        with self._mutex:
            if not self._inside:
                self._dtype, self._precision = torch.get_default_dtype(), products.fp32_precision
            self._inside += 1
            if torch.get_default_dtype() != torch.float32:
                torch.set_default_dtype(torch.float32)
            if products.fp32_precision not in EXACT:
                products.fp32_precision = "ieee"

    def __exit__(self, *error: Any) -> None:
        backend: Any = torch.backends.mkldnn
        products = backend.matmul
        with self._mutex:
            self._inside -= 1
            if self._inside:
                return
            if self._dtype != torch.float32 and torch.get_default_dtype() == torch.float32:
                torch.set_default_dtype(self._dtype)
            if self._precision not in EXACT and products.fp32_precision == "ieee":
                products.fp32_precision = self._precision


_shared = _Shared()
