"""DDP and FSDP2 behind the few methods of DeepSpeed's engine that the training loop uses."""

from __future__ import annotations

import logging
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.nn.parallel import DistributedDataParallel

from rso_ds.checkpoint import Checkpointer, TrainingState
from rso_ds.comm.agreement import agree_on_setup
from rso_ds.comm.counter import install
from rso_ds.comm.rank_context import RankContext
from rso_ds.config import RSOConfig
from rso_ds.deepspeed_json import optimizer_type, rso_config
from rso_ds.engines.fsdp2 import FSDPLayout
from rso_ds.engines.optimizer import RSO
from rso_ds.engines.replicated import ReplicatedLayout
from rso_ds.errors import RSOConfigError, RSOUnsupportedError
from rso_ds.layers import convert, summary_table
from rso_ds.layout import Layout
from rso_ds.planning.memory.trace import block_names
from rso_ds.recipes.training.schedule import Schedule, ScheduledRates, scheduler_of_json
from rso_ds.solvers.groups import decay_groups

logger = logging.getLogger(__name__)


class TorchEngine:
    """``kind`` "ddp" or "fsdp2"; ``replicas`` above 1 makes FSDP2 hybrid (HSDP); ``schedule`` None: that of the JSON.

    Of the DeepSpeed JSON it takes the optimizer (RSO, AdamW or Adam), the scheduler, clipping, accumulation and
    bf16: parameters are computed with in bf16 (autocast under DDP, ``MixedPrecisionPolicy`` under FSDP2, gradients
    reduced in fp32). They rest in fp32, but for W and whatever else is frozen under FSDP2, which rests in bf16 as under
    DeepSpeed: ``merge_rounding`` and ``master_weights`` mean the same in both. ``zero_optimization`` says how DeepSpeed
    shards and is ignored.

    Raises ``RSOUnsupportedError`` or ``RSOConfigError`` for what it does not take.
    """

    def __init__(
        self,
        model: nn.Module,
        ds_json: dict[str, Any],
        kind: str,
        context: RankContext,
        replicas: int = 1,
        schedule: Schedule | None = None,
    ) -> None:
        _refuse(ds_json, kind, replicas, context.world_size)
        # FSDP2 moves one unit after the other to the device, and cuts it there: never the whole model.
        self.module, self.kind = model if kind == "fsdp2" else model.to(context.device), kind
        self.accumulation: int = ds_json["gradient_accumulation_steps"]
        self.clip = float(ds_json.get("gradient_clipping") or 0.0)
        self._skipped, self._micro = 0, 0
        self._bf16 = bool((ds_json.get("bf16") or {}).get("enabled"))
        config = rso_config(ds_json) if optimizer_type(ds_json) == "RSO" else None
        if config is not None:
            converted = convert(model, config)
            agree_on_setup(converted.layers, config)  # DDP would fail on unequal shapes in words of its own
            if context.rank == 0:
                logger.info(summary_table(model, config))
            del converted  # it holds the weights as they were
        if kind == "fsdp2" and self._bf16:
            _round_frozen(model)
        self._apart = config is not None and config.communicate == "boundary"
        extra = self._wrap(context, replicas, self._apart)
        self.traffic = install()
        self.optimizer = _optimizer(self._wrapped, self.module, ds_json, config, extra)
        if isinstance(self.optimizer, RSO):
            self.rso = self.optimizer.boundary
            if context.rank == 0:
                logger.info(self.optimizer.form)
        self.scheduler: Any = (
            scheduler_of_json(self.optimizer, ds_json.get("scheduler") or {})
            if schedule is None
            else ScheduledRates(self.optimizer, schedule)
        )
        self.checkpoints = self._checkpointer()

    def _wrap(self, context: RankContext, replicas: int, apart: bool) -> dict[str, Any]:
        """Wrap the model; returns further arguments of ``RSO``."""
        if self.kind == "ddp":
            devices = [context.local_rank] if context.on_gpu else None
            self._wrapped: Any = DistributedDataParallel(self.module, device_ids=devices)
            return {}
        shape, names = (context.world_size,), ("shards",)
        if replicas > 1:
            shape, names = (replicas, context.world_size // replicas), ("replicas", "shards")  # type: ignore[assignment]
        mesh = init_device_mesh(context.device.type, shape, mesh_dim_names=names)
        options: dict[str, Any] = {"mesh": mesh["shards"] if apart else mesh}
        if self._bf16:
            options["mp_policy"] = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
        for name in block_names(self.module):
            fully_shard(self.module.get_submodule(name), **options)
        self._wrapped = fully_shard(self.module, **options)
        return {"replicas": mesh["replicas"].get_group()} if apart and replicas > 1 else {}

    # -- what the loop calls -------------------------------------------------------------------------

    @property
    def training(self) -> bool:
        return self.module.training

    def train(self, mode: bool = True) -> None:
        self._wrapped.train(mode)

    def eval(self) -> None:
        self._wrapped.eval()

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if torch.is_grad_enabled():
            last = (self._micro + 1) % self.accumulation == 0
            if self.kind == "ddp":
                self._wrapped.require_backward_grad_sync = last
            else:
                self._wrapped.set_requires_gradient_sync(last)
        low = self._bf16 and self.kind == "ddp"
        device = next(self.module.parameters()).device.type
        with torch.autocast(device, torch.bfloat16) if low else nullcontext():
            return self._wrapped(*args, **kwargs)

    def backward(self, loss: Tensor) -> None:
        (loss / self.accumulation).backward()
        self._micro += 1

    def step(self) -> None:
        """Update once ``accumulation`` micro batches have come in; nothing before."""
        if self._micro % self.accumulation:
            return
        if self.clip:
            nn.utils.clip_grad_norm_(self.module.parameters(), self.clip)
        applied = self._step()
        self.optimizer.zero_grad(set_to_none=True)
        # Replicas that step apart keep one schedule, whichever of them leaves a step out.
        if self.scheduler is not None and (applied or self._apart):
            self.scheduler.step()

    def _step(self) -> bool:
        """Whether the step was taken: one with infinite or NaN gradients is not."""
        if not isinstance(self.optimizer, RSO):
            if not self._layout.finite(self.module.parameters()):
                self._skipped += 1
                return False
            self.optimizer.step()
            return True
        self.optimizer.step()
        return self.optimizer.step_was_applied

    def _checkpointer(self) -> Checkpointer:
        extras = {} if self.scheduler is None else {"scheduler": self.scheduler}
        if isinstance(self.optimizer, RSO):
            return self.optimizer.checkpointer(**extras)
        if self.kind == "ddp":
            self._layout: Layout = ReplicatedLayout({}, self.optimizer, next(self.module.parameters()).device)
        else:
            self._layout = FSDPLayout(self._wrapped, {}, self.optimizer, RSOConfig())
        return Checkpointer(TrainingState(self.module, self._layout, None), extras, {"engine": self})

    @property
    def skipped_steps(self) -> int:
        """Steps left out because a gradient was not finite."""
        return self.optimizer.skipped_steps if isinstance(self.optimizer, RSO) else self._skipped

    def state_dict(self) -> dict[str, Any]:
        """What the engine itself counts, where RSO does not."""
        return {"skipped_steps": self._skipped}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._skipped = state.get("skipped_steps", 0)


def _refuse(ds_json: dict[str, Any], kind: str, replicas: int, ranks: int) -> None:
    if (ds_json.get("fp16") or {}).get("enabled"):
        raise RSOUnsupportedError(f"--engine {kind} has no loss scaling: use --precision bf16 or fp32.")
    zero = ds_json.get("zero_optimization") or {}
    for key in ("offload_optimizer", "offload_param"):
        if (zero.get(key) or {}).get("device", "none") != "none":
            raise RSOUnsupportedError(f"--engine {kind} does not offload: remove zero_optimization.{key}.")
    if replicas > 1 and kind != "fsdp2":
        raise RSOConfigError(f"--replicas {replicas} divides the ranks of --engine fsdp2; {kind} has no shards.")
    if ranks % replicas:
        raise RSOConfigError(f"--replicas {replicas} does not divide {ranks} ranks.")


def _round_frozen(model: nn.Module) -> None:
    """What is frozen, W above all, rests in bf16, as it is sent and computed with. fp32 rows would be twice the size
    for the boundaries' sake alone, and for those there are ``merge_rounding`` and ``master_weights``."""
    for param in model.parameters():
        if not param.requires_grad:
            param.data = param.data.bfloat16()


def _optimizer(
    wrapped: nn.Module, bare: nn.Module, ds_json: dict[str, Any], config: RSOConfig | None, extra: dict[str, Any]
) -> torch.optim.Optimizer:
    params = ds_json["optimizer"]["params"]
    groups = decay_groups(bare, float(params.get("weight_decay", 0.0)))
    if config is not None:
        return RSO(wrapped, config, groups, **extra)
    kind = ds_json["optimizer"]["type"].lower()
    unknown = sorted(set(params) - {"lr", "betas", "eps", "weight_decay", "torch_adam", "adam_w_mode"})
    if kind not in ("adamw", "adam") or unknown:
        what = f"type '{ds_json['optimizer']['type']}'" + (f" with '{unknown[0]}'" if unknown else "")
        raise RSOUnsupportedError(f"optimizer {what} is DeepSpeed's: use RSO, AdamW or Adam here.")
    options = {k: v for k, v in params.items() if k in ("lr", "betas", "eps")}
    # DeepSpeed's "Adam" decays as AdamW does unless it is told otherwise.
    decoupled = kind == "adamw" or params.get("adam_w_mode", True)
    return (torch.optim.AdamW if decoupled else torch.optim.Adam)(groups, **options)
