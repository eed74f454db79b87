"""The next step's tokens, read while this one trains."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import count

import torch
from torch import Tensor


def read_ahead(read: Callable[[int], Tensor], first: int, device: torch.device) -> Iterator[Tensor]:
    """``read(step)`` on ``device`` for step ``first`` and all that follow; the next is read, in a thread, when one is
    given out. What ``read`` raises for a step is raised when that step is asked for. ``read`` is never called by two
    threads at once. (The main job's ``read``: int64 [accumulation, micro batch, sequence], in pageable memory.)"""

    def load(step: int) -> Tensor:
        tokens = read(step)
        return tokens.pin_memory() if device.type == "cuda" else tokens

    with ThreadPoolExecutor(1, "rso_ds-data") as thread:
        coming = thread.submit(load, first)
        for step in count(first + 1):
            tokens = coming.result()
            coming = thread.submit(load, step)
            yield tokens.to(device, non_blocking=True)
