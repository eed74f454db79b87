"""The most bytes held at once: of CUDA's allocator, on a CPU of all storages that torch makes."""

from __future__ import annotations

import gc
from typing import Any

import torch

from rso_ds.planning.memory.live import LiveBytes


class Peak:
    """Context; counts from what was held at its beginning. ``bytes``: the peak, once it has ended."""

    def __enter__(self) -> Peak:
        self._live = None if torch.cuda.is_available() else LiveBytes().__enter__()
        self._start = 0 if self._live is not None else torch.cuda.memory_allocated()
        return self

    def held(self) -> int:
        return torch.cuda.memory_allocated() - self._start if self._live is None else self._live.live

    def from_now_on(self) -> None:
        """Forget what was held before."""
        gc.collect()
        if self._live is None:
            torch.cuda.reset_peak_memory_stats()
        else:
            self._live.peak = self._live.live

    def __exit__(self, *error: Any) -> None:
        if self._live is None:
            self.bytes = torch.cuda.max_memory_allocated() - self._start
        else:
            self._live.__exit__(*error)
            self.bytes = self._live.peak
