"""``rso-ds doctor`` among real ranks (gloo): what they compare, and what happens if they do not meet."""

from __future__ import annotations

import contextlib
import json
import os
import socket
import subprocess
import sys
import threading
import time

import pytest
from support.environment import ROOT
from support.exhaustive import EXHAUSTIVE
from support.ranks import run_ranks


@pytest.fixture(scope="module")
def cases(tmp_path_factory):
    """{case: {name: finding}} of rank 0, which must be those of rank 1."""
    first, second = run_ranks("doctor_cases", "all", tmp_path_factory.mktemp("doctor"))
    assert first == second
    return {case: {finding["name"]: finding for finding in found} for case, found in first.items()}


def test_equal_ranks(cases):
    assert {finding["status"] for finding in cases["same"].values()} == {"ok"}
    assert set(cases["same"]) == {
        "placement", "same versions", "same code of rso_ds", "same DeepSpeed JSON", "same variables", "clocks",
    }  # fmt: skip


@pytest.mark.parametrize(
    ("case", "name", "status", "words"),
    [
        ("config", "same DeepSpeed JSON", "failed", "optimizer.params.lr: 0.1 on rank 0, 0.2 on rank 1"),
        ("version", "same versions", "failed", "torch: 2.7.1 on rank 0, 2.6.0 on rank 1"),
        ("code", "same code of rso_ds", "failed", "hash: b on rank 0, a on rank 1"),
        ("variable", "same variables", "warning", "NCCL_DEBUG: absent on rank 0, INFO on rank 1"),
        ("local_rank", "local ranks", "warning", "all have local rank 0"),
        ("gpu", "own GPU", "failed", "ranks 0-1 on"),
        ("two_nodes", "placement", "ok", "2 node(s) with 1 rank(s)"),
        ("two_nodes", "node names", "warning", "2 nodes call themselves"),
        ("two_nodes", "clocks", "ok", "2 node(s) within"),
        ("ahead_5", "clocks", "warning", "5.0 s ahead of"),
        ("behind_100", "clocks", "failed", "100.0 s behind"),
        ("wrong_sum", f"all-reduce inside {socket.gethostname()}", "failed", "the sum is WRONG"),
        ("speed_apart", "all-reduce between nodes", "ok", "sum correct"),
        ("speed_slow", "all-reduce between nodes", "warning", "less than half of"),
    ],
)
def test_one_rank_differs(cases, case, name, status, words):
    finding = cases[case][name]
    assert finding["status"] == status
    assert words in finding["found"]
    assert bool(finding["remedy"]) == (status != "ok")


def test_speed_inside_a_node(cases):
    (finding,) = cases["speed"].values()
    assert finding["status"] == "ok"
    assert "gloo, 2 ranks; sum correct" in finding["found"]


