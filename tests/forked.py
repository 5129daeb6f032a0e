"""Processes of this Python that begin with everything imported: to import it takes longer than most of them run.

All processes that test together have one server, made at the first use: this file as a program. It imports what is
heavy, and forks whenever it is asked. What begins so has streams, variables, a folder, a session and signals of its
own, and ends as any other process does. Only what happens before a program's first line is not like that of a new
process.
"""

from __future__ import annotations

import contextlib
import fcntl
import functools
import gc
import json
import os
import runpy
import select
import signal
import socket
import subprocess
import sys
import termios
import warnings
from collections.abc import Mapping, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

IMPORTED = (
    "torch", "transformers", "transformers.models.llama.modeling_llama", "accelerate", "uvicorn", "tests.tiny_models",
    "tokentree.llm", "tokentree.loading", "tokentree.cli.main", "tokentree.cli.serve", "tokentree.train.run",
    "tokentree.train.run_eagle", "tokentree.serve.app", "tokentree.chatting.terminal",
)  # fmt: skip
ROOT = Path(__file__).parent.parent
MOST = 1 << 20  # bytes of a message


class Forked(subprocess.Popen[Any]):
    """`subprocess.Popen` of ``[sys.executable, …]`` with ``-c code`` or ``-m module``, and words behind it."""

    def _execute_child(
        self, args: Sequence[Any], executable: Any, preexec_fn: Any, close_fds: Any, pass_fds: Any, cwd: Any,
        env: Mapping[str, str] | None, startupinfo: Any, creationflags: Any, shell: Any, p2cread: int, p2cwrite: int,
        c2pread: int, c2pwrite: int, errread: int, errwrite: int, *more: Any,
    ) -> None:  # fmt: skip
        """Where `subprocess` would fork. Of its options, these alone are heeded: streams, ``cwd`` and ``env``."""
        assert args[0] == sys.executable
        asked = {"words": [*map(str, args[1:])], "env": dict(env or os.environ), "cwd": str(cwd or Path.cwd())}
        (told, tells), nowhere = os.pipe(), os.open(os.devnull, os.O_RDONLY)
        try:
            given = zip((p2cread, c2pwrite, errwrite), (nowhere, 1, 2), strict=True)
            streams = [own if stream < 0 else stream for stream, own in given]
            socket.send_fds(_server(), [json.dumps(asked).encode()], [*streams, tells])
        finally:
            os.close(nowhere)
            os.close(tells)
            self._close_pipe_fds(p2cread, p2cwrite, c2pread, c2pwrite, errread, errwrite)  # type: ignore[attr-defined]
        self._told = os.fdopen(told, "rb", buffering=0)
        self.pid = int(self._told.readline())
        self._child_created = True

    def _try_wait(self, flags: int) -> tuple[int, int]:
        if flags & os.WNOHANG and not select.select([self._told], [], [], 0)[0]:
            return 0, 0
        with self._told:
            return self.pid, int(self._told.readline())

    def _internal_poll(self, *_: Any, **__: Any) -> int | None:
        if self.returncode is None and (ended := self._try_wait(os.WNOHANG))[0]:
            self._handle_exitstatus(ended[1])  # type: ignore[attr-defined]
        return self.returncode


def run(words: Sequence[object], *, input: Any = None, **options: Any) -> subprocess.CompletedProcess[str]:
    """`subprocess.run` of such a process, whose output is captured as text."""
    pipes: dict[str, Any] = {"stdin": None if input is None else subprocess.PIPE, "text": True}
    with Forked([*words], stdout=subprocess.PIPE, stderr=subprocess.PIPE, **pipes, **options) as process:  # type: ignore[list-item]
        out, err = process.communicate(input, timeout=300)
    return subprocess.CompletedProcess([*map(str, words)], process.returncode, out, err)


_servers = list[int]()


@functools.cache
def _server() -> socket.socket:
    address = f"\0tokentree-{os.environ.get('PYTEST_XDIST_TESTRUNUID', os.getpid())}"
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as listening, contextlib.suppress(OSError):
        listening.bind(address)  # unless another process has
        listening.listen()
        listening.set_inheritable(True)
        words = [sys.executable, "-m", "tests.forked", str(listening.fileno())]
        _servers.append(os.posix_spawn(words[0], words, os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}))
    asked = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    asked.connect(address)
    return asked


def end() -> None:
    """Ends the use of the server, if there is one. Who has made it waits until nobody uses it."""
    if _server.cache_info().currsize:
        _server().close()
        _server.cache_clear()
    while _servers:
        os.waitpid(_servers.pop(), 0)


# -- the server --------------------------------------------------------------------------------------------------------


def serve(listening: socket.socket) -> None:
    """Forks for each process that tests, until there is none."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for module in IMPORTED:
            import_module(module)
    gc.freeze()
    users = 0
    while not users or _reaped():
        if select.select([listening], [], [], 0.1)[0]:
            asked, _ = listening.accept()
            if not os.fork():
                listening.close()
                return answer(asked)
            asked.close()
            users += 1
    return None


def _reaped() -> bool:
    """Whether there are children left."""
    with contextlib.suppress(ChildProcessError):
        os.waitpid(-1, os.WNOHANG)
        return True
    return False


def answer(asked: socket.socket) -> None:
    """Forks for each message: a process that tells of the other one's end, and that one."""
    while True:
        message, fds, _, _ = socket.recv_fds(asked, MOST, 4)
        if not message:
            break
        if not os.fork():
            asked.close()
            return _tell(json.loads(message), fds)
        for fd in fds:
            os.close(fd)
        _reap(os.WNOHANG)
    return _reap(0)


def _reap(flags: int) -> None:
    with contextlib.suppress(ChildProcessError):
        while os.waitpid(-1, flags)[0]:
            pass


def _tell(asked: dict[str, Any], fds: list[int]) -> None:
    *streams, tells = fds
    if not (child := os.fork()):
        os.close(tells)
        return _begin(asked["words"], asked["env"], asked["cwd"], streams)
    for fd in streams:
        os.close(fd)
    os.write(tells, f"{child}\n".encode())
    os.write(tells, f"{os.waitpid(child, 0)[1]}\n".encode())
    os._exit(0)


def _begin(words: list[str], env: dict[str, str], cwd: str, streams: list[int]) -> None:
    """What the interpreter does before a program's first line, and the program."""
    os.setsid()
    for number, fd in enumerate(streams):
        os.dup2(fd, number)
        os.close(fd)
    if os.isatty(0):
        fcntl.ioctl(0, termios.TIOCSCTTY, 0)
    sys.stdin, sys.stdout = os.fdopen(0, closefd=False), os.fdopen(1, "w", closefd=False)
    sys.stderr = os.fdopen(2, "w", 1, errors="backslashreplace", closefd=False)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    os.environ.clear()
    os.environ.update(env)
    os.chdir(cwd)
    filters = [one for one in env.get("PYTHONWARNINGS", "").split(",") if one]
    while words[0] == "-W":
        filters.append(words[1])
        words = words[2:]
    for one in filters:
        warnings._setoption(one)  # type: ignore[attr-defined]
    way, program, *more = words
    sys.argv = [way, *more]
    if way == "-m":
        runpy.run_module(program, run_name="__main__", alter_sys=True)
    else:
        exec(program, {"__name__": "__main__"})


if __name__ == "__main__":
    serve(socket.socket(fileno=int(sys.argv[1])))
