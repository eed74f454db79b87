"""Two network namespaces joined by one veth pair whose rate can be set: two nodes on one machine."""

from __future__ import annotations

import os
import shutil
import subprocess
from types import TracebackType

DEVICE = "eth0"  # inside a namespace of our own: the name clashes with nothing
ADDRESSES = ("10.231.77.1", "10.231.77.2")
_UNITS = {"mbit": 1e6, "gbit": 1e9}


class NoNamespaces(Exception):
    """Namespaces or shaped links cannot be made here; the message says why."""


def parse_rate(link: str) -> float | None:
    """Bits per second of "100mbit", "1gbit" or similar; None for "none", an unshaped link."""
    if link == "none":
        return None
    number, unit = link[:-4], link[-4:]
    if unit not in _UNITS or not number.replace(".", "", 1).isdigit() or not float(number):
        raise ValueError(f"link must be 'none' or a rate such as 100mbit or 1gbit, got {link!r}.")
    return float(number) * _UNITS[unit]


class TwoNodes:
    """A context manager; the namespaces' names hold the process id, and leaving removes them with all in them."""

    def __init__(self) -> None:
        self.names = [f"rsobw{os.getpid()}-{i}" for i in range(2)]

    def __enter__(self) -> TwoNodes:
        if os.geteuid() != 0:
            raise NoNamespaces("network namespaces need root.")
        for tool in ("ip", "tc"):
            if shutil.which(tool) is None:
                raise NoNamespaces(f"'{tool}' is not installed (package iproute2).")
        try:
            self._create()
            self.shape("1gbit")
            self.shape("none")
        except subprocess.CalledProcessError as error:
            self._remove()
            raise NoNamespaces(f"'{' '.join(error.cmd)}' failed: {error.stderr.strip()}") from None
        except BaseException:
            self._remove()
            raise
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._remove()

    def _create(self) -> None:
        for name in self.names:
            _run("ip", "netns", "add", name)
        one, two = self.names
        _run("ip", "-n", one, "link", "add", DEVICE, "type", "veth", "peer", "name", DEVICE, "netns", two)
        for name, address in zip(self.names, ADDRESSES, strict=True):
            _run("ip", "-n", name, "addr", "add", f"{address}/24", "dev", DEVICE)
            _run("ip", "-n", name, "link", "set", DEVICE, "up")
            _run("ip", "-n", name, "link", "set", "lo", "up")

    def _remove(self) -> None:
        for name in self.names:
            subprocess.run(["ip", "netns", "del", name], capture_output=True, check=False)

    def shape(self, link: str) -> None:
        """Limit both directions to ``link`` (``parse_rate``)."""
        rate = parse_rate(link)
        for name in self.names:
            on = ("ip", "netns", "exec", name, "tc", "qdisc")
            if rate is None:
                # The device has no qdisc of ours before the first shaping, which is no error.
                subprocess.run([*on, "del", "dev", DEVICE, "root"], capture_output=True, check=False)
                continue
            # The bucket must hold what passes in a timer tick, or the rate is never reached.
            burst = max(65536, int(rate / 4096))
            bucket = ("rate", str(int(rate)), "burst", str(burst), "latency", "200ms")
            _run(*on, "replace", "dev", DEVICE, "root", "tbf", *bucket)

    def inside(self, node: int) -> list[str]:
        """Prefix of a command that shall run on ``node``."""
        return ["ip", "netns", "exec", self.names[node]]


def _run(*command: str) -> None:
    subprocess.run(command, capture_output=True, text=True, check=True)
