"""Local steps (``communicate: "boundary"``): what ranks do once an interval instead of at every step.

Beyond the paper: each rank solves the subproblem of the current subspace on its own data, then B is
averaged, so that traffic falls by another factor of ``interval``. All ranks use one P, so the mean of their
merged updates is the merge of the mean of their B. Solver state stays each rank's own.
"""

# No "from __future__ import annotations" here: DDP compares a hook's annotations with the classes themselves.

from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from rso_ds.comm.ddp_hooks import refuse_second_hook
from rso_ds.layers.partitioned import flat_memory

BUCKET = 1 << 25  # elements of one all-reduce: 128 MiB in fp32, where all at once took 6.2 GiB for a 7B model


@torch.no_grad()
def average_(tensors: Sequence[Tensor], group: Any) -> None:
    """Replace each tensor by its mean over the ranks of ``group``, in fp32 at least, ``BUCKET`` elements at a time."""
    ranks = dist.get_world_size(group)
    if ranks == 1:
        return
    wide = torch.promote_types(tensors[0].dtype, torch.float32)
    for pieces in _buckets([flat_memory(tensor) for tensor in tensors]):
        flat = torch.cat([piece.to(wide) for piece in pieces])
        dist.all_reduce(flat, group=group)
        for piece, mean in zip(pieces, flat.div_(ranks).split([p.numel() for p in pieces]), strict=True):
            piece.copy_(mean)


def _buckets(flats: Sequence[Tensor]) -> Iterator[list[Tensor]]:
    """The elements of ``flats`` in order, cut into lists of views with ``BUCKET`` elements together, the last fewer."""
    bucket: list[Tensor] = []
    room = BUCKET
    for flat in flats:
        while flat.numel():
            bucket.append(flat[:room])
            flat = flat[room:]
            room -= bucket[-1].numel()
            if not room:
                yield bucket
                bucket, room = [], BUCKET
    if bucket:
        yield bucket


def keep_gradients_local(model: nn.Module) -> None:
    """Let ``DistributedDataParallel`` average nothing: its buckets come back as they are."""
    if isinstance(model, DistributedDataParallel):
        refuse_second_hook(model)
        model.register_comm_hook(None, _local)


def _local(state: None, bucket: dist.GradBucket) -> torch.futures.Future[Tensor]:
    future: torch.futures.Future[Tensor] = torch.futures.Future()
    future.set_result(bucket.buffer())
    return future
