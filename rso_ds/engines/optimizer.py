"""RSO as a torch optimizer: one process, DistributedDataParallel, FSDP2 and HSDP.

DeepSpeed has its own adapter in ``rso_ds.engines.deepspeed``.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from rso_ds.boundary import Boundary
from rso_ds.checkpoint import Checkpointer, TrainingState
from rso_ds.checkpoint.boundary_state import check_boundary_state
from rso_ds.comm.agreement import agree_on_setup
from rso_ds.comm.counter import install
from rso_ds.comm.outcome import agreed, rank_of
from rso_ds.config import RSOConfig
from rso_ds.engines.ddp import replicated_layout
from rso_ds.engines.fsdp2 import FSDPLayout, is_sharded, refuse_fsdp1
from rso_ds.engines.used_gradients import mark_used, refuse_unused
from rso_ds.errors import RSOCheckpointError, RSOConversionError, RSOUnsupportedError
from rso_ds.layers import check_conversion, much_outside, rso_layers
from rso_ds.layers.form import settle_form
from rso_ds.layers.partitioned import local_part
from rso_ds.layers.start import begin_run, refuse_untrained
from rso_ds.layers.wrappers import without_compile
from rso_ds.layout import Layout
from rso_ds.solvers.build import build_solver
from rso_ds.solvers.groups import IS_SUBSPACE, layer_groups, proximal_hook, solver_groups
from rso_ds.weights.parameter_masters import ParameterMasters

logger = logging.getLogger(__name__)


class RSO(torch.optim.Optimizer):
    """Optimizer of a model converted by ``rso_ds.convert``; ``step`` also crosses subspace boundaries.

    Args:
        model: a module with RSO layers, already on its device and in its dtype; among several ranks, the
            module after ``DistributedDataParallel(module)`` or ``fully_shard``.
        config: the configuration that the model was converted with.
        params: parameters or groups to train; default all trainable ones of the model.
        replicas: under FSDP2 with ``communicate: "boundary"``, the process group of the ranks that hold the
            same rows and step apart.

    ``traffic`` counts what this process sends (``rso_ds.comm.CommCounter``), ``form`` says how layers compute and
    why. Raises ``RSOConversionError``
    if the model has no RSO layer, ``RSOUnsupportedError`` for an unwrapped model among several ranks, FSDP1,
    and layouts that cut W elsewhere than along its rows, ``RSOReplicaError`` if ranks disagree.

        config = rso_ds.RSOConfig(lr=1e-3, rank_ratio=0.25)
        rso_ds.convert(model, config)
        model = DistributedDataParallel(model)
        optimizer = rso_ds.RSO(model, config)
    """

    def __init__(
        self, model: nn.Module, config: RSOConfig, params: Iterable[Any] | None = None, replicas: Any = None
    ) -> None:
        refuse_fsdp1(model)
        model = without_compile(model)
        bare = model.module if isinstance(model, DistributedDataParallel) else model
        self._build_solver(without_compile(bare), config, params)
        self._attach(model, replicas)

    def _build_solver(self, bare: nn.Module, config: RSOConfig, params: Iterable[Any] | None) -> None:
        self._bare, self._config = bare, config
        layers = dict(rso_layers(bare))
        if not layers:
            raise RSOConversionError(
                "the model has no RSO layer, so RSO would be plain AdamW: call rso_ds.convert(model, config) first."
            )
        check_conversion(layers, config)
        agree_on_setup(layers, config)
        if (warning := much_outside(bare)) and rank_of() == 0:
            logger.warning(warning)
        groups = solver_groups(bare.parameters() if params is None else params, layers, {}, config)
        self.solver = build_solver(groups, config)
        self.step_was_applied = False
        self._stepped = False
        self.traffic = install()
        if config.proximal:
            self.solver.register_step_pre_hook(proximal_hook(config))
        super().__init__(self.solver.param_groups, self.solver.defaults)
        self.follow_solver()

    def _attach(self, model: nn.Module, replicas: Any) -> None:
        """Find where ``model``, in its wrapper by now, keeps W and B, and draw the first subspaces."""
        bare, config, model = self._bare, self._config, without_compile(model)
        layers = dict(rso_layers(bare))
        agreed(lambda: begin_run(bare, layers), kind=RSOConversionError)
        self._masters = ParameterMasters(p for group in self.param_groups for p in group["params"])
        decays, where = layer_groups(layers, self.param_groups)
        self._layout: Layout
        masters = self._masters.of
        if is_sharded(model):
            self._layout = FSDPLayout(model, layers, self.solver, config, replicas, masters)
        elif replicas is not None:
            raise RSOUnsupportedError("replicas= is for models that fully_shard has cut: leave it out.")
        else:
            self._layout = replicated_layout(model, layers, self.solver, config, masters)
        self._config, self.form = settle_form(bare, config, layers.values(), decays, self._layout.merge_sends)
        ids = {id(p) for group in self.param_groups if not group[IS_SUBSPACE] for p in group["params"]}
        dense = {name: p for name, p in bare.named_parameters() if id(p) in ids}
        if config.communicate == "boundary":
            self._layout.step_apart(list(dense.values()), config.outer_momentum)
        self.boundary = Boundary(self._config, layers, self._layout, decays, where, dense)
        self.boundary.materialize()
        self.boundary.check_replicas()

    def _refuse_untrained(self) -> None:
        selected = {id(p) for group in self.param_groups for p in group["params"]}
        layers = {name: layer for name, layer in self.boundary.layers.items() if id(layer.B) in selected}
        refuse_untrained(self._bare, layers, lambda layer: layer.B.grad is not None)

    def _step_solver(self) -> None:
        with self._masters.instead(self.solver):
            self._masters.take_gradients()
            self.solver.step()
            self._masters.round()

    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """One step of the solver, and a subspace boundary when one is due.

        A step with an infinite or NaN gradient on any rank is skipped on all, counted in ``skipped_steps``, and
        does not count towards the interval; ``step_was_applied`` tells. (After local steps only the rank with
        that gradient leaves its B as it was, for the boundary is due at the same time everywhere.)
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self._layout.begin_step()
        self.boundary.follow_loads()
        if not self._stepped:
            self._stepped = True
            agreed(self._refuse_untrained, kind=RSOConversionError)
        lrs = [float(group["lr"]) for group in self.param_groups]
        self.step_was_applied = self._layout.finite(p for group in self.param_groups for p in group["params"])
        if self.step_was_applied:
            self._step_solver()
        else:
            self.boundary.skipped_steps += 1
        mark_used(p for group in self.param_groups for p in group["params"])
        if self.step_was_applied or self._layout.replicas > 1:
            self.boundary.step_applied(lrs)
        return loss

    @property
    def skipped_steps(self) -> int:
        """Steps left out because a gradient was not finite."""
        return self.boundary.skipped_steps

    def meet(self) -> None:
        """After local steps (``communicate: "boundary"``): average the ranks' models now, before saving or
        evaluating one of them between two boundaries. All ranks call this together."""
        self.boundary.average_replicas()

    def checkpointer(self, **extras: Any) -> Checkpointer:
        """Saves and loads the whole run: model, solver, boundary, random state, and each of ``extras`` (objects
        with state_dict and load_state_dict, say ``scheduler=scheduler``). Every rank makes one."""
        state = TrainingState(self._bare, self._layout, self.boundary)
        params = [p for group in self.param_groups for p in group["params"]]
        return Checkpointer(state, extras, ready=lambda: refuse_unused(params))

    def follow_solver(self) -> None:
        """Show the solver's groups and state as this optimizer's own; needed after they were loaded into it."""
        self.param_groups, self.state = self.solver.param_groups, self.solver.state

    def state_dict(self) -> dict[str, Any]:
        """The solver's state and RSO's own. In the middle of a subspace that includes W and B, of which the model's
        state dict has the sum alone."""
        state = {**self.solver.state_dict(), "rso": self.boundary.state_dict(), "rso_rows": self._kept_rows()}
        if self._masters.of:
            state["rso_masters"] = self._masters.values()
        if self._config.form == "two_path" and self.boundary.applied_steps % self._config.interval:
            layers = self.boundary.layers.items()
            state["rso_layers"] = {n: [local_part(x.weight), local_part(x.B)] for n, x in layers}
        return state

    def _kept_rows(self) -> dict[str, dict[str, torch.Tensor]]:
        """What the merge keeps beside W on this rank: fp32 masters and outer momentum."""
        keepers = {"masters": self._layout.weight_masters, "outer_momentum": self._layout.outer}
        return {what: dict(keeper.rows) for what, keeper in keepers.items() if keeper is not None}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        if "rso" not in state_dict:
            raise RSOCheckpointError(
                "the optimizer state has no 'rso' entry: it was not saved by RSO, or went through torch's functions for"
                " distributed state dicts, which keep what they know alone. Save and load by optimizer.checkpointer()."
            )
        check_boundary_state(state_dict["rso"], self.boundary.state_dict(), "the optimizer state")
        mine, theirs = set(self._kept_rows()), set(state_dict.get("rso_rows", {}))
        if mine != theirs:
            raise RSOCheckpointError(
                f"the optimizer state has {sorted(theirs) or 'nothing'} beside W, this run keeps"
                f" {sorted(mine) or 'nothing'}: set 'master_weights' and 'outer_momentum' as they were."
            )
        masters = state_dict.get("rso_masters", self._masters.values())  # earlier versions kept none
        if len(masters) != len(self._masters.values()):
            raise RSOCheckpointError(
                f"the optimizer state has fp32 copies of {len(masters)} parameters in 16 bits, this model has"
                f" {len(self._masters.values())} of them: load it into a model of the dtype that it was saved from."
            )
        for name, parts in state_dict.get("rso_layers", {}).items():
            layer = self.boundary.layers[name]
            for param, saved in zip((layer.weight, layer.B), parts, strict=True):
                local_part(param).copy_(saved)
        for master, saved in zip(self._masters.values(), masters, strict=True):
            master.copy_(saved)
        with self._masters.instead(self.solver):  # torch casts what it loads to the dtype of the parameters
            self.solver.load_state_dict({k: v for k, v in state_dict.items() if not k.startswith("rso")})
        self.follow_solver()
        if self._layout.weight_masters is not None:
            masters = state_dict["rso_rows"]["masters"]
            self._layout.weight_masters.rows = {name: rows.clone() for name, rows in masters.items()}
        if self._layout.outer is not None:
            for name, rows in self._layout.outer.rows.items():
                rows.copy_(state_dict["rso_rows"]["outer_momentum"][name])
        self.boundary.load_state_dict(state_dict["rso"])
