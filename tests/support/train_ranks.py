"""Many starts of the main command on ranks without a launcher, at the price of one import of torch and DeepSpeed.

Every rank is a process of its own, forked from a server that has the imports done; it then does what
``launch/train.py`` does. Killing it, by ``pid``, is killing a real rank.
"""

from __future__ import annotations

import contextlib
import os
import signal
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from subprocess import CompletedProcess

from support.progress import Progress, StandstillError, wait_until
from support.ranks import forks, free_port, redirect, start_server
from support.train_workspace import ROOT, STEPS, Workspace


class TrainRanks:
    """One start of ``launch/train.py`` with the flags ``argv`` on ``ranks`` ranks; what they print goes to ``logs``.

    ``env`` adds to the environment of each, ``before`` names a function ("module:name") that each calls first with the
    flags, and that returns those to start with.
    """

    def __init__(
        self, argv: Sequence[str], logs: Path, ranks: int = 2, env: dict[str, str] | None = None, before: str = ""
    ) -> None:
        logs.mkdir(parents=True, exist_ok=True)
        common = {"WORLD_SIZE": str(ranks), "LOCAL_WORLD_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1"}
        common |= {"MASTER_PORT": str(free_port()), "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore", **(env or {})}
        self.logs = [logs / f"rank{rank}.log" for rank in range(ranks)]
        self.processes = []
        start_server()
        for rank, log in enumerate(self.logs):
            own = {**common, "RANK": str(rank), "LOCAL_RANK": str(rank)}
            process = forks.Process(target=run_rank, args=(list(argv), own, str(log), before), daemon=True)
            process.start()
            self.processes.append(process)

    def kill(self, rank: int, how: int = signal.SIGKILL) -> None:
        pid = self.processes[rank].pid
        if pid is not None and self.processes[rank].is_alive():
            os.kill(pid, how)

    def running(self) -> bool:
        return all(p.is_alive() for p in self.processes)

    def wait(self) -> list[int | None]:
        """Exit codes of all ranks (negative: signal). Those that stand still are killed, code None."""
        try:
            wait_until(lambda: not any(p.is_alive() for p in self.processes), self.progress())
        except StandstillError:
            codes = [p.exitcode for p in self.processes]
            self.stop()
            return codes
        return [p.exitcode for p in self.processes]

    def wait_for(self, path: Path, lines: int = 1) -> None:
        """Until the file ``path`` has so many lines. Raises with the ranks' output if one ends or stands still."""

        def there() -> bool:
            return path.is_file() and path.read_text().count("\n") >= lines

        with contextlib.suppress(StandstillError):
            wait_until(lambda: there() or not self.running(), self.progress())
        if not there():
            self.stop()
            raise RuntimeError(f"{path} did not get {lines} lines:\n{self.text()}")

    def progress(self) -> Progress:
        return Progress([p.pid for p in self.processes if p.pid is not None])

    def stop(self) -> None:
        for process in self.processes:
            if process.is_alive():
                process.kill()
            process.join()

    def text(self, rank: int | None = None) -> str:
        """What ranks have printed."""
        logs = self.logs if rank is None else [self.logs[rank]]
        return "\n".join(log.read_text(errors="replace") for log in logs if log.is_file())


def run(
    space: Workspace, output: str, *flags: str, ranks: int = 2, steps: int = STEPS, **env: str
) -> CompletedProcess[str]:
    """As ``space.run``, without the launcher, ``env`` added to the environment.

    ``stdout`` is all that rank 0 prints, ``stderr`` all of every rank.
    """
    argv = space.arguments(output, *flags, steps=steps)
    started = TrainRanks(argv, space.folder / "logs" / output, ranks, env)
    codes = started.wait()
    return CompletedProcess(argv, next((code for code in codes if code != 0), 0), started.text(0), started.text())


def run_rank(argv: list[str], env: dict[str, str], log: str, before: str) -> None:
    """One rank, in a fresh fork of the server."""
    redirect(log)
    os.environ.update(env)
    os.chdir(ROOT)
    import torch

    from rso_ds.recipes.training.command import main

    torch.set_num_threads(1)
    if before:
        module, _, name = before.partition(":")
        argv = getattr(import_module(module), name)(argv)
    main(argv)


def limit_files(argv: list[str]) -> list[str]:
    """No file may grow beyond 1 MB: a write that does fails with EFBIG."""
    import resource

    resource.setrlimit(resource.RLIMIT_FSIZE, (1_000_000, 1_000_000))
    return argv
