"""Bytes of every collective that this process really starts, whoever starts it.

Python code, DistributedDataParallel's C++ reducer, FSDP2 and DeepSpeed all reach a process group (gloo,
NCCL or another) through the operators of torch's ``c10d`` namespace. A kernel of ours in front of each
counts what it is handed and passes the call on, so that nothing has to be patched and nothing escapes.
"""

from __future__ import annotations

import os
import socket
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from rso_ds.comm.ring import wire_bytes

# What bytes are for. "gradient": reductions during backward; "weights": gathers of parameters; "boundary":
# everything at a subspace boundary; "evaluation": what validation sends; "other": norms, flags, set-up.
KINDS = ("gradient", "weights", "boundary", "evaluation", "other")
BACKWARD = "backward"  # a phase, for engines that reduce gradients outside autograd's own threads
SCOPES = ("intra-node", "inter-node", "unknown")

_OPERATORS = {
    "allreduce_": "all_reduce",
    "allreduce_coalesced_": "all_reduce",
    "allgather_": "all_gather",
    "_allgather_base_": "all_gather",
    "allgather_coalesced_": "all_gather",
    "allgather_into_tensor_coalesced_": "all_gather",
    "reduce_scatter_": "reduce_scatter",
    "_reduce_scatter_base_": "reduce_scatter",
    "reduce_scatter_tensor_coalesced_": "reduce_scatter",
    "broadcast_": "broadcast",
    "reduce_": "reduce",
    "gather_": "gather",
    "scatter_": "scatter",
    "alltoall_": "all_to_all",
    "alltoall_base_": "all_to_all",
    "send": "send",
}
_REDUCTIONS = ("all_reduce", "reduce", "all_to_all")
# A reduction of this few elements during backward is a norm or an overflow flag, not a gradient.
_SCALARS = 4


@dataclass(frozen=True)
class Traffic:
    """A way of sending: ``kind`` of KINDS, ``scope`` of SCOPES (whether the group spans nodes), ``op`` as in
    ``torch.distributed``."""

    kind: str
    scope: str
    op: str


