"""Real ranks for tests: one process a rank, gloo, and case after case in the same processes.

A worker is a module of tests/workers with ``run(case, folder)``, which every rank calls and whose result comes back.
Ranks are forked from a server that has the imports done (``FRESH``: new interpreters, which import anew). What a case
leaves behind in its process is looked for after each: ranks that are no longer what they were are replaced, as are
those of a case that failed.
"""

from __future__ import annotations

import io
import multiprocessing
import os
import socket
import sys
import traceback
from collections.abc import Mapping
from importlib import import_module
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import psutil
from support.environment import ROOT
from support.progress import Progress, StandstillError, wait_until

FRESH = bool(os.environ.get("RSO_DS_TEST_FRESH_RANKS"))
forks = multiprocessing.get_context("forkserver")
forks.set_forkserver_preload(["support.preloaded", "support.ranks"])
_context: Any = multiprocessing.get_context("spawn") if FRESH else forks


def start_server() -> None:
    """Let the server that ranks are forked from import what they need; it does so once."""
    import multiprocessing.forkserver

    path = os.environ.get("PYTHONPATH")
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, (str(ROOT / "tests"), str(ROOT), path)))
    try:
        multiprocessing.forkserver.ensure_running()
    finally:
        os.environ.pop("PYTHONPATH")
        if path is not None:
            os.environ["PYTHONPATH"] = path


class CaseFailed(AssertionError):
    """A case raised on some rank, or its ranks stood still; the message has what they printed."""


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])


class RankPool:
    """``world`` ranks that wait for cases. ``env`` adds to the environment of each, before anything is imported."""

    def __init__(self, world: int, folder: Path, env: Mapping[str, str] | None = None) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        start_server()
        common = {"WORLD_SIZE": str(world), "LOCAL_WORLD_SIZE": str(world), "MASTER_ADDR": "127.0.0.1"}
        common |= {"MASTER_PORT": str(free_port()), "OMP_NUM_THREADS": "1", **(env or {})}
        self.logs = [folder / f"rank{rank}.log" for rank in range(world)]
        self._connections: list[Connection] = []
        self._processes = []
        for rank, log in enumerate(self.logs):
            mine, theirs = _context.Pipe()
            own = {**os.environ, **common, "RANK": str(rank), "LOCAL_RANK": str(rank)}
            process = _context.Process(target=_serve, args=(theirs, own, str(log)), daemon=True)
            process.start()
            theirs.close()
            self._connections.append(mine)
            self._processes.append(process)
        self.peak_bytes = 0

    def run(self, worker: str, case: str, folder: Path) -> tuple[list[Any], list[str]]:
        """(result of each rank, what the case has left behind in them).

        Raises ``CaseFailed`` if a rank raises, ends or stands still; the pool is of no use afterwards.
        """
        sizes = [log.stat().st_size if log.exists() else 0 for log in self.logs]
        replies: list[dict[str, Any] | None] = [None] * len(self._processes)
        try:
            for connection in self._connections:
                connection.send((worker, case, str(folder)))
            wait_until(lambda: self._received(replies), Progress([p.pid for p in self._processes]))
        except (StandstillError, EOFError, OSError) as error:
            raise CaseFailed(f"{worker} {case}: {error}\n{self._failures(replies, sizes)}") from None
        self.peak_bytes = max(self.peak_bytes, self._memory())
        if any(reply is None or "error" in reply for reply in replies):
            raise CaseFailed(f"{worker} {case}\n{self._failures(replies, sizes)}")
        left = sorted({name for reply in replies if reply for name in reply["left"]})
        return [reply["result"] for reply in replies if reply], left

    def _received(self, replies: list[dict[str, Any] | None]) -> bool:
        """Whether there is nothing to wait for: all have answered, or one has failed and the others had their time."""
        for i, connection in enumerate(self._connections):
            if replies[i] is None and connection.poll(0.01):
                replies[i] = _unpacked(connection.recv_bytes())
        if any(reply is not None and "error" in reply for reply in replies):
            for i, connection in enumerate(self._connections):  # the others may fail too, or wait for the one for ever
                if replies[i] is None and connection.poll(5):
                    replies[i] = _unpacked(connection.recv_bytes())
            return True
        return None not in replies

    def _failures(self, replies: list[dict[str, Any] | None], sizes: list[int]) -> str:
        parts = []
        for rank, (reply, log, size) in enumerate(zip(replies, self.logs, sizes, strict=True)):
            told = "no answer" if reply is None else reply.get("error", "was done")
            printed = log.read_text(errors="replace")[size:][-4000:] if log.exists() else ""
            parts.append(f"--- rank {rank}: {told}\n{printed}")
        return "\n".join(parts)

    def _memory(self) -> int:
        """Memory that the ranks have for themselves; what they share with the server is not counted."""
        return sum(psutil.Process(p.pid).memory_full_info().uss for p in self._processes if p.is_alive())

    def close(self) -> None:
        """End the ranks."""
        for connection in self._connections:
            try:
                connection.send(None)
            except OSError:
                continue
        for process in self._processes:
            process.join(5)
            if process.is_alive():
                process.kill()
                process.join()


