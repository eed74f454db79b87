"""What only shows when ranks compare: who they are, what they run, and what time it is."""

from __future__ import annotations

import os
import socket
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist

from rso_ds.comm.agreement import code_digest
from rso_ds.comm.counter import node_name
from rso_ds.comm.launch import Launch
from rso_ds.doctor.gpus import gpu_uuid
from rso_ds.doctor.report import FAILED, OK, WARNING, Finding, ranks_text
from rso_ds.doctor.software import versions

_PREFIXES = ("NCCL_", "GLOO_", "TORCH_", "DS_", "OMP_NUM_THREADS")
_ROUND_TRIPS = 5
_WARN_SECONDS, _FAIL_SECONDS = 1.0, 60.0


@dataclass(frozen=True)
class Facts:
    """One rank, as it describes itself. ``node`` is unique, ``host`` for reading; ``config``: leaves of the JSON."""

    host: str
    node: str
    local_rank: int
    gpu: str | None
    versions: Mapping[str, str | None]
    code: str
    config: Mapping[str, Any]
    variables: Mapping[str, str] = field(default_factory=dict)


def facts(launch: Launch, config: Mapping[str, Any] | None) -> Facts:
    """Of this process."""
    return Facts(
        socket.gethostname(),
        node_name(),
        launch.local_rank,
        gpu_uuid(launch.local_rank),
        versions(),
        code_digest(),
        _leaves(config or {}),
        {key: value for key, value in os.environ.items() if key.startswith(_PREFIXES)},
    )


def check_agreement(everyone: Sequence[Facts]) -> list[Finding]:
    """Same software, code, JSON and variables; what differs is named with its ranks. Variables only warn: interfaces
    may have other names on other nodes."""
    parts: tuple[tuple[str, str, list[Mapping[str, Any]], str], ...] = (
        (
            "versions",
            FAILED,
            [f.versions for f in everyone],
            "install the same on all nodes, or on a shared file system",
        ),
        ("code of rso_ds", FAILED, [{"hash": f.code} for f in everyone], "use one checkout for all nodes"),
        ("DeepSpeed JSON", FAILED, [f.config for f in everyone], "give all ranks the same file"),
        ("variables", WARNING, [f.variables for f in everyone], "export them where all ranks are started from"),
    )
    findings = []
    for name, status, values, remedy in parts:
        differing = [text for key in _keys(values) if (text := _difference(key, [v.get(key) for v in values]))]
        if differing:
            findings.append(Finding(f"same {name}", status, "; ".join(differing), remedy))
        elif name != "DeepSpeed JSON" or values[0]:
            findings.append(Finding(f"same {name}", OK, f"on all {len(everyone)} ranks"))
    return findings


def check_placement(everyone: Sequence[Facts]) -> list[Finding]:
    """Ranks on nodes: as many on each, every one with a GPU of its own, no two nodes of one name."""
    nodes = members(everyone)
    sizes = Counter(len(ranks) for ranks in nodes.values())
    layout = ", ".join(f"{count} node(s) with {size} rank(s)" for size, count in sizes.items())
    findings = [Finding("placement", OK, layout)]
    if len(sizes) > 1:
        odd = "; ".join(f"{everyone[ranks[0]].host} has {len(ranks)}" for ranks in list(nodes.values())[:8])
        remedy = "start as many ranks on each node: --nproc-per-node, --ntasks-per-node, slots in the hostfile"
        findings = [Finding("placement", WARNING, f"{layout}: {odd}", remedy)]
    for host, count in Counter(everyone[ranks[0]].host for ranks in nodes.values()).items():
        if count > 1:
            text = f"{count} nodes call themselves {host}"
            findings.append(Finding("node names", WARNING, text, "give nodes names of their own: hostnamectl hostname"))
    for ranks in nodes.values():
        host = everyone[ranks[0]].host
        for gpu, sharing in _shared([everyone[rank].gpu for rank in ranks], ranks).items():
            text = f"{ranks_text(sharing)} on {host} share the GPU {gpu}"
            findings.append(
                Finding("own GPU", FAILED, text, "give each rank of a node its own LOCAL_RANK, or fewer ranks")
            )
        if all(everyone[rank].gpu is None for rank in ranks):
            for local, sharing in _shared([everyone[rank].local_rank for rank in ranks], ranks).items():
                text = f"{ranks_text(sharing)} on {host} all have local rank {local}"
                findings.append(Finding("local ranks", WARNING, text, "export LOCAL_RANK, from 0 on each node"))
    return findings


