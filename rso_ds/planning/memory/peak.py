"""The most memory that this process has taken so far."""

from __future__ import annotations

import resource

import torch


def peak_memory_bytes() -> int:
    """Peak so far: of the CUDA allocator on a GPU, of the process's resident set on a CPU."""
    if torch.cuda.is_available():
        return int(torch.cuda.max_memory_allocated())
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
