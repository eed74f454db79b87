"""How long an exchange takes: the alpha-beta model, a latency for every round and a rate for the bytes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from rso_ds.comm.ring import rounds, wire_bytes
from rso_ds.planning.communication.exchange import Deployment, Transfer


@dataclass(frozen=True)
class Network:
    """``nodes`` equal nodes. ``link``: bytes/s of one node to the others, each way; ``intra_link``: of one GPU
    to another in its node. Latencies in seconds, per round of a collective."""

    nodes: int
    link: float
    intra_link: float
    latency: float = 20e-6
    intra_latency: float = 5e-6

    def seconds(self, transfers: Sequence[Transfer], deployment: Deployment) -> float:
        """Time of all ``transfers`` of a step, one after another, nothing hidden behind computation."""
        return sum(self._one(t, deployment) for t in transfers)

    def crossing(self, transfers: Sequence[Transfer], deployment: Deployment) -> float:
        """Bytes that each node sends to other nodes in a step."""
        return sum(self._crossing(t, deployment) for t in transfers)

    def _one(self, transfer: Transfer, deployment: Deployment) -> float:
        ranks, spans, _ = self._group(transfer, deployment)
        if ranks == 1:
            return 0.0
        inside = wire_bytes(transfer.op, transfer.payload, ranks) / self.intra_link
        if not spans:
            return inside + transfer.calls * rounds(transfer.op, ranks) * self.intra_latency
        across = self._crossing(transfer, deployment) / self.link
        return max(inside, across) + transfer.calls * rounds(transfer.op, ranks) * self.latency

    def _crossing(self, transfer: Transfer, deployment: Deployment) -> float:
        ranks, spans, groups = self._group(transfer, deployment)
        # In a ring that visits a node's ranks one after another, one rank a node sends to another node.
        return groups * wire_bytes(transfer.op, transfer.payload, ranks) if spans and ranks > 1 else 0.0

    def _group(self, transfer: Transfer, deployment: Deployment) -> tuple[int, bool, int]:
        """(ranks of a group, whether it spans nodes, groups that share one node's link)."""
        per_node = deployment.engine.gpus // self.nodes
        if transfer.over == "replicas":
            return deployment.replicas, self.nodes > 1, min(per_node, deployment.shards)
        ranks = deployment.engine.gpus
        if transfer.over == "shards":
            ranks = deployment.hpz if deployment.hpz > 1 else deployment.shards
        return ranks, ranks > per_node, max(1, per_node // ranks)
