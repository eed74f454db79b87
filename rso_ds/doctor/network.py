"""Whether this node can be found, and finds the others: names, interfaces, InfiniBand."""

from __future__ import annotations

import os
import resource
import socket
from pathlib import Path

from rso_ds.comm.launch import Launch
from rso_ds.doctor.interfaces import Interface, interfaces, route_to
from rso_ds.doctor.report import FAILED, NOT_CHECKED, OK, WARNING, Finding


def check_network(launch: Launch, on_gpu: bool) -> list[Finding]:
    """Names, interfaces, InfiniBand."""
    known = interfaces()
    several = spans_nodes(launch)
    route, findings = _master(launch, known)
    findings += _hostname(several, route)
    findings += _variable("GLOO_SOCKET_IFNAME", known, route, fatal=True)
    findings += _variable("NCCL_SOCKET_IFNAME", known, route, fatal=on_gpu)
    if several is not False:
        findings += _choice(known, route, "NCCL_SOCKET_IFNAME" if on_gpu else "GLOO_SOCKET_IFNAME")
    return findings + check_infiniband()


def spans_nodes(launch: Launch) -> bool | None:
    """Whether the ranks are on several nodes, None where the launcher does not say."""
    if launch.world_size == 1 or launch.local_world_size is not None:
        return launch.world_size > (launch.local_world_size or 1)
    return False if launch.master_addr in ("localhost", "127.0.0.1", "::1") else None


def chosen(pattern: str, names: list[str]) -> list[str]:
    """Interfaces that NCCL takes for a value of NCCL_SOCKET_IFNAME: prefixes, "=" for whole names, "^" for all but."""
    rest = pattern.removeprefix("^")
    exact = rest.startswith("=")
    wanted = [part for part in rest.removeprefix("=").split(",") if part]
    hits = [n for n in names if any(n == w if exact else n.startswith(w) for w in wanted)]
    return [n for n in names if n not in hits] if pattern.startswith("^") else hits


def check_infiniband(root: Path = Path("/sys/class/infiniband")) -> list[Finding]:
    """Active ports, and whether memory may be pinned for them."""
    ports = []
    for state in sorted(root.glob("*/ports/*/state")):
        if "ACTIVE" in state.read_text():
            rate = state.with_name("rate")
            ports.append(f"{state.parts[-4]} ({rate.read_text().strip() if rate.exists() else 'rate unknown'})")
    if not ports:
        down = root.is_dir() and any(root.iterdir())
        return [Finding("InfiniBand", WARNING if down else OK, "no port is active" if down else "no devices")]
    soft, _ = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    text = ", ".join(ports)
    if soft == resource.RLIM_INFINITY:
        return [Finding("InfiniBand", OK, f"{text}; locked memory is unlimited")]
    remedy = "ulimit -l unlimited; docker run --ulimit memlock=-1; SLURM: PropagateResourceLimitsExcept=MEMLOCK"
    return [Finding("InfiniBand", WARNING, f"{text}, but only {soft // 1024} KiB of memory may be locked", remedy)]


def _master(launch: Launch, known: dict[str, Interface]) -> tuple[Interface | None, list[Finding]]:
    if launch.world_size == 1:
        return None, [Finding("MASTER_ADDR", NOT_CHECKED, "one rank only")]
    where = f"{launch.master_addr}:{launch.master_port}"
    try:
        address = str(socket.getaddrinfo(launch.master_addr, launch.master_port)[0][4][0])
    except OSError as error:
        text = f"{launch.master_addr} does not resolve here: {error.strerror}"
        return None, [Finding("MASTER_ADDR", FAILED, text, "export MASTER_ADDR as an address, or add it to /etc/hosts")]
    if address.startswith("127.") and spans_nodes(launch):
        text = f"{where} is {address} here: this node itself, but ranks run on several"
        return None, [Finding("MASTER_ADDR", FAILED, text, "export MASTER_ADDR=<address of rank 0's node>")]
    try:
        route = route_to(launch.master_addr, launch.master_port, known)
    except OSError as error:
        text = f"{where} ({address}): {error.strerror}"
        return None, [Finding("MASTER_ADDR", FAILED, text, f"give this node a route: ip route get {address}")]
    through = f"through {route.name}, {route.rate}" if route else "through an unknown interface"
    return route, [Finding("MASTER_ADDR", OK, f"{where} is {address}, {through}")]


def _hostname(several: bool | None, route: Interface | None) -> list[Finding]:
    """A rank of gloo tells the others the address of its host's name, unless GLOO_SOCKET_IFNAME is set."""
    name = socket.gethostname()
    try:
        address = str(socket.getaddrinfo(name, None)[0][4][0])
        text, local = f"{name} is {address}", address.startswith("127.") or address == "::1"
    except OSError:
        text, local = f"{name} does not resolve, so that gloo takes 127.0.0.1", True
    if not local or several is False or "GLOO_SOCKET_IFNAME" in os.environ:
        return [Finding("hostname", OK, text)]
    best = route.name if route and not route.loopback else "<interface>"
    text += ": other nodes would be told so, and fail to connect"
    remedy = f"export GLOO_SOCKET_IFNAME={best}, or correct /etc/hosts"
    return [Finding("hostname", FAILED if several else WARNING, text, remedy)]


def _variable(key: str, known: dict[str, Interface], route: Interface | None, fatal: bool) -> list[Finding]:
    value = os.environ.get(key)
    if value is None:
        return []
    names = list(known)
    usable = [n for n in names if known[n].up and known[n].addresses]
    there = ", ".join(n for n in usable if not known[n].loopback) or "none"
    best = route.name if route and not route.loopback else "<interface>"
    status, remedy = FAILED if fatal else WARNING, f"export {key}={best}"
    if key.startswith("GLOO"):
        wanted = value.split(",")
        absent = [n for n in wanted if n not in names]
        down = [n for n in wanted if n in names and n not in usable]
        if absent:
            text = f"{key}={value}: there is no {', '.join(absent)} here; up are: {there}"
            return [Finding(key, status, text, remedy)]
        if down:
            return [Finding(key, status, f"{key}={value}: {', '.join(down)} is down or has no address", remedy)]
        return [Finding(key, OK, f"{value}, {', '.join(known[n].rate for n in wanted)}")]
    hits = chosen(value, usable)
    if not hits:
        return [Finding(key, status, f"{key}={value} matches nothing that is up; up are: {there}", remedy)]
    return [Finding(key, OK, f"{value}: {', '.join(f'{n}, {known[n].rate}' for n in hits)}")]


def _choice(known: dict[str, Interface], route: Interface | None, key: str) -> list[Finding]:
    candidates = [interface for interface in known.values() if interface.candidate]
    if key in os.environ or len(candidates) < 2:
        return []
    names = ", ".join(f"{i.name} ({i.rate})" for i in candidates)
    best = route.name if route and not route.loopback else "<interface>"
    text = f"{len(candidates)} interfaces lead elsewhere: {names}; {key} is not set, so the choice is left to chance"
    return [Finding("interfaces", WARNING, text, f"export {key}={best}")]
