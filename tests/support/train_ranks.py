"""Many starts of the main command on ranks without a launcher, at the price of one import of torch and DeepSpeed.

Every rank is a process of its own, forked from a server that has the imports done; it then does what
``launch/train.py`` does. Killing it, by ``pid``, is killing a real rank.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from subprocess import CompletedProcess

from support.train_workspace import ROOT, STEPS, Workspace, free_port

_IMPORTS = ["deepspeed", "transformers.models.llama.modeling_llama", "rso_ds.recipes.training.command", "train_ranks"]
_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(_IMPORTS)


class TrainRanks:
    """One start of ``launch/train.py`` with the flags ``argv`` on ``ranks`` ranks; what they print goes to ``logs``.

    ``env`` adds to the environment of each, ``before`` names a function of this module that each calls first.
    """

    def __init__(
        self, argv: Sequence[str], logs: Path, ranks: int = 2, env: dict[str, str] | None = None, before: str = ""
    ) -> None:
        logs.mkdir(parents=True, exist_ok=True)
        common = {"WORLD_SIZE": str(ranks), "LOCAL_WORLD_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1"}
        common |= {"MASTER_PORT": str(free_port()), "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore", **(env or {})}
        self.logs = [logs / f"rank{rank}.log" for rank in range(ranks)]
        self.processes = []
        for rank, log in enumerate(self.logs):
            own = {**common, "RANK": str(rank), "LOCAL_RANK": str(rank)}
            process = _context.Process(target=run_rank, args=(list(argv), own, str(log), before), daemon=True)
            process.start()
            self.processes.append(process)

    def kill(self, rank: int, how: int = signal.SIGKILL) -> None:
        pid = self.processes[rank].pid
        if pid is not None and self.processes[rank].is_alive():
            os.kill(pid, how)

    def running(self) -> bool:
        return all(p.is_alive() for p in self.processes)

    def wait(self, timeout: float = 120) -> list[int | None]:
        """Exit codes of all ranks (negative: signal); what is left after ``timeout`` seconds is killed, code None."""
        deadline = time.monotonic() + timeout
        codes: list[int | None] = []
        for process in self.processes:
            process.join(max(0.0, deadline - time.monotonic()))
            codes.append(process.exitcode)
        self.stop()
        return codes

    def wait_for(self, path: Path, lines: int = 1, timeout: float = 120) -> None:
        """Until the file ``path`` has so many lines. Raises with the ranks' output if one ends before."""
        deadline = time.monotonic() + timeout
        while not (path.is_file() and path.read_text().count("\n") >= lines):
            if not self.running() or time.monotonic() > deadline:
                self.stop()
                raise RuntimeError(f"{path} did not get {lines} lines:\n{self.text()}")
            time.sleep(0.02)

    def stop(self) -> None:
        for process in self.processes:
            if process.is_alive():
                process.kill()
            process.join()

    def text(self, rank: int | None = None) -> str:
        """What ranks have printed."""
        logs = self.logs if rank is None else [self.logs[rank]]
        return "\n".join(log.read_text(errors="replace") for log in logs if log.is_file())


def run(space: Workspace, output: str, *flags: str, ranks: int = 2, steps: int = STEPS) -> CompletedProcess[str]:
    """As ``space.run``, without the launcher: ``stdout`` is all that rank 0 prints, ``stderr`` all of every rank."""
    argv = space.arguments(output, *flags, steps=steps)
    started = TrainRanks(argv, space.folder / "logs" / output, ranks)
    codes = started.wait(300)
    return CompletedProcess(argv, next((code for code in codes if code != 0), 0), started.text(0), started.text())


def run_rank(argv: list[str], env: dict[str, str], log: str, before: str) -> None:
    """One rank, in a fresh fork of the server."""
    handle = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(handle, 1)
    os.dup2(handle, 2)
    sys.stdout = open(1, "w", buffering=1, closefd=False)  # noqa: SIM115
    sys.stderr = open(2, "w", buffering=1, closefd=False)  # noqa: SIM115
    os.environ.update(env)
    os.chdir(ROOT)
    import torch

    from rso_ds.recipes.training.command import main

    torch.set_num_threads(1)
    if before:
        globals()[before]()
    main(argv)


def limit_files() -> None:
    """No file may grow beyond 1 MB: a write that does fails with EFBIG."""
    import resource

    resource.setrlimit(resource.RLIMIT_FSIZE, (1_000_000, 1_000_000))
