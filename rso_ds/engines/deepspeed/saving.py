"""``engine.save_checkpoint`` and ``load_checkpoint`` of a DeepSpeed engine that trains with RSO.

DeepSpeed's own files bind a run to its stage and world size, and its universal checkpoints lose what RSO has
merged into the frozen W. The two methods keep their signatures and write ``rso_ds.checkpoint`` instead.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from rso_ds.boundary import Boundary
from rso_ds.checkpoint import Checkpointer, TrainingState, dense_state_dict
from rso_ds.checkpoint.folder import write_text
from rso_ds.comm.outcome import agreed, rank_of
from rso_ds.engines.deepspeed.pending import PendingGradients
from rso_ds.errors import RSOUnsupportedError
from rso_ds.layout import Layout

_SCRIPT = '''"""DeepSpeed puts a conversion script here. Checkpoints of RSO are converted by rso_ds itself."""

import sys

sys.exit("These are checkpoints of rso_ds, from which zero_to_fp32 would lose B P^T. Use: rso-ds export CHECKPOINT OUT")
'''


def hook_checkpoints(engine: Any, layout: Layout, boundary: Boundary) -> Checkpointer:
    """Replace the engine's two methods, refuse those that would lose W; returns what they work with."""
    own: dict[str, Any] = {"engine": _Counters(engine), "loss_scale": _LossScale(engine)}
    extras = {} if engine.lr_scheduler is None else {"scheduler": engine.lr_scheduler}
    state = TrainingState(engine.module, layout, boundary)
    checkpoints = Checkpointer(state, extras, own, PendingGradients(engine).refuse)

    def save_checkpoint(
        save_dir: Any,
        tag: Any = None,
        client_state: Any = None,
        save_latest: bool = True,
        exclude_frozen_parameters: bool = False,
    ) -> bool:
        """As DeepSpeed's; see ``rso_ds.checkpoint.Checkpointer.save`` for what it writes and raises."""
        if exclude_frozen_parameters:
            raise RSOUnsupportedError(
                "exclude_frozen_parameters would lose the training: RSO changes the frozen W at every boundary."
                " Save without it."
            )
        if not save_latest:
            raise RSOUnsupportedError(
                "save_latest=False is not supported: 'latest' always names the newest checkpoint."
            )
        tag = f"global_step{engine.global_steps}" if tag is None else str(tag)
        checkpoints.save(save_dir, tag, client_state)
        script = Path(save_dir) / "zero_to_fp32.py"
        agreed(lambda: write_text(script, _SCRIPT) if rank_of() == 0 else None)
        return True

    def load_checkpoint(
        load_dir: Any,
        tag: Any = None,
        load_module_strict: bool = True,
        load_optimizer_states: bool = True,
        load_lr_scheduler_states: bool = True,
        load_module_only: bool = False,
        custom_load_fn: Any = None,
    ) -> tuple[str, dict[str, Any]]:
        """As DeepSpeed's. Whole runs: ``rso_ds.checkpoint.Checkpointer.load``; ``load_module_only`` begins a new run
        with the checkpoint's effective weights: ``load_weights``."""
        if custom_load_fn is not None:
            raise RSOUnsupportedError(
                "custom_load_fn is not supported: rso-ds export CHECKPOINT OUT writes the dense model, which loads in"
                " any way."
            )
        tag = None if tag is None else str(tag)
        if load_module_only:
            path, client = checkpoints.load_weights(load_dir, tag)
        else:
            path, client = checkpoints.load(
                load_dir, tag, solver=load_optimizer_states, extras=load_lr_scheduler_states
            )
        return str(path), client

    def save_16bit_model(
        save_dir: Any, save_filename: str = "pytorch_model.bin", exclude_frozen_parameters: bool = False
    ) -> bool:
        """As DeepSpeed's: the equal dense model in the dtype of its weights, written by rank 0."""
        if exclude_frozen_parameters:
            raise RSOUnsupportedError("exclude_frozen_parameters would leave every W out: save without it.")
        state = dense_state_dict(engine.module, keep=rank_of() == 0)

        def write() -> None:
            Path(save_dir).mkdir(parents=True, exist_ok=True)
            torch.save(state, Path(save_dir) / save_filename)

        agreed(lambda: write() if rank_of() == 0 else None)
        return True

    engine.save_checkpoint = save_checkpoint
    engine.load_checkpoint = load_checkpoint
    engine.save_16bit_model = save_16bit_model
    return checkpoints


def hook_consolidated_saves(engine: Any) -> None:
    """At stage 3, let what Trainer, Accelerate and ``save_pretrained`` ask for be the equal dense model:
    ``engine._zero3_consolidated_16bit_state_dict()``, where all ranks call it and rank 0 gets the tensors. (At the
    other stages ``state_dict`` is dense by itself: ``SubspaceLayer``.)"""
    if not engine.zero_optimization_partition_weights():
        return

    def consolidated(*_: Any, **__: Any) -> dict[str, Any] | None:
        state = dense_state_dict(engine.module, keep=rank_of() == 0)
        return state if rank_of() == 0 else None

    engine._zero3_consolidated_16bit_state_dict = consolidated
    # Trainer asks first; its alternative, a DeepSpeed checkpoint in the model's folder, is no model.
    engine.zero_gather_16bit_weights_on_model_save = lambda: True


class _Counters:
    """DeepSpeed's own counts, which its logs, schedules and the ends of its accumulations follow."""

    _NAMES = ("global_steps", "global_samples", "micro_steps")

    def __init__(self, engine: Any) -> None:
        self._engine = engine

    def state_dict(self) -> dict[str, Any]:
        counts = {name: getattr(self._engine, name) for name in self._NAMES}
        return counts | {"gradient_accumulation_steps": self._engine.gradient_accumulation_steps()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        engine = self._engine
        engine.skipped_steps = engine.rso.skipped_steps
        engine.global_steps = state.get("global_steps", engine.rso.applied_steps)
        engine.global_samples = state.get("global_samples", engine.global_steps * engine.train_batch_size())
        # DeepSpeed counts calls of step, and programs differ in how often they call it: see PendingGradients.
        here = engine.gradient_accumulation_steps()
        there = state.get("gradient_accumulation_steps", here)
        micro_steps = state.get("micro_steps", engine.global_steps * here)
        engine.micro_steps = micro_steps if here == there else micro_steps // there * here


class _LossScale:
    """The moving parts of whichever loss scaler the engine has; empty where it does not scale."""

    _NAMES = ("cur_scale", "cur_iter", "last_overflow_iter", "cur_hysteresis")

    def __init__(self, engine: Any) -> None:
        self._grad_scaler = engine.torch_autocast_z0_gradscaler
        optimizer = engine.optimizer
        self._scaler = getattr(optimizer, "loss_scale_config", None) or getattr(optimizer, "loss_scaler", None)

    def state_dict(self) -> dict[str, Any]:
        if self._grad_scaler is not None:
            return dict(self._grad_scaler.state_dict())
        return {name: value for name in self._NAMES if (value := getattr(self._scaler, name, None)) is not None}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        if self._grad_scaler is not None and "scale" in state:
            self._grad_scaler.load_state_dict(state)
            return
        for name in self._NAMES:  # another engine or precision may have had no scaler: then ours starts anew
            if name in state and hasattr(self._scaler, name):
                setattr(self._scaler, name, state[name])
