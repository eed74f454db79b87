"""What a collective costs on the wire, from the bytes that a rank hands to it."""

from __future__ import annotations

# Bytes a rank sends with the ring algorithm, per byte of payload, as functions of the ranks n. Payload is
# the whole tensor for all_reduce, reduce_scatter, broadcast and reduce; the rank's own piece for gathers.
_SENT = {
    "all_reduce": lambda n: 2 * (n - 1) / n,
    "reduce_scatter": lambda n: (n - 1) / n,
    "all_gather": lambda n: n - 1,
    "all_to_all": lambda n: (n - 1) / n,
    "broadcast": lambda n: (n - 1) / n,
    "reduce": lambda n: (n - 1) / n,
    "gather": lambda n: (n - 1) / n,
    "scatter": lambda n: (n - 1) / n,
    "send": lambda n: 1.0,
}
# Messages that follow one another before the last rank has its result.
_ROUNDS = {"all_reduce": 2}


def wire_bytes(op: str, payload: float, ranks: int) -> float:
    """Mean bytes that each of ``ranks`` ranks sends for one collective of ``payload`` bytes a rank.

    ``op`` is a name of ``torch.distributed`` (``all_reduce``, ``reduce_scatter``, ...). Ring and
    bandwidth-optimal tree algorithms (gloo, NCCL) send this much; others send more.
    """
    return payload * _SENT[op](ranks)


def rounds(op: str, ranks: int) -> int:
    """Latencies on the critical path of a ring collective."""
    return _ROUNDS.get(op, 1) * (ranks - 1)
