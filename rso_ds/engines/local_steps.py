"""Local steps (``communicate: "boundary"``): what ranks do once an interval instead of at every step.

Beyond the paper: each rank solves the subproblem of the current subspace on its own data, then B is
averaged, so that traffic falls by another factor of ``interval``. All ranks use one P, so the mean of their
merged updates is the merge of the mean of their B. Solver state stays each rank's own.
"""

# No "from __future__ import annotations" here: DDP compares a hook's annotations with the classes themselves.

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from rso_ds.comm.ddp_hooks import refuse_second_hook
from rso_ds.subspace import add_lifted_


@torch.no_grad()
def average_(tensors: Sequence[Tensor], group: Any) -> None:
    """Replace each tensor by its mean over the ranks of ``group``: one all-reduce, in fp32 at least."""
    ranks = dist.get_world_size(group)
    if ranks == 1:
        return
    wide = torch.promote_types(tensors[0].dtype, torch.float32)
    flat = torch.cat([t.reshape(-1).to(wide) for t in tensors])
    dist.all_reduce(flat, group=group)
    for tensor, mean in zip(tensors, flat.div_(ranks).split([t.numel() for t in tensors]), strict=True):
        tensor.copy_(mean.view_as(tensor))


class OuterMomentum:
    """M <- momentum * M + B P^T and W <- decay * W + M, with M in fp32 for each layer.

    ``weight_rows``: layer name -> the rows [rows, in] of W that this rank merges.
    """

    def __init__(self, momentum: float, weight_rows: Mapping[str, Tensor]) -> None:
        self.momentum = momentum
        self.rows = {
            name: torch.zeros_like(rows, dtype=torch.promote_types(rows.dtype, torch.float32))
            for name, rows in weight_rows.items()
        }

    def merge(self, name: str, weight_rows: Tensor, B_rows: Tensor, P: Tensor, decay: float) -> Tensor:
        """The new W in fp32 (fp64 if W is); shapes as in ``merged_weight``."""
        dtype = torch.promote_types(weight_rows.dtype, torch.float32)
        update = add_lifted_(self.rows[name], B_rows.to(dtype), P, beta=self.momentum)
        return decay * weight_rows.to(dtype) + update


def keep_gradients_local(model: nn.Module) -> None:
    """Let ``DistributedDataParallel`` average nothing: its buckets come back as they are."""
    if isinstance(model, DistributedDataParallel):
        refuse_second_hook(model)
        model.register_comm_hook(None, _local)


def _local(state: None, bucket: dist.GradBucket) -> torch.futures.Future[Tensor]:
    future: torch.futures.Future[Tensor] = torch.futures.Future()
    future.set_result(bucket.buffer())
    return future
