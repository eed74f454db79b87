"""Which ``Layout`` describes a DeepSpeed engine's optimizer."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed as dist
from deepspeed.accelerator import get_accelerator
from deepspeed.runtime.bf16_optimizer import BF16_Optimizer
from deepspeed.runtime.fp16.fused_optimizer import FP16_Optimizer
from deepspeed.runtime.fp16.unfused_optimizer import FP16_UnfusedOptimizer
from deepspeed.runtime.zero.stage3 import DeepSpeedZeroOptimizer_Stage3
from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer

from rso_ds.engines.deepspeed.flat import FlatGroup, FlatLayout
from rso_ds.engines.deepspeed.stage3 import Stage3Layout
from rso_ds.engines.replicated import ReplicatedLayout
from rso_ds.errors import RSOUnsupportedError
from rso_ds.layers import SubspaceLayer
from rso_ds.layout import Layout
from rso_ds.solvers.state import restart_step


def deepspeed_layout(engine: Any, layers: Mapping[str, SubspaceLayer], master_weights: str = "none") -> Layout:
    """Adapter for ``engine.optimizer``. Raises ``RSOUnsupportedError`` for a class it does not know."""
    optimizer = engine.optimizer
    device = torch.device(get_accelerator().current_device_name())
    group = engine.seq_data_parallel_group
    rank, world_size = dist.get_rank(group), dist.get_world_size(group)
    if isinstance(optimizer, DeepSpeedZeroOptimizer_Stage3):
        return Stage3Layout(layers, optimizer, device, group, master_weights)
    if isinstance(optimizer, DeepSpeedZeroOptimizer):
        flats = [
            FlatGroup.of(params, offsets, master, rank, world_size)
            for params, offsets, master in zip(
                optimizer.round_robin_bit16_groups,
                optimizer.round_robin_bit16_offsets,
                optimizer.single_partition_of_fp32_groups,
                strict=True,
            )
        ]
        return FlatLayout(layers, optimizer.optimizer, device, flats, group, master_weights)
    if isinstance(optimizer, BF16_Optimizer):
        flats = [
            FlatGroup.of(params, None, master, rank, world_size)
            for params, master in zip(optimizer.bf16_groups, optimizer.fp32_groups_flat_partition, strict=True)
        ]
        return FlatLayout(layers, optimizer.optimizer, device, flats, group, master_weights)
    if isinstance(optimizer, FP16_Optimizer):
        _undo_dummy_step(optimizer.optimizer)
        flats = [
            FlatGroup.of(params, None, master, 0, 1)
            for params, master in zip(optimizer.fp16_groups, optimizer.fp32_groups_flat, strict=True)
        ]
        return FlatLayout(layers, optimizer.optimizer, device, flats, group, master_weights)
    if isinstance(optimizer, FP16_UnfusedOptimizer):
        _undo_dummy_step(optimizer.optimizer)
        masters = {
            id(low): high
            for lows, highs in zip(optimizer.fp16_groups, optimizer.fp32_groups, strict=True)
            for low, high in zip(lows, highs, strict=True)
        }
        return ReplicatedLayout(layers, optimizer.optimizer, device, masters, group, master_weights)
    if isinstance(optimizer, torch.optim.Optimizer):
        return ReplicatedLayout(layers, optimizer, device, group=group, master_weights=master_weights)
    raise RSOUnsupportedError(
        f"RSO does not know DeepSpeed's {type(optimizer).__name__}: use ZeRO stage 0-3 with Adam or SGD."
    )


def _undo_dummy_step(solver: torch.optim.Optimizer) -> None:
    # These two optimizers take one step with zero gradients to allocate their state, which leaves Adam's
    # bias correction one step ahead of every other stage for the whole run.
    for state in solver.state.values():
        restart_step(state)
