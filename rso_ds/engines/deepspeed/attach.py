"""The hooks that put RSO into a DeepSpeed engine."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial, wraps
from typing import Any

import torch
from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer

from rso_ds.boundary import Boundary
from rso_ds.comm.counter import BACKWARD, install
from rso_ds.comm.outcome import agreed
from rso_ds.config import RSOConfig
from rso_ds.engines.deepspeed.layout import deepspeed_layout
from rso_ds.engines.deepspeed.loss_scale import explain_lowest_scale, scale_loss_at_stage_0
from rso_ds.engines.deepspeed.saving import hook_checkpoints, hook_consolidated_saves
from rso_ds.errors import RSOConversionError, RSOUnsupportedError
from rso_ds.layers import SubspaceLayer
from rso_ds.layers.form import settle_form
from rso_ds.layers.start import refuse_untrained
from rso_ds.solvers.finite import gradients_finite
from rso_ds.solvers.groups import IS_SUBSPACE, W_DECAY, proximal_hook


def attach(engine: Any, layers: Mapping[str, SubspaceLayer], config: RSOConfig, where: list[int]) -> Boundary:
    """Make ``engine`` cross subspace boundaries and checkpoint RSO's state. Returns the boundary.

    ``where[i]`` is the index of the solver's parameter group that holds the B of layer i.
    """
    layout = deepspeed_layout(engine, layers, config.master_weights)
    solver = layout.solver
    groups = solver.param_groups
    assert all(groups[i][IS_SUBSPACE] for i in where)
    ours = {id(layer.B) for layer in layers.values()}
    trained = {
        n: p for n, p in engine.module.named_parameters() if p.requires_grad and layout.solver_key(p) is not None
    }
    dense = {n: p for n, p in trained.items() if id(p) not in ours}
    decays = [groups[i][W_DECAY] for i in where]
    config, engine.rso_form = settle_form(engine.module, config, layers.values(), decays, layout.merge_sends)
    boundary = Boundary(config, dict(layers), layout, decays, where, dense)
    boundary.materialize()
    boundary.check_replicas()
    if config.proximal:
        solver.register_step_pre_hook(proximal_hook(config))
    scale_loss_at_stage_0(engine)
    explain_lowest_scale(engine)
    skip_nonfinite_steps(engine)
    _hook_step(engine, boundary, solver)
    _look_at_first_gradients(engine, boundary)
    engine.checkpoints = hook_checkpoints(engine, layout, boundary)
    hook_consolidated_saves(engine)
    return boundary


def skip_nonfinite_steps(engine: Any) -> None:
    """Let ``engine`` skip steps with infinite or NaN gradients in every precision, as it does fp16 overflows.

    ZeRO-3 and the 16-bit optimizers without ZeRO check of themselves; ZeRO-1 and 2 only in 16 bit unless told to;
    a plain torch optimizer (stage 0 in fp32) never.
    """
    optimizer = engine.optimizer
    if isinstance(optimizer, DeepSpeedZeroOptimizer):
        optimizer.check_grad_overflow = True
    elif isinstance(optimizer, torch.optim.Optimizer) and engine.torch_autocast_z0_gradscaler is None:
        inner = optimizer.step

        @wraps(inner)
        def step(*args: Any, **kwargs: Any) -> Any:
            params = [p for group in optimizer.param_groups for p in group["params"]]
            bad = engine.optimizer.overflow = not gradients_finite(params, agree=False)  # the engine reads "overflow"
            return None if bad else inner(*args, **kwargs)

        engine.optimizer.step = step


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
        boundary.follow_loads()
        lrs = [float(group["lr"]) for group in solver.param_groups]  # before the scheduler moves on
        result = inner(*args, **kwargs)
        boundary.skipped_steps = engine.skipped_steps
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


def _look_at_first_gradients(engine: Any, boundary: Boundary) -> None:
    """Refuse, at the first step of ``engine``, layers whose B the backward pass has gone by."""
    trained = {
        name: layer for name, layer in boundary.layers.items() if boundary.layout.solver_key(layer.B) is not None
    }
    reached: set[int] = set()  # DeepSpeed moves gradients into its buckets, and makes those of other parameters zero
    hooks = [
        layer.B.register_post_accumulate_grad_hook(partial(lambda key, _: reached.add(key), id(layer)))
        for layer in trained.values()
    ]
    inner = engine.step

    @wraps(inner)
    def step(*args: Any, **kwargs: Any) -> Any:
        if hooks and engine.is_gradient_accumulation_boundary():
            for hook in hooks:
                hook.remove()
            hooks.clear()
            agreed(
                lambda: refuse_untrained(engine.module, trained, lambda layer: id(layer) in reached),
                kind=RSOConversionError,
            )
        return inner(*args, **kwargs)

    engine.step = step
