"""Shards of engines in which every rank holds W and B in full."""

from __future__ import annotations

from collections.abc import Mapping, MutableMapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from rso_ds.boundary import Rounding, SolverShard
from rso_ds.layers import RSOLinear, merged_weight

# Names under which solvers keep the moments of a parameter.
FIRST_MOMENTS = ("exp_avg", "momentum_buffer")
SECOND_MOMENTS = ("exp_avg_sq",)


def moments(state: Mapping[str, Any]) -> tuple[Tensor | None, Tensor | None]:
    """(first, second) moment tensors in a solver's state of one parameter."""
    first = next((state[k] for k in FIRST_MOMENTS if state.get(k) is not None), None)
    second = next((state[k] for k in SECOND_MOMENTS if state.get(k) is not None), None)
    return first, second


def restart_step(state: MutableMapping[str, Any]) -> None:
    """Zero Adam's step count in place: a tensor in torch, an int in DeepSpeed's own solvers."""
    step = state.get("step")
    if isinstance(step, Tensor):
        step.zero_()
    elif step is not None:
        state["step"] = 0


class ReplicatedShards:
    """W and B whole on each rank, the solver state of each B one tensor of a torch optimizer.

    ``masters`` maps the id of each B to the fp32 copy that the solver updates, where there is one;
    ``group`` is the data-parallel process group, None for a single process.
    """

    def __init__(
        self,
        layers: Mapping[str, RSOLinear],
        solver: torch.optim.Optimizer,
        device: torch.device,
        masters: Mapping[int, Tensor] | None = None,
        group: Any = None,
    ) -> None:
        self.layers = dict(layers)
        self.solver = solver
        self.device = device
        self.masters = dict(masters or {})
        self.group = group
        self.distributed = dist.is_initialized() and dist.get_world_size(group) > 1

    def begin(self) -> None: ...

    def end(self) -> None: ...

    def merge(self, name: str, layer: RSOLinear, P: Tensor, decay: float, rounding: Rounding) -> None:
        merged = merged_weight(layer.weight, layer.B, P, decay)
        layer.weight.copy_(rounding(merged, layer.weight.dtype, name))

    def zero(self, layer: RSOLinear) -> None:
        layer.B.zero_()

    def _solver_key(self, layer: RSOLinear) -> Tensor | nn.Parameter:
        return self.masters.get(id(layer.B), layer.B)

    def solver_shard(self, layer: RSOLinear) -> SolverShard:
        key = self._solver_key(layer)
        first, second = (None if m is None else m.view(-1) for m in moments(self.solver.state.get(key, {})))
        return SolverShard(0, layer.B.numel(), first, second, [] if key is layer.B else [key.data.view(-1)])

    def cuts(self, layer: RSOLinear) -> list[int]:
        return []

    def restart_step(self) -> None:
        for layer in self.layers.values():
            restart_step(self.solver.state.get(self._solver_key(layer), {}))

    def replicated_weights(self) -> list[tuple[str, Tensor]]:
        return [(f"{name}.weight", layer.weight) for name, layer in self.layers.items()]

    def sum_over_ranks(self, tensor: Tensor) -> None:
        if self.distributed:
            dist.all_reduce(tensor, group=self.group)

    def extremes_over_ranks(self, values: Tensor) -> tuple[Tensor, Tensor]:
        low, high = values.clone(), values.clone()
        if self.distributed:
            dist.all_reduce(low, op=dist.ReduceOp.MIN, group=self.group)
            dist.all_reduce(high, op=dist.ReduceOp.MAX, group=self.group)
        return low, high
