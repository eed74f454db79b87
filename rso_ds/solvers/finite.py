"""Steps whose gradients are not finite are not taken: one of them, merged into W, would end the training."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor


@torch.no_grad()
def gradients_finite(params: Iterable[Any], group: Any = None, agree: bool = True) -> bool:
    """Whether every gradient of ``params`` on this rank is finite; with ``agree``, on all ranks of ``group``.

    Reads each gradient once. ``agree`` sends one number; gradients that were averaged over the ranks are equal
    and need none.
    """
    params = list(params)
    grads = [p.grad for p in params if p.grad is not None]
    local: list[Tensor] = [g._local_tensor if isinstance(g, DTensor) else g for g in grads]
    local = [g for g in local if g.numel()]
    device = params[0].device  # also where this rank has no gradient: the reduction is there
    norms = torch._foreach_norm(local, torch.inf) if local else []  # the largest magnitude: inf and NaN survive it
    bad = torch.zeros((), device=device)
    if norms:
        bad = (~torch.isfinite(torch.stack([n.to(device, torch.float32) for n in norms])).all()).float()
    if agree and dist.is_initialized() and dist.get_world_size(group) > 1:
        dist.all_reduce(bad, op=dist.ReduceOp.MAX, group=group)
    return not bad.item()
