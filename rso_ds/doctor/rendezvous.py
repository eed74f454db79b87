"""The ranks find each other, or each says what it saw of the way to the others."""

from __future__ import annotations

import contextlib
import os
import socket
import sys
import time
from collections.abc import Iterator, Sequence
from datetime import timedelta
from typing import Any

import torch.distributed as dist

from rso_ds.comm.launch import Launch
from rso_ds.doctor.interfaces import interfaces, route_to
from rso_ds.doctor.limits import in_short, limited
from rso_ds.doctor.report import FAILED, Finding
from rso_ds.errors import RSOError

# C++ ends its own waits; this much later the doctor ends them itself.
_GRACE = 5


class NotMet(RSOError):
    """Not all ranks came; ``finding`` has the diagnosis."""

    def __init__(self, finding: Finding):
        super().__init__(finding.found)
        self.finding = finding


def rendezvous(launch: Launch, seconds: float) -> None:
    """Make a gloo group of all ranks. Raises ``NotMet`` after ``seconds`` at most.

    In two steps, so that the words fit: rank 0 must be reached, and then every rank every other.
    """
    with _quiet():
        _meet(launch, seconds)


def _meet(launch: Launch, seconds: float) -> None:
    deadline = time.monotonic() + seconds
    try:
        store = limited(lambda: _store(launch, seconds), seconds + _GRACE)
    except Exception as error:
        raise NotMet(_unreached(launch, error)) from None
    try:
        absent = limited(lambda: _absent(store, launch, deadline), seconds + _GRACE)
    except (RuntimeError, TimeoutError):
        raise NotMet(_gone(launch)) from None
    if absent:
        raise NotMet(_incomplete(launch, absent, seconds))
    # Who has met has time to connect, however late the last one came.
    left = timedelta(seconds=max(5.0, deadline - time.monotonic()))

    def connect() -> None:
        dist.init_process_group("gloo", store=store, rank=launch.rank, world_size=launch.world_size, timeout=left)

    try:
        limited(connect, left.total_seconds() + _GRACE)
    except Exception as error:
        raise NotMet(_unconnected(launch, error)) from None
    dist.distributed_c10d._set_pg_timeout(timedelta(seconds=seconds), dist.group.WORLD)


def diagnosis(launch: Launch) -> str:
    """What this process sees of rank 0's address: its name, the way there, and whether anything listens."""
    where = f"{launch.master_addr}:{launch.master_port}"
    try:
        address = str(limited(lambda: socket.getaddrinfo(launch.master_addr, launch.master_port), 10)[0][4][0])
    except Exception as error:
        return f"{where} does not resolve here ({error})"
    try:
        route = route_to(address, launch.master_port, interfaces())
        through = f"through {route.name}" if route else "through an unknown interface"
    except OSError as error:
        return f"{where} is {address}, to which there is no route ({error.strerror})"
    try:
        socket.create_connection((address, launch.master_port), timeout=5).close()
        tcp = "TCP connects"
    except OSError as error:
        tcp = f"TCP does not connect ({error.strerror or error})"
    return f"{where} is {address}, {through}; {tcp}"


def _store(launch: Launch, seconds: float) -> Any:
    # torchrun's agent keeps a store of its own at this address, unless told not to share it.
    shared = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == str(True)
    store = dist.TCPStore(
        launch.master_addr,
        launch.master_port,
        launch.world_size,
        is_master=launch.rank == 0 and not shared,
        timeout=timedelta(seconds=seconds),
        wait_for_workers=False,
        multi_tenant=True,
    )
    return dist.PrefixStore(f"doctor/{os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}", store)


def _absent(store: Any, launch: Launch, deadline: float) -> list[int]:
    """Ranks that have not come by the deadline. Raises ``RuntimeError`` if rank 0 leaves meanwhile."""
    store.set(f"here/{launch.rank}", "")
    waiting = list(range(launch.world_size))
    while waiting:
        waiting = [rank for rank in waiting if not store.check([f"here/{rank}"])]
        if time.monotonic() > deadline:
            break
        time.sleep(0.1 if waiting else 0)
    return waiting


def _unreached(launch: Launch, error: Exception) -> Finding:
    if launch.rank == 0 and "EADDRINUSE" in str(error):
        text = f"rank 0 cannot listen at port {launch.master_port}: another process does"
        return Finding("meeting", FAILED, text, f"export MASTER_PORT={launch.master_port + 1}, on all ranks")
    remedy = "see that rank 0 runs, that all have its MASTER_ADDR and MASTER_PORT, and that no firewall is in between"
    text = f"rank {launch.rank} did not reach rank 0: {diagnosis(launch)}"
    if not isinstance(error, OSError):
        text += f"; {in_short(error)}"
    elif text.endswith("TCP connects"):
        text += ", but what listens there does not answer as torch's store does"
    return Finding("meeting", FAILED, text, remedy)


def _gone(launch: Launch) -> Finding:
    text = f"rank 0 left, or fell silent, while rank {launch.rank} waited for the others: {diagnosis(launch)}"
    return Finding("meeting", FAILED, text, "rank 0's report says which ranks did not come")


def _incomplete(launch: Launch, absent: Sequence[int], seconds: float) -> Finding:
    few = ", ".join(map(str, absent[:16])) + (f" and {len(absent) - 16} more" if len(absent) > 16 else "")
    text = (
        f"of {launch.world_size} ranks, these did not come within {seconds:g} s: {few}. Seen from here:"
        f" {diagnosis(launch)}"
    )
    return Finding("meeting", FAILED, text, "read the logs of the ranks that did not come; --timeout waits longer")


def _unconnected(launch: Launch, error: Exception) -> Finding:
    text = f"all ranks reached rank 0, but not each other: {in_short(error)}; this is {socket.gethostname()}"
    try:
        route = route_to(launch.master_addr, launch.master_port, interfaces())
    except OSError:
        route = None
    best = route.name if route and not route.loopback else "<interface to the other nodes>"
    return Finding("meeting", FAILED, text, f"export GLOO_SOCKET_IFNAME={best} on this node")


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without the stack traces that torch's C++ writes to stderr for what is raised as well; for good if it is, since
    threads left behind go on trying and writing."""
    sys.stderr.flush()
    kept, nothing = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    os.dup2(nothing, 2)
    os.close(nothing)
    yield
    os.dup2(kept, 2)
    os.close(kept)
