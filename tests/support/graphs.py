"""What torch.compile has done in this process."""

from __future__ import annotations

import torch


def compiled_graphs() -> int:
    """Graphs that torch.compile has made in this process."""
    return torch._dynamo.utils.counters["stats"]["unique_graphs"]
