"""``rso-ds doctor``: names, interfaces, InfiniBand and launchers, in made-up surroundings."""

from __future__ import annotations

import resource
import socket

import pytest
from cli.test_doctor import ALONE, ONE_NODE, TWO_NODES, one, status

from rso_ds.comm.launch import Launch
from rso_ds.doctor import launcher, network
from rso_ds.doctor.interfaces import Interface, interfaces, route_to
from rso_ds.doctor.report import FAILED, OK, WARNING


def a_network(monkeypatch, **extra: Interface) -> None:
    known = {"lo": Interface("lo", ("127.0.0.1",), True, True, None), "eth0": ethernet("eth0", "10.0.0.2"), **extra}
    monkeypatch.setattr(network, "interfaces", lambda: known)
    monkeypatch.setattr(network, "route_to", lambda address, port, known: known["eth0"])
    monkeypatch.setattr(socket, "getaddrinfo", lambda host, *a, **k: [(2, 1, 6, "", ("10.0.0.2", 0))])
    for key in ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"):
        monkeypatch.delenv(key, raising=False)


def ethernet(name: str, *addresses: str, up: bool = True) -> Interface:
    return Interface(name, addresses, up, False, 25000)


def test_a_good_network(monkeypatch):
    a_network(monkeypatch)
    findings = network.check_network(TWO_NODES, on_gpu=True)
    assert not [finding for finding in findings if finding.status != OK]
    assert "through eth0, 25 Gbit/s" in one(findings, "MASTER_ADDR").found


@pytest.mark.parametrize(("launch", "expected"), [(ONE_NODE, OK), (TWO_NODES, FAILED), (ALONE, OK)])
def test_hostname_that_is_loopback_is_a_trap_on_several_nodes(monkeypatch, launch, expected):
    a_network(monkeypatch)
    mine = socket.gethostname()
    monkeypatch.setattr(
        socket, "getaddrinfo", lambda h, *a, **k: [(2, 1, 6, "", ("127.0.1.1" if h == mine else "10.0.0.1", 0))]
    )
    found = one(network.check_network(launch, False), "hostname")
    assert found.status == expected
    if expected == FAILED:
        assert found.remedy.startswith("export GLOO_SOCKET_IFNAME=eth0")
        monkeypatch.setenv("GLOO_SOCKET_IFNAME", "eth0")
        assert status(network.check_network(launch, False), "hostname") == OK


def test_master_that_does_not_resolve_or_is_loopback(monkeypatch):
    a_network(monkeypatch)
    monkeypatch.setattr(socket, "getaddrinfo", lambda *a, **k: [(2, 1, 6, "", ("127.0.0.1", 0))])
    assert "this node itself" in one(network.check_network(TWO_NODES, False), "MASTER_ADDR").found

    def unknown(*args, **kwargs):
        raise socket.gaierror(-2, "Name or service not known")

    monkeypatch.setattr(socket, "getaddrinfo", unknown)
    findings = network.check_network(TWO_NODES, False)
    assert "does not resolve" in one(findings, "MASTER_ADDR").found
    assert status(findings, "MASTER_ADDR") == status(findings, "hostname") == FAILED


@pytest.mark.parametrize(
    ("key", "value", "on_gpu", "expected"),
    [
        ("GLOO_SOCKET_IFNAME", "eth0", False, OK),
        ("GLOO_SOCKET_IFNAME", "eth", False, FAILED),  # gloo knows no prefixes
        ("GLOO_SOCKET_IFNAME", "ib9", False, FAILED),
        ("GLOO_SOCKET_IFNAME", "eth1", False, FAILED),  # down
        ("NCCL_SOCKET_IFNAME", "eth", True, OK),
        ("NCCL_SOCKET_IFNAME", "=eth", True, FAILED),
        ("NCCL_SOCKET_IFNAME", "^eth,lo", True, FAILED),
        ("NCCL_SOCKET_IFNAME", "^docker", True, OK),
        ("NCCL_SOCKET_IFNAME", "ib,eth", True, OK),
        ("NCCL_SOCKET_IFNAME", "ib", False, WARNING),
    ],
)
def test_interface_variables(monkeypatch, key, value, on_gpu, expected):
    a_network(monkeypatch, eth1=ethernet("eth1", "10.1.0.2", up=False))
    monkeypatch.setenv(key, value)
    found = one(network.check_network(TWO_NODES, on_gpu), key)
    assert found.status == expected
    if expected != OK:
        assert found.remedy == f"export {key}=eth0"


def test_several_interfaces_and_no_choice(monkeypatch):
    a_network(monkeypatch, eth1=ethernet("eth1", "10.1.0.2"), docker0=ethernet("docker0", "172.17.0.1"))
    found = one(network.check_network(TWO_NODES, on_gpu=True), "interfaces")
    assert found.status == WARNING
    assert found.remedy == "export NCCL_SOCKET_IFNAME=eth0"
    assert "docker0" not in found.found
    assert not [f for f in network.check_network(ONE_NODE, True) if f.name == "interfaces"]


def test_interfaces_of_this_machine():
    known = interfaces()
    assert known["lo"].loopback
    assert "127.0.0.1" in known["lo"].addresses
    route = route_to("127.0.0.1", 1, known)
    assert route is not None
    assert route.name == "lo"


def test_infiniband_needs_locked_memory(tmp_path, monkeypatch):
    port = tmp_path / "mlx5_0" / "ports" / "1"
    port.mkdir(parents=True)
    (port / "state").write_text("4: ACTIVE\n")
    (port / "rate").write_text("200 Gb/sec (4X HDR)\n")
    monkeypatch.setattr(resource, "getrlimit", lambda which: (65536, 65536))
    (found,) = network.check_infiniband(tmp_path)
    assert (found.status, "64 KiB" in found.found) == (WARNING, True)
    monkeypatch.setattr(resource, "getrlimit", lambda which: (resource.RLIM_INFINITY,) * 2)
    assert network.check_infiniband(tmp_path)[0].status == OK
    assert network.check_infiniband(tmp_path / "none")[0].status == OK


def test_launcher_restarts_and_the_deepspeed_launcher(monkeypatch):
    monkeypatch.setenv("TORCHELASTIC_MAX_RESTARTS", "3")
    monkeypatch.delenv("TORCH_DISABLE_SHARE_RDZV_TCP_STORE", raising=False)
    assert status(launcher.check_launcher(ONE_NODE), "restarts") == WARNING
    monkeypatch.setenv("TORCH_DISABLE_SHARE_RDZV_TCP_STORE", "1")
    assert len(launcher.check_launcher(ONE_NODE)) == 1
    several = Launch("deepspeed", 0, 0, 4, 2, "10.0.0.1", 29500)
    assert ".deepspeed_env" in one(launcher.check_launcher(several), "environment").remedy
