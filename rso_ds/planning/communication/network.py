"""How long an exchange takes: the alpha-beta model, a latency for every round and a rate for the bytes."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from rso_ds.comm.ring import rounds, wire_bytes
from rso_ds.errors import RSOConfigError
from rso_ds.planning.communication.exchange import Deployment, Transfer

_UNITS = {"bit": 0.125, "b": 0.125, "bytes": 1.0, "byte": 1.0, "B": 1.0}
_PREFIXES = {"": 1.0, "K": 1e3, "k": 1e3, "M": 1e6, "G": 1e9, "T": 1e12}


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


def bytes_per_second(text: str) -> float:
    """``10Gbit``, ``25Gbit/s``, ``300GB/s`` as bytes a second. Raises ``RSOConfigError``."""
    match = re.fullmatch(r"([0-9.]+)\s*([KkMGT]?)(bits?|bytes?|b|B)(ps|/s)?", text.strip())
    try:
        value = float(match[1]) if match else 0.0
    except ValueError:
        value = 0.0
    if not match or value <= 0:
        raise RSOConfigError(f"{text!r} is not a rate: write it as 10Gbit or 300GB/s.")
    unit = match[3].removesuffix("s") if len(match[3]) > 1 else match[3]
    return value * _PREFIXES[match[2]] * _UNITS[unit]
