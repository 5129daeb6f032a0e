"""The application as Serve runs it: fronts and replicas."""

from __future__ import annotations

from typing import Any

from ray import serve
from ray.serve import Application
from ray.serve.config import AutoscalingConfig, RequestRouterConfig

from tokentree.scale.arguments import Arguments
from tokentree.scale.gate import Gate
from tokentree.scale.replica import Replica

AHEAD = 2  # times as many requests as are decoded together go to a replica: so it always has the next ones at hand
TRIES = 20  # to make a replica: on a cluster what it needs may come later
HEALTH_PERIOD, HEALTH_TIMEOUT = 2.0, 30.0  # seconds
LOGGING = {"log_level": "WARNING", "enable_access_log": False}  # of Serve; requests are logged by nobody
DRAIN_LOOP = 0.5  # seconds between two looks at whether all requests of a replica have ended
ROUTERS = {
    "beginning": "tokentree.scale.router:ByBeginning",
    "balanced": "ray.serve._private.request_router:PowerOfTwoChoicesRequestRouter",
}


def application(arguments: Arguments, tries: int = TRIES) -> Application:
    """The application of these arguments, whose names of deployments are ``Front`` and ``Replica``.

    Args:
        tries: how often Serve tries to make a replica, before it gives up.
    """
    replica = serve.deployment(Replica, name="Replica").options(
        **replica_options(arguments), max_constructor_retry_count=tries
    )
    front = serve.deployment(Gate, name="Front").options(
        num_replicas=arguments.fronts, max_ongoing_requests=1 << 20,
        ray_actor_options={"num_cpus": 0}, logging_config=LOGGING, graceful_shutdown_timeout_s=arguments.drain_timeout,
        graceful_shutdown_wait_loop_s=DRAIN_LOOP,
    )  # fmt: skip
    return front.bind(arguments, replica.bind(arguments))


def replica_options(arguments: Arguments) -> dict[str, Any]:
    """How Serve runs replicas."""
    options: dict[str, Any] = {
        "ray_actor_options": {"num_cpus": arguments.cpus, "num_gpus": arguments.gpus},
        "max_ongoing_requests": AHEAD * arguments.max_batch,
        "max_queued_requests": max(1, arguments.max_queue),
        "logging_config": LOGGING, "health_check_period_s": HEALTH_PERIOD, "health_check_timeout_s": HEALTH_TIMEOUT,
        "graceful_shutdown_timeout_s": arguments.drain_timeout, "graceful_shutdown_wait_loop_s": DRAIN_LOOP,
        "request_router_config": RequestRouterConfig(request_router_class=ROUTERS[arguments.routing]),
    }  # fmt: skip
    if arguments.max_replicas is None:
        return options | {"num_replicas": arguments.replicas}
    scaling = AutoscalingConfig(
        min_replicas=arguments.replicas, initial_replicas=arguments.replicas, max_replicas=arguments.max_replicas,
        target_ongoing_requests=arguments.target_requests or arguments.max_batch,
    )  # fmt: skip
    return options | {"autoscaling_config": scaling}