def check_clocks(everyone: Sequence[Facts]) -> tuple[list[Finding], list[float]]:
    """Offset in seconds of each node's clock against rank 0's, by the quickest of a few round trips. All ranks call
    this together."""
    firsts = [ranks[0] for ranks in members(everyone).values()]
    box: list[Any] = [_offsets(firsts)]
    dist.broadcast_object_list(box, src=0)
    offsets: dict[int, tuple[float, float]] = box[0]
    findings = []
    for rank, (offset, trip) in offsets.items():
        if abs(offset) > _WARN_SECONDS:
            text = (
                f"{everyone[rank].host} is {abs(offset):.1f} s {'ahead of' if offset > 0 else 'behind'} rank 0's node"
            )
            status = FAILED if abs(offset) > _FAIL_SECONDS else WARNING
            findings.append(Finding("clocks", status, f"{text} (round trip {trip * 1e6:.0f} us)", "chronyc makestep"))
    worst = max((abs(offset) for offset, _ in offsets.values()), default=0.0)
    text = f"{len(firsts)} node(s) within {max(1.0, worst * 1e3):.0f} ms of rank 0's" if offsets else "one node"
    return findings or [Finding("clocks", OK, text)], [offset for offset, _ in offsets.values()]


def members(everyone: Sequence[Facts]) -> dict[str, list[int]]:
    """Ranks of each node, in order."""
    nodes: dict[str, list[int]] = {}
    for rank, one in enumerate(everyone):
        nodes.setdefault(one.node, []).append(rank)
    return nodes


def _offsets(firsts: Sequence[int]) -> dict[int, tuple[float, float]]:
    """{rank: (seconds ahead of rank 0, seconds of the round trip)}, known to rank 0 only."""
    me = dist.get_rank()
    found: dict[int, tuple[float, float]] = {}
    for rank in firsts:
        if rank == 0 or me not in (0, rank):
            continue
        stamp = torch.zeros(1, dtype=torch.int64)
        if me == rank:
            for _ in range(_ROUND_TRIPS):
                dist.recv(stamp, 0)
                dist.send(torch.tensor([clock()]), 0)
            continue
        trips = []
        for _ in range(_ROUND_TRIPS):
            began = clock()
            dist.send(stamp, rank)
            dist.recv(stamp, rank)
            ended = clock()
            trips.append(((ended - began) / 1e9, (int(stamp) - (began + ended) / 2) / 1e9))
        trip, offset = min(trips)
        found[rank] = (offset, trip)
    return found


def clock() -> int:
    """Nanoseconds of the node's clock."""
    return time.time_ns()


def _shared(values: Sequence[Any], ranks: Sequence[int]) -> dict[Any, list[int]]:
    sharing: dict[Any, list[int]] = {}
    for value, rank in zip(values, ranks, strict=True):
        if value is not None:
            sharing.setdefault(value, []).append(rank)
    return {value: members for value, members in sharing.items() if len(members) > 1}


def _keys(values: Sequence[Mapping[str, Any]]) -> list[str]:
    return list(dict.fromkeys(key for value in values for key in value))


def _difference(key: str, values: Sequence[Any]) -> str | None:
    """ "torch: 2.6.0 on rank 3, 2.7.1 on ranks 0-2": the exceptions first."""
    if all(value == values[0] for value in values):
        return None
    sharing: dict[str, list[int]] = {}
    for rank, value in enumerate(values):
        sharing.setdefault("absent" if value is None else str(value), []).append(rank)
    parts = sorted(sharing.items(), key=lambda item: len(item[1]))
    if len(parts) == len(values):
        parts.sort(key=lambda item: item[1])
    return f"{key}: " + ", ".join(f"{value} on {ranks_text(ranks)}" for value, ranks in parts[:4])


def _leaves(block: Any, at: str = "") -> dict[str, Any]:
    """{"optimizer.params.lr": 0.004}"""
    if isinstance(block, Mapping) and block:
        return {k: v for key, value in block.items() for k, v in _leaves(value, f"{at}.{key}" if at else key).items()}
    return {at: str(block)} if at else {}