class CommCounter:
    """Payload and wire bytes of this rank by ``Traffic``, growing from ``install`` on.

    Payload is the size of what the rank hands to the collective: the whole tensor for reductions, its own
    piece for gathers. Wire bytes are what a ring algorithm then makes this rank send (``rso_ds.comm.ring``).
    Groups of one rank count nothing.
    """

    def __init__(self) -> None:
        self.payload: Counter[Traffic] = Counter()
        self.wire: Counter[Traffic] = Counter()
        self.calls: Counter[Traffic] = Counter()
        self._phase: str | None = None
        self._nodes: list[str] | None = None
        self._groups: dict[str, tuple[int, str]] = {}
        self._labels: dict[str, str] = {}

    @contextmanager
    def phase(self, kind: str) -> Iterator[None]:
        """Count all that is started inside as ``kind`` of KINDS; BACKWARD makes gradients of reductions only."""
        before, self._phase = self._phase, kind
        try:
            yield
        finally:
            self._phase = before

    def label(self, group: Any, kind: str) -> None:
        """Count all that is sent in ``group`` as ``kind``, whatever else goes on at the time."""
        self._labels[group.group_name] = kind

    def learn_nodes(self) -> None:
        """Exchange node names, so that scopes are known. All ranks of the default group call this together.

        Ranks are on one node if host name and boot are equal; the environment variable RSO_DS_NODE
        overrides both.
        """
        names: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(names, node_name())
        self._nodes, self._groups = names, {}

    @property
    def node_count(self) -> int:
        """Nodes of the run; 1 before ``learn_nodes``."""
        return len(set(self._nodes or [""]))

    def total(self, kind: str | None = None, scope: str | None = None, wire: bool = False) -> int:
        """Bytes so far of one kind, one scope, or all."""
        source = self.wire if wire else self.payload
        return round(sum(n for t, n in source.items() if kind in (None, t.kind) and scope in (None, t.scope)))

    def by_kind(self, scope: str | None = None) -> dict[str, int]:
        """Payload bytes so far of each of KINDS."""
        return {kind: self.total(kind, scope) for kind in KINDS}

    def table(self) -> list[dict[str, Any]]:
        """One JSON object for each ``Traffic`` seen, with calls, payload and wire bytes."""
        rows = sorted(self.payload, key=lambda t: (KINDS.index(t.kind), t.scope, t.op))
        return [
            {**vars(t), "calls": self.calls[t], "payload_bytes": self.payload[t], "wire_bytes": round(self.wire[t])}
            for t in rows
        ]

    def count(self, op: str, tensors: list[Tensor], group: Any) -> None:
        """Called for each collective before it starts."""
        ranks, scope = self._group(group)
        if ranks == 1:
            return
        payload = sum(t.numel() * t.element_size() for t in tensors)
        label = self._labels.get(dist.ProcessGroup.unbox(group).group_name) if self._labels else None
        traffic = Traffic(label or self._kind(op, tensors), scope, op)
        self.calls[traffic] += 1
        self.payload[traffic] += payload
        self.wire[traffic] += wire_bytes(op, payload, ranks)  # type: ignore[assignment]

    def _kind(self, op: str, tensors: list[Tensor]) -> str:
        if self._phase in KINDS:
            return self._phase
        if op == "reduce_scatter":
            return "gradient"
        if sum(t.numel() for t in tensors) <= _SCALARS or tensors[0].dtype == torch.uint8:  # Python objects are uint8
            return "other"
        if op == "all_gather":
            return "weights"
        # A task id is set in threads that are running a backward pass; callbacks of hooks have threads of their own.
        elsewhere = threading.current_thread() is not threading.main_thread()
        backward = self._phase == BACKWARD or elsewhere or torch._C._current_graph_task_id() != -1
        return "gradient" if backward and op in _REDUCTIONS else "other"

    def _group(self, script_group: Any) -> tuple[int, str]:
        """(ranks, scope) of a process group."""
        group = dist.ProcessGroup.unbox(script_group)
        name = group.group_name
        if name not in self._groups:
            ranks = dist.get_process_group_ranks(group)
            if self._nodes is None or max(ranks) >= len(self._nodes):
                return len(ranks), "unknown"
            spans = len({self._nodes[rank] for rank in ranks}) > 1
            self._groups[name] = (len(ranks), "inter-node" if spans else "intra-node")
        return self._groups[name]


_counter: CommCounter | None = None
_library: torch.library.Library | None = None


def install() -> CommCounter:
    """The counter of this process; from the first call on it sees every collective."""
    global _counter, _library
    if _counter is None:
        _counter = CommCounter()
        _library = torch.library.Library("c10d", "IMPL")
        for name, op in _OPERATORS.items():
            if hasattr(torch.ops.c10d, name):
                # BackendSelect comes before every device's own kernel, and after autograd and autocast.
                _library.impl(name, _counting(name, op, _counter), "BackendSelect", with_keyset=True)
    return _counter


def _counting(name: str, op: str, counter: CommCounter) -> Callable[..., Any]:
    overload = getattr(torch.ops.c10d, name).default
    arguments = [a.name for a in overload._schema.arguments]
    group_at = arguments.index("process_group")
    below = torch._C._dispatch_keyset_full_after(torch._C.DispatchKey.BackendSelect)

    def counted(keyset: Any, *args: Any, **kwargs: Any) -> Any:
        # The input is the last tensor argument: outputs, where there are separate ones, come first.
        counter.count(op, _flat(args[group_at - 1]), args[group_at])
        return overload.redispatch(keyset & below, *args, **kwargs)

    return counted


def _flat(tensors: Any) -> list[Tensor]:
    if isinstance(tensors, Tensor):
        return [tensors]
    return [t for item in tensors for t in _flat(item)]


def node_name() -> str:
    if "RSO_DS_NODE" in os.environ:
        return os.environ["RSO_DS_NODE"]
    boot = Path("/proc/sys/kernel/random/boot_id")
    return f"{socket.gethostname()}:{boot.read_text().strip() if boot.exists() else ''}"