class Pools:
    """Pools by number of ranks, started when first used; every case runs once, whoever asks for it."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._pools: dict[tuple[int, str], RankPool] = {}
        self._results: dict[tuple[str, str, int, str], list[Any] | CaseFailed] = {}
        self._started = 0
        self.replaced: list[str] = []
        self.peak_bytes: dict[str, int] = {}

    def run(self, worker: str, case: str, world: int, name: str = "", folder: Path | None = None) -> list[Any]:
        """The results of ``case`` of ``worker`` on all ranks. ``name``: of a pool of its own. Raises ``CaseFailed``."""
        key = (worker, case, world, name)
        if key not in self._results:
            try:
                self._results[key] = self._run(worker, case, world, name, folder or self.folder_of(worker))
            except CaseFailed as failed:
                self._results[key] = failed
        found = self._results[key]
        if isinstance(found, CaseFailed):
            raise found
        return found

    def folder_of(self, worker: str) -> Path:
        """Where the cases of ``worker`` may write."""
        folder = self._folder / worker
        folder.mkdir(exist_ok=True)
        return folder

    def _run(self, worker: str, case: str, world: int, name: str, folder: Path) -> list[Any]:
        place = (world, name or (worker if FRESH else ""))
        if place not in self._pools:
            self._started += 1
            self._pools[place] = RankPool(world, self._folder / f"pool{self._started}")
        try:
            results, left = self._pools[place].run(worker, case, folder)
        except CaseFailed:
            self._close(place)
            raise
        if left and not FRESH:
            self.replaced.append(f"{worker} {case} changed {', '.join(left[:4])}")
            self._close(place)
        return results

    def _close(self, place: tuple[int, str]) -> None:
        pool = self._pools.pop(place)
        what = " ".join(filter(None, (f"{place[0]} ranks", place[1])))
        self.peak_bytes[what] = max(self.peak_bytes.get(what, 0), pool.peak_bytes)
        pool.close()

    def drop(self, name: str) -> None:
        """End the pools of their own that are called ``name``."""
        for place in [place for place in self._pools if place[1] == name]:
            self._close(place)

    def close(self) -> None:
        for place in list(self._pools):
            self._close(place)


class Cases:
    """The cases of one worker by name; each runs when it is first asked for."""

    def __init__(self, pools: Pools, worker: str, world: int = 2, name: str = "", folder: Path | None = None) -> None:
        self._pools, self._where = pools, (worker, world, name, folder)
        self.folder = folder or pools.folder_of(worker)

    def ranks(self, case: str) -> list[Any]:
        """What each rank returned. Raises ``CaseFailed``."""
        worker, world, name, folder = self._where
        return self._pools.run(worker, case, world, name, folder)

    def __getitem__(self, case: str) -> Any:
        """What rank 0 returned."""
        return self.ranks(case)[0]


def run_ranks(worker: str, case: str, folder: Path, world: int = 2, **env: str) -> list[Any]:
    """One case on ranks that are started for it alone; ``env`` adds to their environment. Raises ``CaseFailed``."""
    pool = RankPool(world, folder / f"ranks-{worker}", env)
    try:
        return pool.run(worker, case, folder)[0]
    finally:
        pool.close()


def redirect(log: str) -> None:
    """Send what this process prints to the file ``log``."""
    handle = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(handle, 1)
    os.dup2(handle, 2)
    sys.stdout = open(1, "w", buffering=1, closefd=False)  # noqa: SIM115
    sys.stderr = open(2, "w", buffering=1, closefd=False)  # noqa: SIM115


def _serve(connection: Connection, env: dict[str, str], log: str) -> None:
    """One rank: joins the others, then answers case by case."""
    redirect(log)
    os.environ.clear()
    os.environ.update(env)
    os.chdir(ROOT)
    import gc

    import deepspeed
    import torch
    import torch.distributed as dist
    from deepspeed.utils import groups
    from support.process_state import differences, fingerprint

    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    deepspeed.init_distributed("gloo", verbose=False)
    groups._clone_world_group()  # DeepSpeed's first engine makes it, and every later one uses it
    torch.compile(abs)  # sets the compiler's cache folder in the environment
    gc.freeze()  # DeepSpeed collects at every start under ZeRO-3, and would look through all imports each time
    linear = torch.nn.functional.linear
    while (request := connection.recv()) is not None:
        worker, case, folder = request
        print("CASE", worker, case, flush=True)
        module = import_module(f"workers.{worker}")
        before = fingerprint()
        torch.manual_seed(0)
        try:
            reply = {"result": module.run(case, Path(folder))}
            gc.collect()
            torch.nn.functional.linear = linear  # DeepSpeed leaves its own there after every run of ZeRO-3
            reply["left"] = differences(before, fingerprint())
        except Exception:
            traceback.print_exc()
            reply = {"error": traceback.format_exc()}
        connection.send_bytes(_packed(reply))
    sys.stdout.flush()
    os._exit(0)  # threads of gloo may abort the interpreter's own way out (rso_ds.comm.shutdown)


def _packed(reply: dict[str, Any]) -> bytes:
    import torch

    box = io.BytesIO()
    torch.save(reply, box)
    return box.getvalue()


def _unpacked(reply: bytes) -> dict[str, Any]:
    import torch

    found: dict[str, Any] = torch.load(io.BytesIO(reply), weights_only=False)
    return found
