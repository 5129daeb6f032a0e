"""Replicas on this machine, from their start to their end."""

from __future__ import annotations

import logging
import os
import re
import secrets
import shutil
import signal
import tempfile
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

from tokentree.errors import ModelError, OptionError
from tokentree.scale.arguments import Arguments
from tokentree.serve.run import listen

# What every process of Ray is to know, which reads it while it is imported: it is for this machine alone, on every
# system, and wants a secret; its makers are told nothing; a replica that is stuck isn't waited for.
os.environ.update(
    RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER="0", RAY_AUTH_MODE="token", RAY_AUTH_TOKEN=secrets.token_hex(32),
    RAY_USAGE_STATS_ENABLED="0", RAY_SERVE_FORCE_STOP_UNHEALTHY_REPLICAS="1",
)  # fmt: skip
import ray
from ray import serve as ray_serve
from ray.serve.handle import DeploymentHandle

from tokentree.scale.application import LOGGING, application
from tokentree.scale.loopback import HERE

LOG = logging.getLogger("tokentree.serve")
NAME = "tokentree"
STORE_BYTES = 80 << 20  # of Ray's store of objects: answers are small, and don't go through it
SIGNALS = signal.SIGINT, signal.SIGTERM


@contextmanager
def ray_here(cpus: float, gpus: float | None = None) -> Iterator[None]:
    """Ray on this machine as long as the block goes on: processes of its own, which listen to this machine alone and
    want a secret that is made here, and a folder that is removed in the end.

    Args:
        cpus: shares that can be given away, whether or not there are so many CPUs.
        gpus: the same. None: as many as there are.

    Raises:
        OptionError: if Ray was imported before this module, and would listen to others.
    """
    room = tempfile.mkdtemp(prefix="tt-")  # short: the name of a socket may have 107 characters
    try:
        ray.init(
            address="local", num_cpus=cpus, num_gpus=gpus, include_dashboard=False, _node_ip_address=HERE,
            _temp_dir=room, object_store_memory=STORE_BYTES, namespace=NAME, logging_level=logging.WARNING,
        )  # fmt: skip
        if ray.util.get_node_ip_address() != HERE:
            raise OptionError("Ray listens to other machines: import tokentree.scale.local before ray")
        yield
    finally:
        ray.shutdown()
        shutil.rmtree(room, ignore_errors=True)


@contextmanager
def serving(arguments: Arguments, host: str, port: int) -> Iterator[DeploymentHandle]:
    """Serve's proxy on an address of this machine, and the application once it takes requests. At the end requests
    have ``arguments.drain_timeout`` seconds to end.

    Raises:
        ModelError: if no replica can be made.
    """
    logging.getLogger("ray.serve").setLevel(logging.WARNING)
    ray_serve.start(proxy_location="HeadOnly", http_options={"host": host, "port": port}, logging_config=LOGGING)
    try:
        yield deploy(arguments)
        drain(arguments.drain_timeout)
    finally:
        ray_serve.shutdown()


def deploy(arguments: Arguments) -> DeploymentHandle:
    """Starts the application, or replaces replicas that run by new ones, one after another; returns once all of them
    take requests.

    Raises:
        ModelError: if no replica can be made.
    """
    try:
        return ray_serve.run(application(arguments, tries=1), name=NAME, route_prefix="/")
    except RuntimeError:
        known = ray_serve.status().applications[NAME].deployments
        raise ModelError(_reason("".join(one.message for one in known.values()))) from None


def drain(seconds: float) -> None:
    """No request is taken from now on. Waits so long for those that are under way."""
    asked = ray_serve.get_app_handle(NAME).broadcast("drain", seconds)
    if not all(asked.results()):
        LOG.warning("requests that are under way are interrupted")


def _reason(said: str) -> str:
    """The sentence of this library's own error in what Serve tells of a replica that can't be made."""
    own = re.findall(r"tokentree\.errors\.\w+: (.+)", said)
    return own[-1].strip() if own else "no replica could be made: the log of Ray says why"


class _Ended(BaseException):
    """A signal has come."""


def serve(arguments: Arguments, host: str, port: int) -> None:
    """Answers requests until a signal ends it. A second one interrupts requests.

    Raises:
        OptionError: if nobody can listen there.
        ModelError: if no replica can be made.
    """
    sock = listen(host, port)
    port = sock.getsockname()[1]
    sock.close()
    shares = max(1.0, (arguments.max_replicas or arguments.replicas) * arguments.cpus)
    try:
        with ray_here(shares, None if arguments.gpus else 0), signals(_end):
            LOG.info("listening on http://%s:%s, with %s replicas", host, port, arguments.replicas)
            with serving(arguments, host, port):
                LOG.info("ready")
                over = threading.Event()
                with signals(over.set):
                    over.wait()
                LOG.info("ending: no more requests are taken")
    except _Ended:
        LOG.warning("requests that are under way are interrupted")


def _end() -> None:
    raise _Ended


@contextmanager
def signals(call: Callable[[], object]) -> Iterator[None]:
    """Calls ``call`` where a signal would end this process."""

    def came(number: int, frame: FrameType | None) -> None:
        call()

    before = {number: signal.signal(number, came) for number in SIGNALS}
    try:
        yield
    finally:
        for number, own in before.items():
            signal.signal(number, own)
