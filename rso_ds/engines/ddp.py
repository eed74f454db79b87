"""DistributedDataParallel: W and B whole on every rank, gradients of B averaged by DDP's own buckets."""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from rso_ds.config import RSOConfig
from rso_ds.engines.local_steps import keep_gradients_local
from rso_ds.engines.replicated import ReplicatedLayout
from rso_ds.errors import RSOUnsupportedError
from rso_ds.layers import SubspaceLayer
from rso_ds.layout import Layout


def replicated_layout(
    model: nn.Module,
    layers: Mapping[str, SubspaceLayer],
    solver: torch.optim.Optimizer,
    config: RSOConfig,
    precise: Mapping[int, Tensor],
) -> Layout:
    """The layout of a bare or DDP-wrapped ``model``; ``precise`` as of ``ReplicatedLayout``.

    Raises ``RSOUnsupportedError`` for a bare model among several ranks, whose gradients nobody would average.
    """
    ranks = dist.get_world_size() if dist.is_initialized() else 1
    group = model.process_group if isinstance(model, DistributedDataParallel) else None
    if ranks > 1 and group is None and config.communicate == "every_step":
        raise RSOUnsupportedError(
            f"there are {ranks} ranks and the model is not wrapped, so that each would train alone: pass"
            " DistributedDataParallel(model), or call fully_shard on it first, or use rso_ds.initialize (DeepSpeed)."
        )
    if config.communicate == "boundary":
        keep_gradients_local(model)
    device = next(iter(layers.values())).weight.device
    return ReplicatedLayout(layers, solver, device, None, group, config.master_weights, precise)
