"""The next step's tokens, read while this one trains."""

from __future__ import annotations

from collections.abc import Callable, Generator
from concurrent.futures import ThreadPoolExecutor
from itertools import count

import torch
from torch import Tensor


def read_ahead(
    read: Callable[[int], Tensor], first: int, device: torch.device, stride: int = 1
) -> Generator[Tensor, None, None]:
    """``read(n)`` on ``device`` for ``first``, ``first + stride`` and so on; the next is read, in a thread, when one is
    given out. What ``read`` raises for an n is raised when that one is asked for. ``read`` is never called by two
    threads at once. (The main job's ``read``: int64 [accumulation, micro batch, sequence], in pageable memory.)"""

    def load(step: int) -> Tensor:
        tokens = read(step)
        return tokens.pin_memory() if device.type == "cuda" else tokens

    with ThreadPoolExecutor(1, "rso_ds-data") as thread:
        coming = thread.submit(load, first)
        for step in count(first + stride, stride):
            tokens = coming.result()
            coming = thread.submit(load, step)
            yield tokens.to(device, non_blocking=True)
