"""The hooks that put RSO into a DeepSpeed engine: step, save, load."""

from __future__ import annotations

import os
from collections.abc import Mapping
from functools import wraps
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from rso_ds.boundary import Boundary
from rso_ds.checkpoint.state import read_state, write_state
from rso_ds.comm.counter import BACKWARD, install
from rso_ds.config import RSOConfig
from rso_ds.engines.deepspeed.loss_scale import scale_loss_at_stage_0
from rso_ds.engines.deepspeed.shards import deepspeed_shards
from rso_ds.engines.replicated import ReplicatedShards
from rso_ds.errors import RSOCheckpointError, RSOUnsupportedError
from rso_ds.layers import SubspaceLayer
from rso_ds.optim.groups import IS_SUBSPACE, W_DECAY, proximal_hook


def attach(engine: Any, layers: Mapping[str, SubspaceLayer], config: RSOConfig, where: list[int]) -> Boundary:
    """Make ``engine`` cross subspace boundaries and checkpoint RSO's state. Returns the boundary.

    ``where[i]`` is the index of the solver's parameter group that holds the B of layer i.
    """
    shards = deepspeed_shards(engine, layers, config.master_weights)
    solver = shards.solver
    groups = solver.param_groups
    assert all(groups[i][IS_SUBSPACE] for i in where)
    boundary = Boundary(config, dict(layers), shards, [groups[i][W_DECAY] for i in where], where)
    boundary.materialize()
    boundary.check_replicas()
    if config.proximal:
        solver.register_step_pre_hook(proximal_hook(config))
    scale_loss_at_stage_0(engine)
    _hook_step(engine, boundary, solver)
    _refuse_lossy_savers(engine)
    _hook_save(engine, boundary, shards)
    _hook_load(engine, boundary, shards)
    return boundary


def _refuse_lossy_savers(engine: Any) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise RSOUnsupportedError(
            "save_16bit_model would write W without the current B P^T: use rso_ds.checkpoint.save_dense(engine.module,"
            " folder, rank)."
        )

    engine.save_16bit_model = refuse


def count_traffic(engine: Any) -> None:
    """Give a DeepSpeed engine, of whatever optimizer, the attribute ``traffic``: a ``CommCounter``."""
    engine.traffic = install()
    inner = engine.backward  # stages 0 and 1 reduce gradients in it after autograd has returned

    @wraps(inner)
    def backward(*args: Any, **kwargs: Any) -> Any:
        with engine.traffic.phase(BACKWARD):
            return inner(*args, **kwargs)

    engine.backward = backward


def _hook_step(engine: Any, boundary: Boundary, solver: torch.optim.Optimizer) -> None:
    inner = engine.step
    stepped = False

    def mark(*_: Any) -> None:
        nonlocal stepped
        stepped = True

    solver.register_step_post_hook(mark)

    @wraps(inner)
    def step(*args: Any, **kwargs: Any) -> Any:
        nonlocal stepped
        stepped = False
        lrs = [float(group["lr"]) for group in solver.param_groups]  # before the scheduler moves on
        result = inner(*args, **kwargs)
        # was_step_applied alone does not know of steps that torch's own GradScaler skipped (ZeRO 0 with
        # fp16 autocast); the solver having run alone does not know of overflows found afterwards.
        if engine.was_step_applied() and stepped:
            boundary.step_applied(lrs)
        elif engine.was_step_applied() and engine.torch_autocast_z0_gradscaler is None:
            raise RSOUnsupportedError(
                f"DeepSpeed applied a step without {type(solver).__name__}.step: RSO cannot follow this optimizer"
                " set-up; remove the offload or overlap features of zero_optimization."
            )
        return result

    engine.step = step


def _hook_save(engine: Any, boundary: Boundary, shards: ReplicatedShards) -> None:
    inner = engine.save_checkpoint
    masters = shards.weight_masters

    @wraps(inner)
    def save_checkpoint(save_dir: Any, tag: Any = None, *args: Any, **kwargs: Any) -> Any:
        if kwargs.get("exclude_frozen_parameters") or (len(args) > 2 and args[2]):
            raise RSOUnsupportedError(
                "exclude_frozen_parameters would lose the training: RSO changes the frozen W at every boundary."
                " Save without it."
            )
        tag = f"global_step{engine.global_steps}" if tag is None else tag
        if dist.get_rank() == 0:
            # Before the engine's own files, so that "latest" never names a folder without it.
            write_state(Path(save_dir) / str(tag), boundary.state_dict())
        if masters is not None:
            masters.save(Path(save_dir) / str(tag), shards.rank, shards.world_size)
        return inner(save_dir, tag, *args, **kwargs)

    engine.save_checkpoint = save_checkpoint


def _hook_load(engine: Any, boundary: Boundary, shards: ReplicatedShards) -> None:
    inner = engine.load_checkpoint
    masters = shards.weight_masters

    @wraps(inner)
    def load_checkpoint(load_dir: Any, tag: Any = None, *args: Any, **kwargs: Any) -> Any:
        tag, state = _read_on_rank_zero(Path(load_dir), tag)
        folder = os.path.join(load_dir, tag)
        boundary.check_state(state, folder)
        if masters is not None:
            masters.rows = {}
            if state["draw"] > 0:
                masters.load(Path(folder), shards.rank, shards.world_size)
        result = inner(load_dir, tag, *args, **kwargs)
        if result[0] is None:
            raise RSOCheckpointError(f"DeepSpeed could not load {folder}: see its log above.")
        boundary.load_state_dict(state)
        boundary.check_replicas()
        return result

    engine.load_checkpoint = load_checkpoint


def _read_on_rank_zero(load_dir: Path, tag: Any) -> tuple[str, dict[str, Any]]:
    """(tag, RSO's state): rank 0 reads, every rank gets the same answer or the same error."""
    box: list[Any] = [None]
    if dist.get_rank() == 0:
        try:
            if tag is None:
                latest = load_dir / "latest"
                if not latest.is_file():
                    raise RSOCheckpointError(
                        f"{latest} does not exist: there is no checkpoint to load, or name its tag."
                    )
                tag = latest.read_text().strip()
            box[0] = (str(tag), read_state(load_dir / str(tag)))
        except (RSOCheckpointError, OSError) as error:
            box[0] = str(error)
    dist.broadcast_object_list(box, src=0)
    if isinstance(box[0], str):
        raise RSOCheckpointError(box[0])
    return box[0]
