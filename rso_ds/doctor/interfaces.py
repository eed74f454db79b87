"""Network interfaces of this machine, from the kernel: names, addresses, state, speed, and routes."""

from __future__ import annotations

import array
import fcntl
import socket
import struct
from dataclasses import dataclass
from pathlib import Path

_SIOCGIFCONF, _SIOCGIFFLAGS = 0x8912, 0x8913
_UP, _LOOPBACK = 0x1, 0x8
# Bridges and ends of containers on this machine: no way to another node.
_INTERNAL = ("docker", "virbr", "br-", "veth", "cni", "flannel", "cali", "tun", "podman", "lxc")


@dataclass(frozen=True)
class Interface:
    """``speed``: Mbit/s as the driver says, None where it does not."""

    name: str
    addresses: tuple[str, ...]
    up: bool
    loopback: bool
    speed: int | None

    @property
    def candidate(self) -> bool:
        """Whether it may lead to another node."""
        return self.up and not self.loopback and bool(self.addresses) and not self.name.startswith(_INTERNAL)

    @property
    def rate(self) -> str:
        return f"{self.speed / 1000:g} Gbit/s" if self.speed else "speed unknown"


def interfaces() -> dict[str, Interface]:
    """By name. Asked by socket calls: /sys may show those of another network namespace."""
    found = {}
    addresses = _addresses()
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as s:
        for _, name in socket.if_nameindex():
            request = struct.pack("16sH14x", name.encode(), 0)
            try:
                flags = struct.unpack("16sH14x", fcntl.ioctl(s.fileno(), _SIOCGIFFLAGS, request))[1]
            except OSError:
                continue
            found[name] = Interface(
                name, tuple(addresses.get(name, ())), bool(flags & _UP), bool(flags & _LOOPBACK), _speed(name)
            )
    return found


def route_to(address: str, port: int, known: dict[str, Interface]) -> Interface | None:
    """The interface whose address this machine uses towards ``address``; nothing is sent. Raises ``OSError``."""
    family, kind, protocol, _, target = socket.getaddrinfo(address, port, type=socket.SOCK_DGRAM)[0]
    with socket.socket(family, kind, protocol) as s:
        s.connect(target)
        own = s.getsockname()[0].split("%")[0]
    return next((interface for interface in known.values() if own in interface.addresses), None)


def _addresses() -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    buffer = array.array("B", bytes(40 * 256))
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as s:
        request = struct.pack("iL", len(buffer), buffer.buffer_info()[0])
        length = struct.unpack("iL", fcntl.ioctl(s.fileno(), _SIOCGIFCONF, request))[0]
    raw = buffer.tobytes()
    for at in range(0, length, 40):
        name = raw[at : at + 16].split(b"\0")[0].decode().split(":")[0]
        found.setdefault(name, []).append(socket.inet_ntoa(raw[at + 20 : at + 24]))
    try:
        lines = Path("/proc/net/if_inet6").read_text().splitlines()
    except OSError:
        return found
    for line in lines:
        digits, _, _, scope, _, name = line.split()
        if scope != "20":  # link-local addresses are everybody's
            found.setdefault(name, []).append(socket.inet_ntop(socket.AF_INET6, bytes.fromhex(digits)))
    return found


def _speed(name: str) -> int | None:
    try:
        speed = int(Path(f"/sys/class/net/{name}/speed").read_text())
    except (OSError, ValueError):
        return None
    return speed if speed > 0 else None
