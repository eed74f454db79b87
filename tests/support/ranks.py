"""Start real ranks for a test module: one process a rank, gloo, many cases inside one start."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from pathlib import Path

from support.environment import ROOT

TESTS = ROOT / "tests"


def run_ranks(worker: str, out: Path, world_size: int = 2, timeout: float = 1800, **env: str) -> None:
    """Run ``tests/workers/<worker>.py OUT`` on ``world_size`` ranks; raise with their output on failure."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    common = {
        **os.environ,
        "WORLD_SIZE": str(world_size),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": os.pathsep.join([str(TESTS), str(TESTS.parent), os.environ.get("PYTHONPATH", "")]),
        # Console scripts of the running interpreter (ninja, which builds DeepSpeed's ops, is one).
        "PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]),
        **env,
    }
    logs = [out / f"{worker}.rank{rank}.log" for rank in range(world_size)]
    processes = []
    for rank, log in enumerate(logs):
        with open(log, "w") as f:
            processes.append(
                subprocess.Popen(
                    [sys.executable, str(TESTS / "workers" / f"{worker}.py"), str(out)],
                    env={**common, "RANK": str(rank), "LOCAL_RANK": str(rank)},
                    stdout=f,
                    stderr=subprocess.STDOUT,
                )
            )
    deadline = time.monotonic() + timeout
    try:
        while any(p.poll() is None for p in processes):
            if any(p.poll() not in (None, 0) for p in processes):
                time.sleep(5)  # let the others print why they fail too
                break
            if time.monotonic() > deadline:
                raise TimeoutError(f"{worker} did not finish in {timeout} s:\n{_tails(logs)}")
            time.sleep(0.2)
    finally:
        for p in processes:
            if p.poll() is None:
                p.kill()
            p.wait()
    if any(p.returncode for p in processes):
        raise RuntimeError(f"{worker} failed:\n{_tails(logs)}")


def _tails(logs: list[Path]) -> str:
    return "\n".join(f"--- {log.name}\n{log.read_text()[-6000:]}" for log in logs)
