"""RSO as a torch optimizer, for one process.

DeepSpeed has its own adapter in ``rso_ds.engines.deepspeed``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from rso_ds.boundary import Boundary
from rso_ds.config import RSOConfig
from rso_ds.engines.replicated import ReplicatedShards
from rso_ds.errors import RSOCheckpointError, RSOConversionError, RSOUnsupportedError
from rso_ds.layers import check_conversion, rso_layers
from rso_ds.optim.groups import layer_groups, proximal_hook, solver_groups


def build_solver(groups: list[dict[str, Any]], config: RSOConfig) -> torch.optim.Optimizer:
    """The torch optimizer that ``config.solver`` names, over ready-made groups."""
    if config.solver == "sgd":
        return torch.optim.SGD(groups, lr=config.lr, momentum=config.momentum)
    kind = torch.optim.AdamW if config.solver == "adamw" else torch.optim.Adam
    return kind(groups, lr=config.lr, betas=config.betas, eps=config.eps)


class RSO(torch.optim.Optimizer):
    """Optimizer of a model converted by ``rso_ds.convert``; ``step`` also crosses subspace boundaries.

    Args:
        model: a module with RSO layers, already on its device and in its dtype.
        config: the configuration that the model was converted with.
        params: parameters or groups to train; default all trainable ones of the model.

    Raises ``RSOConversionError`` if the model has no RSO layer, ``RSOUnsupportedError`` under several
    ranks (use DeepSpeed there).

        config = rso_ds.RSOConfig(lr=1e-3, rank_ratio=0.25)
        rso_ds.convert(model, config)
        optimizer = rso_ds.RSO(model, config)
    """

    def __init__(self, model: nn.Module, config: RSOConfig, params: Iterable[Any] | None = None) -> None:
        layers = dict(rso_layers(model))
        if not layers:
            raise RSOConversionError(
                "the model has no RSO layer, so RSO would be plain AdamW: call rso_ds.convert(model, config) first."
            )
        check_conversion(layers, config)
        if dist.is_initialized() and dist.get_world_size() > 1:
            raise RSOUnsupportedError(
                "rso_ds.RSO runs in a single process for now; with several ranks use rso_ds.initialize (DeepSpeed)."
            )
        groups = solver_groups(model.parameters() if params is None else params, layers, {}, config)
        self.solver = build_solver(groups, config)
        if config.proximal:
            self.solver.register_step_pre_hook(proximal_hook(config))
        super().__init__(self.solver.param_groups, self.solver.defaults)
        self.param_groups, self.state = self.solver.param_groups, self.solver.state
        device = next(iter(layers.values())).weight.device
        decays, where = layer_groups(layers, self.param_groups)
        self._shards = ReplicatedShards(layers, self.solver, device, master_weights=config.master_weights)
        self.boundary = Boundary(config, layers, self._shards, decays, where)
        self.boundary.materialize()

    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        lrs = [float(group["lr"]) for group in self.param_groups]
        loss = self.solver.step(closure)
        self.boundary.step_applied(lrs)
        return loss

    def state_dict(self) -> dict[str, Any]:
        masters = self._shards.weight_masters
        rows = {} if masters is None else dict(masters.rows)
        return {**self.solver.state_dict(), "rso": self.boundary.state_dict(), "rso_master_rows": rows}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        if "rso" not in state_dict:
            raise RSOCheckpointError("the optimizer state has no 'rso' entry: it was not saved by RSO.")
        self.boundary.check_state(state_dict["rso"], "the optimizer state")
        self.solver.load_state_dict({k: v for k, v in state_dict.items() if not k.startswith("rso")})
        self.param_groups, self.state = self.solver.param_groups, self.solver.state
        if self._shards.weight_masters is not None:
            self._shards.weight_masters.rows = dict(state_dict["rso_master_rows"])
        self.boundary.load_state_dict(state_dict["rso"])
