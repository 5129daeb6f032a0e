"""Nothing but this machine may reach the processes of replicas that run on it alone."""

from __future__ import annotations

from functools import partial
from typing import Any

import ray
from ray.serve._private import replica

HERE = "127.0.0.1"


def listen_here() -> None:
    """Where Ray listens to this machine alone, Serve does so too. By itself it opens a port of each replica on all
    addresses, for calls that aren't made here; whoever has Ray's secret could run code through it. To be called before
    the replica is ready, since the port is opened then."""
    if ray.util.get_node_ip_address() == HERE:
        replica.add_port_to_grpc_server = partial(_add, replica.add_port_to_grpc_server)


def _add(add: Any, server: Any, address: str) -> int:
    port: int = add(server, address.replace("[::]", HERE))
    return port
