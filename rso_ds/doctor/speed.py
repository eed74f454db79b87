"""How fast ranks add up tensors, inside nodes and between them, and whether the sum is right."""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from rso_ds.comm.outcome import gathered
from rso_ds.comm.ring import wire_bytes
from rso_ds.doctor.report import FAILED, OK, WARNING, Finding
from rso_ds.doctor.together import Facts, members
from rso_ds.units import MB, in_unit

_PROBE = 2**18  # elements of the trial that says how long the real ones will take
_SECONDS, _FEWEST, _MOST = 3.0, 3, 20  # of measuring each size, and its repeats
_SMALL_REPEATS = 30


@dataclass(frozen=True)
class Speed:
    """All-reduce in one group. ``bandwidths``: bytes/s that cross each rank's link in a ring, of each repeat;
    ``latency``: seconds of a 4-byte one, median; ``megabytes`` of fp32, less than asked for where the link is slow."""

    scope: str
    ranks: int
    backend: str
    megabytes: float
    bandwidths: tuple[float, ...]
    latency: float
    right: bool

    @property
    def median(self) -> float:
        return statistics.median(self.bandwidths)


def measure(everyone: Sequence[Facts], device: torch.device, megabytes: float, seconds: float) -> list[Speed]:
    """One ``Speed`` for each node with several ranks and one between the nodes, on all ranks, who call this together.

    ``seconds``: how long a collective may take.
    """
    nodes = members(everyone)
    backend = "nccl" if device.type == "cuda" else "gloo"
    plans = [(f"inside {everyone[ranks[0]].host}", ranks) for ranks in nodes.values() if len(ranks) > 1]
    if len(nodes) > 1:
        plans.append(("between nodes", [ranks[0] for ranks in nodes.values()]))
    mine = []
    for scope, ranks in plans:
        group = dist.new_group(ranks, timeout=timedelta(seconds=seconds), backend=backend)
        if dist.get_rank() in ranks:
            speed = _measure(scope, group, ranks, backend, device, megabytes, seconds)
            if dist.get_rank() == ranks[0]:
                mine.append(speed)
    return [speed for speeds in gathered(mine) for speed in speeds]


def findings_of(speeds: Sequence[Speed], link: float | None) -> list[Finding]:
    """``link``: bytes/s between nodes as promised, None if not known."""
    findings = []
    for speed in speeds:
        name = f"all-reduce {speed.scope}"
        text = (
            f"{_rate(speed.median)} ({_rate(min(speed.bandwidths))} to {_rate(max(speed.bandwidths))} in"
            f" {len(speed.bandwidths)} of {speed.megabytes:g} MB), {speed.latency * 1e6:.0f} us for 4 bytes;"
            f" {speed.backend}, {speed.ranks} ranks"
        )
        if not speed.right:
            remedy = "take this node out; NCCL: try NCCL_P2P_DISABLE=1, then NCCL_IB_DISABLE=1, to see which link errs"
            findings.append(Finding(name, FAILED, f"the sum is WRONG; {text}", remedy))
        elif link is not None and speed.scope == "between nodes" and speed.median < link / 2:
            remedy = "see which interface is used (NCCL_SOCKET_IFNAME, GLOO_SOCKET_IFNAME), and who else uses the link"
            findings.append(Finding(name, WARNING, f"{text}: less than half of {_rate(link)}", remedy))
        else:
            findings.append(Finding(name, OK, f"{text}; sum correct"))
    return findings


def _measure(
    scope: str,
    group: Any,
    ranks: Sequence[int],
    backend: str,
    device: torch.device,
    megabytes: float,
    seconds: float,
) -> Speed:
    elements = max(1, round(megabytes * MB / 4))
    right = _sum_is_right(group, ranks, device, min(elements, _PROBE))
    zeros = torch.zeros(min(elements, _PROBE), device=device)
    per_element = min(_timed(zeros, group, 2)) / zeros.numel()
    # All members must take the same decisions: those of the first.
    plan: list[Any] = [_plan(elements, per_element, seconds)]
    dist.broadcast_object_list(plan, src=ranks[0], group=group, device=device if backend == "nccl" else None)
    elements, repeats = plan[0]
    right &= _sum_is_right(group, ranks, device, elements)
    times = _timed(torch.zeros(elements, device=device), group, repeats)
    small = _timed(torch.zeros(1, device=device), group, _SMALL_REPEATS)
    verdict = torch.tensor([int(right)], device=device)
    dist.all_reduce(verdict, op=dist.ReduceOp.MIN, group=group)
    sent = wire_bytes("all_reduce", elements * 4, len(ranks))
    return Speed(
        scope,
        len(ranks),
        backend,
        round(elements * 4 / MB, 3),
        tuple(sent / t for t in times),
        statistics.median(small),
        bool(verdict.item()),
    )


def _plan(elements: int, per_element: float, seconds: float) -> tuple[int, int]:
    """(elements, repeats): halved until one takes a tenth of what is allowed, and some three seconds in all."""
    while elements > _PROBE and elements * per_element > seconds / 10:
        elements //= 2
    return elements, max(_FEWEST, min(_MOST, int(_SECONDS / max(elements * per_element, 1e-9))))


def _sum_is_right(group: Any, ranks: Sequence[int], device: torch.device, elements: int) -> bool:
    """Small whole numbers, another pattern on each rank: fp32 adds them without rounding, in any order."""
    pattern = torch.arange(elements, device=device).remainder_(251).float()
    factors = [1 + i % 16 for i in range(len(ranks))]
    x = pattern * factors[ranks.index(dist.get_rank())]
    dist.all_reduce(x, group=group)
    return bool(torch.equal(x, pattern * sum(factors)))


def _timed(x: torch.Tensor, group: Any, repeats: int) -> list[float]:
    """Seconds of each repeat, after one that does not count."""
    times = []
    for _ in range(repeats + 1):
        if x.is_cuda:
            torch.cuda.synchronize(x.device)
        began = time.perf_counter()
        dist.all_reduce(x, group=group)
        if x.is_cuda:
            torch.cuda.synchronize(x.device)
        times.append(time.perf_counter() - began)
    return times[1:]


def _rate(bytes_per_second: float) -> str:
    return f"{in_unit(bytes_per_second, 'GB', '.3g')}/s"
