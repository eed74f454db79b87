"""SIGTERM and SIGUSR1: finish the step, save, leave with a status of its own, so that a scheduler can requeue."""

from __future__ import annotations

import os
import signal
import threading
import time
from types import TracebackType
from typing import Any

EXIT_REQUEUE = 85
"""Status of a run that a signal has ended after its checkpoint was complete: start it again with --resume auto."""

_SIGNALS = (signal.SIGTERM, signal.SIGUSR1)
# A scheduler signals every process of a job, and a launcher that is among them passes the signal on to its
# ranks: what arrives so soon after the first is the same request.
_FORWARDED_WITHIN = 5.0


class Interruption:
    """While entered, the two signals only set ``requested``; a later second SIGTERM ends the process at once.

    "Later" means 5 s after the first. The second one works even while the main thread waits inside a collective
    for a rank that will never answer: signal numbers come through a pipe to a thread, as Python itself runs
    handlers only between two instructions of the main thread. Outside the main thread nothing is installed.
    """

    def __init__(self) -> None:
        self._first: int | None = None
        self._first_term: float | None = None
        self._previous: dict[int, Any] = {}
        self._pipe: tuple[int, int] | None = None
        self._previous_fd = -1

    @property
    def requested(self) -> bool:
        return self._first is not None

    @property
    def name(self) -> str:
        """Of the signal that came first."""
        return "no signal" if self._first is None else signal.Signals(self._first).name

    def __enter__(self) -> Interruption:
        if threading.current_thread() is not threading.main_thread():
            return self
        read, write = self._pipe = os.pipe()
        os.set_blocking(write, False)
        self._previous_fd = signal.set_wakeup_fd(write, warn_on_full_buffer=False)
        # The handler has nothing to do, but only a handler of Python's makes the signal's number go to the pipe.
        self._previous = {number: signal.signal(number, lambda *_: None) for number in _SIGNALS}
        threading.Thread(target=self._watch, args=(read,), name="signals", daemon=True).start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._pipe is None:
            return
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        signal.set_wakeup_fd(self._previous_fd)
        os.close(self._pipe[1])  # the thread reads the end of the pipe and leaves
        self._pipe = None

    def _watch(self, read: int) -> None:
        while received := os.read(read, 64):
            for number in received:
                self._received(number)
        os.close(read)

    def _received(self, number: int) -> None:
        if number not in _SIGNALS:
            return
        now = time.monotonic()
        if self._first is None:
            self._first = number
        if number == signal.SIGTERM:
            if self._first_term is None:
                self._first_term = now
            elif now - self._first_term > _FORWARDED_WITHIN:
                os.write(2, b"second SIGTERM: ending at once, without a checkpoint of the current step\n")
                os._exit(128 + signal.SIGTERM)


def ignore_signals() -> None:
    """For the last moments of a process that has saved: a launcher's SIGTERM must not change its status."""
    if threading.current_thread() is threading.main_thread():
        for number in _SIGNALS:
            signal.signal(number, signal.SIG_IGN)
