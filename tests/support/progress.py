"""Limits that a slow machine does not reach: processes are given up when they stand still, not when time has passed.

Ranks that wait for one another for ever use no CPU time; ranks on a machine under load use little of it, but some.
"""

from __future__ import annotations

import subprocess
import tempfile
import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import psutil

IDLE, LEAST, MOST = 120.0, 0.5, 1800.0


class StandstillError(RuntimeError):
    """Processes did nothing for ``IDLE`` seconds, or far more than was to be expected."""


class Progress:
    """The CPU time of ``pids`` and of all that they start.

    ``check`` raises ``StandstillError`` when it has grown by less than ``LEAST`` seconds in ``idle`` seconds, or to
    more than ``most``.
    """

    def __init__(self, pids: Iterable[int], idle: float = IDLE, most: float = MOST) -> None:
        self._pids, self._idle, self._most = list(pids), idle, most
        self._spent: dict[int, float] = {}  # of processes that have ended too
        self._begin = self._mark = self._cpu_seconds()
        self._since = time.monotonic()

    def check(self) -> None:
        now = time.monotonic()
        if now - self._since < self._idle / 8:
            return
        spent = self._cpu_seconds()
        if spent - self._mark >= LEAST:
            self._mark, self._since = spent, now
        elif now - self._since > self._idle:
            raise StandstillError(f"no progress in {self._idle:.0f} s (CPU time {spent - self._begin:.1f} s in all)")
        if spent - self._begin > self._most:
            raise StandstillError(f"{spent - self._begin:.0f} s of CPU time and no end")

    def _cpu_seconds(self) -> float:
        for pid in self._pids:
            try:
                root = psutil.Process(pid)
                family = [root, *root.children(recursive=True)]
            except psutil.NoSuchProcess:
                continue
            for process in family:
                try:
                    times = process.cpu_times()
                except psutil.NoSuchProcess:
                    continue
                self._spent[process.pid] = times.user + times.system
        return sum(self._spent.values())


def wait_until(done: Callable[[], bool], progress: Progress, every: float = 0.02) -> None:
    """Return once ``done()``; raises ``StandstillError`` as ``progress.check`` does."""
    while not done():
        progress.check()
        time.sleep(every)


def run_command(command: Sequence[str], **options: Any) -> subprocess.CompletedProcess[str]:
    """``subprocess.run`` with captured text, ended with all that it has started when it stands still.

    ``options`` go to ``subprocess.Popen``. Raises ``StandstillError`` with what had been printed.
    """
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as err:
        with subprocess.Popen(command, stdout=out, stderr=err, **options) as process:
            try:
                wait_until(lambda: process.poll() is not None, Progress([process.pid]))
            except StandstillError as error:
                end_family(process.pid)
                raise StandstillError(
                    f"{' '.join(command)}: {error}\n{_text(out)[-3000:]}\n{_text(err)[-3000:]}"
                ) from None
        return subprocess.CompletedProcess(command, process.returncode, _text(out), _text(err))


def end_of(process: subprocess.Popen[str]) -> int:
    """The exit status of ``process``, once it has ended. Raises ``StandstillError``."""
    wait_until(lambda: process.poll() is not None, Progress([process.pid]))
    return process.returncode


def end_family(pid: int) -> None:
    """Kill a process that a test has started, and what it has started."""
    try:
        root = psutil.Process(pid)
    except psutil.NoSuchProcess:
        return
    for process in [*root.children(recursive=True), root]:
        try:
            process.kill()
        except psutil.NoSuchProcess:
            continue


def _text(file: Any) -> str:
    file.seek(0)
    return str(file.read())
