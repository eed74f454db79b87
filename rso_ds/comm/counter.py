"""Bytes of the gradient reductions that a DeepSpeed engine really makes."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any

import torch
import torch.distributed as dist

# Reductions by which DeepSpeed averages gradients: position and names of the argument that is sent.
_REDUCTIONS = {
    "all_reduce": (0, "tensor"),
    "all_reduce_coalesced": (0, "tensors"),
    "reduce": (0, "tensor"),
    "reduce_scatter": (1, "input_list"),
    "reduce_scatter_tensor": (1, "input_tensor"),
}
# An all-reduce of this few elements during backward is a norm or an overflow flag, not a gradient.
_SCALARS = 4


class GradientBytes:
    """Counts the input bytes of every reduction issued while ``engine.backward`` runs.

    The figure is the payload that this rank hands to the collectives (what a ring all-reduce then sends
    is 2 (n - 1) / n times that); it is 0 for a single rank. ``total`` grows for the whole run.
    """

    def __init__(self, engine: Any) -> None:
        self.total = 0
        self._in_backward = False
        if not (dist.is_initialized() and dist.get_world_size() > 1):
            return
        from deepspeed import comm

        backend = comm.comm.cdb
        for name, (position, keyword) in _REDUCTIONS.items():
            if hasattr(backend, name):
                setattr(backend, name, self._counting(getattr(backend, name), position, keyword))
        inner = engine.backward

        @wraps(inner)
        def backward(*args: Any, **kwargs: Any) -> Any:
            self._in_backward = True
            try:
                return inner(*args, **kwargs)
            finally:
                self._in_backward = False

        engine.backward = backward

    def _counting(self, call: Callable[..., Any], position: int, keyword: str) -> Callable[..., Any]:
        @wraps(call)
        def counted(*args: Any, **kwargs: Any) -> Any:
            if self._in_backward:
                sent = args[position] if len(args) > position else kwargs[keyword]
                tensors = [sent] if isinstance(sent, torch.Tensor) else list(sent)
                if sum(t.numel() for t in tensors) > _SCALARS:
                    self.total += sum(t.numel() * t.element_size() for t in tensors)
            return call(*args, **kwargs)

        return counted
