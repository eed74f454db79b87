"""Local steps (``communicate: "boundary"``): what ranks do once an interval instead of at every step.

Beyond the paper: each rank solves the subproblem of the current subspace on its own data, then B is
averaged, so that traffic falls by another factor of ``interval``. All ranks use one P, so the mean of their
merged updates is the merge of the mean of their B. Solver state stays each rank's own.
"""

# No "from __future__ import annotations" here: DDP compares a hook's annotations with the classes themselves.

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from rso_ds.comm.ddp_hooks import refuse_second_hook


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


def keep_gradients_local(model: nn.Module) -> None:
    """Let ``DistributedDataParallel`` average nothing: its buckets come back as they are."""
    if isinstance(model, DistributedDataParallel):
        refuse_second_hook(model)
        model.register_comm_hook(None, _local)


def _local(state: None, bucket: dist.GradBucket) -> torch.futures.Future[Tensor]:
    future: torch.futures.Future[Tensor] = torch.futures.Future()
    future.set_result(bucket.buffer())
    return future