def start_doctor(rank: int, port: int, *flags: str, program=("-m", "rso_ds.cli"), **env: str) -> subprocess.Popen:
    place = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
    where = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    return subprocess.Popen(
        [sys.executable, *program, "doctor", "--all-reduce-mb", "1", *flags],
        env={**os.environ, **place, **where, **env},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def ends(*processes: subprocess.Popen, within: float = 90) -> list[tuple[int, str]]:
    """(exit status, output) of each; none may leave a trace of Python's or C++'s."""
    deadline, results = time.monotonic() + within, []
    try:
        for process in processes:
            out, err = process.communicate(timeout=max(1, deadline - time.monotonic()))
            assert "Traceback" not in err
            assert "frame #" not in err
            results.append((process.returncode, out))
    finally:
        for process in processes:
            process.kill()
            process.wait()
    return results


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def test_command_with_equal_ranks():
    port = free_port()
    flags = ("--deepspeed", str(ROOT / "ds_configs" / "rso_zero2.json"), "--json")
    (first, report), (second, silent) = ends(*(start_doctor(rank, port, *flags) for rank in range(2)))
    assert (first, second, silent) == (0, 0, "")
    found = json.loads(report)
    assert not found["failed"]
    assert found["measured"]["all_reduce"][0]["right"]
    assert {row["where"] for row in found["findings"]} == {"all ranks", ""}


@EXHAUSTIVE
def test_command_with_a_rank_that_differs(tmp_path):
    """Both end with status 1, and rank 0 says which rank has what."""
    port = free_port()
    (tmp_path / "a.json").write_text('{"optimizer": {"type": "RSO", "params": {}}, "gradient_clipping": 1.0}')
    (tmp_path / "b.json").write_text('{"optimizer": {"type": "RSO", "params": {}}, "gradient_clipping": 0.5}')
    lock = tmp_path / "cpu_adam" / "lock"
    lock.parent.mkdir()
    lock.touch()
    (first, report), (second, silent) = ends(
        start_doctor(0, port, "--deepspeed", str(tmp_path / "a.json")),
        start_doctor(1, port, "--deepspeed", str(tmp_path / "b.json"), TORCH_EXTENSIONS_DIR=str(tmp_path)),
    )
    assert (first, second, silent) == (1, 1, "")
    text = " ".join(report.split())
    assert "gradient_clipping: 1.0 on rank 0, 0.5 on rank 1" in text
    assert f"failed lock of cpu_adam rank 1 on {socket.gethostname()}: {lock}" in text
    assert f"-> rm {lock}" in text
    assert "2 failed" in text


@EXHAUSTIVE
def test_rank_that_never_comes():
    began = time.monotonic()
    port = free_port()
    ((status, report),) = ends(start_doctor(0, port, "--timeout", "3"), within=40)
    text = " ".join(report.split())
    assert status == 1
    assert time.monotonic() - began < 30
    assert "of 2 ranks, these did not come within 3 s: 1." in text
    assert f"127.0.0.1:{port} is 127.0.0.1, through lo; TCP connects" in text
    assert "ok software" in text  # the rest of the report is there


@EXHAUSTIVE
def test_rank_with_another_port():
    """Each tells of its own side."""
    ports = free_port(), free_port()
    (first, one), (second, other) = ends(*(start_doctor(r, ports[r], "--timeout", "3") for r in range(2)), within=40)
    assert (first, second) == (1, 1)
    assert "did not come within 3 s: 1." in " ".join(one.split())
    assert "rank 1 did not reach rank 0: 127.0.0.1:" in " ".join(other.split())
    assert "TCP does not connect (Connection refused)" in " ".join(other.split())


@EXHAUSTIVE
@pytest.mark.parametrize("closes", [False, True])
def test_port_that_another_program_has(closes):
    """It may be silent, or hang up on what it does not understand."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        s.listen()
        port = s.getsockname()[1]
        if closes:
            threading.Thread(target=hang_up, args=[s], daemon=True).start()
        (first, one), (second, other) = ends(*(start_doctor(r, port, "--timeout", "3") for r in range(2)), within=40)
    assert (first, second) == (1, 1)
    assert f"cannot listen at port {port}" in " ".join(one.split())
    assert f"export MASTER_PORT={port + 1}" in one
    assert f"127.0.0.1:{port} is 127.0.0.1, through lo; TCP connects" in " ".join(other.split())
    assert closes or "does not answer as torch's store does" in " ".join(other.split())


def hang_up(server: socket.socket) -> None:
    with contextlib.suppress(OSError):
        while True:
            server.accept()[0].close()


@EXHAUSTIVE
@pytest.mark.parametrize("fault", ["os._exit(9)", "time.sleep(1000)"])
def test_rank_that_dies_or_hangs_after_they_have_met(fault):
    """The other ends with its own report; so does one that hangs, by itself."""
    port = free_port()
    code = f"""
import os, time
from rso_ds.cli import main
from rso_ds.doctor import command
command.measure = lambda *args: {fault}
main()
"""
    lost = start_doctor(1, port, "--timeout", "3", program=("-c", code))
    (first, one), (second, other) = ends(start_doctor(0, port, "--timeout", "3"), lost, within=60)
    assert first == 1
    assert "rank 0 met the others, then lost one: " in " ".join(one.split())
    if fault == "os._exit(9)":
        assert second == 9
    else:
        assert second == 1
        assert "rank 1 met the others, then lost one: no answer in 9 s" in " ".join(other.split())
