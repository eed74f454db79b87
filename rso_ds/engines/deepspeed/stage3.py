"""ZeRO-3: W and B are each cut into flat pieces, and merged piece by piece without gathering W.

A parameter of n elements is padded to a multiple of the world size and cut evenly. If the number of rows divides by
the world size the rows of a rank's piece of B are the rows of its piece of W and nothing is sent; if not,
B (r columns) is gathered, never W.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor

from rso_ds.engines.replicated import ReplicatedLayout
from rso_ds.layers import SubspaceLayer
from rso_ds.layers.partitioned import gathered
from rso_ds.layout import SolverShard
from rso_ds.solvers.state import moments, restart_step
from rso_ds.weights.rounding import Rounding


class Stage3Layout(ReplicatedLayout):
    """``zero`` is DeepSpeed's ZeRO-3 optimizer; its sub-groups hold the fp32 masters and solver state."""

    def __init__(
        self, layers: Mapping[str, SubspaceLayer], zero: Any, device: torch.device, group: Any, master_weights: str
    ) -> None:
        super().__init__(layers, zero.optimizer, device, group=group, master_weights=master_weights)
        self.merge_sends_weights = False
        self.merge_sends = ""
        if zero.zero_hpz_partition_size > 1:
            self.merge_sends = "W to other nodes, for ZeRO++'s secondary copies"
        elif zero.offload_param:
            self.merge_sends = "W from the CPU to the device and back"
        elif any(layer.rows % self.world_size for layer in self.layers.values()):
            self.merge_sends = "B between ranks that divide its rows unlike those of W"
        self.zero_optimizer = zero
        self._masters: dict[int, tuple[Tensor, int]] = {}
        for index, params in enumerate(zero.fp16_groups):
            offset = 0
            for param in params:
                self._masters[id(param)] = (zero.fp32_partitioned_groups_flat[index], offset)
                offset += param.ds_tensor.ds_numel

    def begin(self) -> None:
        # Small parameters stay gathered between steps, and the step itself may have left others so: those
        # copies would go stale. DeepSpeed drops and regathers them in each of its own steps; so do we.
        self.zero_optimizer.parameter_offload.partition_all_parameters()

    def end(self) -> None:
        persistent = self.zero_optimizer.persistent_parameters
        if persistent:
            persistent[0].all_gather(persistent)

    def merge(self, name: str, layer: SubspaceLayer, P: Tensor, decay: float, rounding: Rounding) -> None:
        weight, b, in_features = _zero_params(layer)
        rows, start, skip, length = self.merged_part(weight)
        top = start // in_features
        if layer.rows % self.world_size == 0:
            rows_of_b = b.ds_tensor.view(-1, layer.subspace.rank).to(P.device)
        else:
            with gathered([layer.B]):
                rows_of_b = layer.B.detach().view(-1, layer.subspace.rank)[top : top + len(rows)].to(P.device).clone()
        self._drop_secondary(weight)
        if not length:
            return
        shard = weight.ds_tensor[:length]
        whole_rows = length == rows.numel()
        if whole_rows:
            rows = shard.view_as(rows)
        rounded = partial(rounding, dtype=rows.dtype, name=f"{name}:{start}")
        self.merge_rows_(name, rows, rows_of_b, P, decay, rounded)
        if not whole_rows:
            shard.copy_(rows.view(-1)[skip : skip + length])

    def zero(self, layer: SubspaceLayer) -> None:
        _, b, _ = _zero_params(layer)
        b.ds_tensor.zero_()
        self._drop_secondary(b)

    def solver_key(self, param: Any) -> Any:
        return self._masters[id(param)][0] if id(param) in self._masters else None

    def solver_part(self, param: Any) -> SolverShard:
        start, stop = self._interval(param)
        flat, offset = self._masters[id(param)]
        mine = slice(offset, offset + stop - start)
        first, second = moments(self.solver.state.get(flat, {}))
        return SolverShard(
            start,
            stop,
            None if first is None else first.view(-1)[mine],
            None if second is None else second.view(-1)[mine],
            [flat.data[mine]],
        )

    def shard_boundaries(self, layer: SubspaceLayer) -> list[int]:
        _, b, _ = _zero_params(layer)
        numel, piece = b.ds_numel, b.ds_tensor.ds_numel
        return [i * piece for i in range(1, self.world_size) if i * piece < numel]

    def restart_step(self) -> None:
        for flat in {id(f): f for f, _ in (self._masters[id(x.B)] for x in self.layers.values())}.values():
            restart_step(self.solver.state.get(flat, {}))

    def replicated(self, dense: Mapping[str, Any]) -> list[tuple[str, Tensor]]:
        return []

    def model_part(self, param: Any) -> tuple[int, Tensor]:
        start, stop = self._interval(param)
        return start, param.ds_tensor.detach().view(-1)[: stop - start]

    def merged_part(self, weight: Any) -> tuple[Tensor, int, int, int]:
        start, stop = self._interval(weight)
        in_features = weight.ds_shape[-1]
        top, bottom = start // in_features, -(-stop // in_features)
        shard = weight.ds_tensor[: stop - start]
        if stop - start == (bottom - top) * in_features:
            return shard.view(-1, in_features).to(self.device), start, 0, stop - start
        rows = torch.zeros((bottom - top) * in_features, dtype=shard.dtype, device=self.device)
        skip = start - top * in_features
        rows[skip : skip + stop - start] = shard
        return rows.view(-1, in_features), start, skip, stop - start

    def reloaded(self) -> None:
        for param in self.zero_optimizer.module.parameters():
            self._drop_secondary(param)

    def _interval(self, param: Any) -> tuple[int, int]:
        """Elements of the flattened parameter that this rank's piece holds, padding excluded."""
        piece = param.ds_tensor.ds_numel
        start = min(self.rank * piece, param.ds_numel)
        return start, min(start + piece, param.ds_numel)

    @staticmethod
    def _drop_secondary(param: Any) -> None:
        # ZeRO++ hpZ keeps a second, intra-node shard and refreshes only trainable parameters' by itself.
        if getattr(param, "ds_secondary_tensor", None) is not None:
            param.ds_secondary_tensor = None


def _zero_params(layer: SubspaceLayer) -> tuple[Any, Any, int]:
    """(W, B, in): the parameters with the ``ds_*`` attributes that ZeRO-3 has given them."""
    return layer.weight, layer.B, layer.in_features
