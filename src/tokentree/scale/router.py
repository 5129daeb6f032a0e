"""Serve's choice of a replica, by what each has read before."""

from __future__ import annotations

from typing import Any

from ray.serve.request_router import PendingRequest, ReplicaID, ReplicaResult, RequestRouter, RunningReplica

from tokentree.scale.beginnings import SLACK, Beginnings, Marks, ranked


class ByBeginning(RequestRouter):
    """A request goes where its beginning is known: see `beginnings.ranked`. What is known is what this router itself
    has sent there lately, so nothing is asked of replicas."""

    def initialize_state(self, slack: int = SLACK) -> None:
        """Called by Serve, with ``request_router_kwargs``.

        Args:
            slack: how many requests more than the least busy replica one may have.
        """
        self._slack, self._beginnings = slack, Beginnings()

    async def choose_replicas(
        self, candidate_replicas: list[RunningReplica], pending_request: PendingRequest | None = None
    ) -> list[list[RunningReplica]]:
        """Each replica alone in a rank, the best one first. Serve takes the first one with room."""
        by_name = {replica.replica_id.unique_id: replica for replica in candidate_replicas}
        marks, cache = _marks(pending_request), self.replica_queue_len_cache
        ongoing = {name: cache.get(replica.replica_id) or 0 for name, replica in by_name.items()}
        names = ranked(ongoing, self._beginnings.known(marks), marks, self._slack)
        return [[by_name[name]] for name in names]

    def on_request_routed(self, pending_request: PendingRequest, replica_id: ReplicaID, result: ReplicaResult) -> None:
        """Remembers what the replica reads now."""
        self._beginnings.learn(_marks(pending_request), replica_id.unique_id)

    def on_replica_actor_died(self, replica_id: ReplicaID) -> None:
        super().on_replica_actor_died(replica_id)
        self._beginnings.forget(replica_id.unique_id)

    def update_replicas(self, replicas: list[RunningReplica]) -> None:
        there = {replica.replica_id for replica in replicas}
        for gone in self.curr_replicas.keys() - there:
            self._beginnings.forget(gone.unique_id)
        super().update_replicas(replicas)


def _marks(request: PendingRequest | None) -> Marks:
    """The first argument of `Replica.answer`; other methods have none."""
    args: list[Any] = list(request.args) if request is not None else []
    return args[0] if args else ()
