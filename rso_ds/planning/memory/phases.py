"""The most memory that a run takes in each of its phases, measured."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from typing import Any

import torch

from rso_ds.planning.memory.live import LiveBytes

# In the order in which a run comes to them.
PHASES = ("start", "evaluation", "training", "boundary", "save")


class PhasePeaks:
    """``with peaks("training"): ...`` notes the most bytes that lived at once meanwhile; an inner phase interrupts the
    outer. ``bytes``: phase -> peak. From ``begin`` to ``end``, between which everything that counts is made; before
    and after, and where nobody begins, it does nothing.

    On CUDA the figures are the caching allocator's, whose peak is reset; elsewhere every storage that torch makes is
    counted, which slows the run down.
    """

    def __init__(self, on_gpu: bool) -> None:
        self.on_gpu, self.bytes = on_gpu, dict[str, int]()
        self._live: LiveBytes | None = None
        self._phase = ""
        self._on = False

    def begin(self) -> None:
        self._on = True
        if not self.on_gpu:
            self._live = LiveBytes()
            self._live.__enter__()

    def end(self) -> None:
        if self._live is not None:
            self._live.__exit__(None, None, None)
        self._live, self._on = None, False

    @contextmanager
    def __call__(self, phase: str) -> Iterator[None]:
        outer = self._phase
        self._pass_to(phase)
        try:
            yield
        finally:
            self._pass_to(outer)

    def note(self) -> None:
        """Before somebody else resets the allocator's peak."""
        self._pass_to(self._phase)

    def watch(self, boundary: Any) -> None:
        """Let what ``boundary`` (``rso_ds.boundary.Boundary``) merges count as the phase "boundary"."""
        for name in ("cross", "fold"):
            setattr(boundary, name, self._within("boundary", getattr(boundary, name)))

    def _within(self, phase: str, inner: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(inner)
        def run(*args: Any, **kwargs: Any) -> Any:
            with self(phase):
                return inner(*args, **kwargs)

        return run

    def _pass_to(self, phase: str) -> None:
        if not self._on:
            return
        if self._phase:
            peak = torch.cuda.max_memory_allocated() if self._live is None else self._live.peak
            self.bytes[self._phase] = max(peak, self.bytes.get(self._phase, 0))
        if self._live is None:
            torch.cuda.reset_peak_memory_stats()
        else:
            self._live.peak = self._live.live
        self._phase = phase
