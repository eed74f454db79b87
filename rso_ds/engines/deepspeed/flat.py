"""DeepSpeed optimizers that keep the solver state of a group in one flat tensor (ZeRO 1-2, BF16, fused FP16).

A group's parameters are laid end to end; with ZeRO the flat tensor is cut into equal pieces, one a rank,
wherever the cut falls. W and B themselves are whole on every rank.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from rso_ds.engines.replicated import ReplicatedLayout
from rso_ds.layers import SubspaceLayer
from rso_ds.layout import SolverShard
from rso_ds.solvers.state import moments, restart_step


@dataclass
class FlatGroup:
    """One parameter group: ``offsets`` maps id(parameter) to its place in the flat tensor, of which this
    rank owns ``piece`` elements from ``rank * piece`` on, with fp32 values in ``master``."""

    offsets: dict[int, int]
    piece: int
    rank: int
    pieces: int
    master: Tensor

    @classmethod
    def of(
        cls, params: Sequence[Tensor], offsets: Sequence[int] | None, master: Tensor, rank: int, pieces: int
    ) -> FlatGroup:
        if offsets is None:
            offsets, end = [], 0
            for param in params:
                offsets.append(end)
                end += param.numel()
        return cls({id(p): o for p, o in zip(params, offsets, strict=True)}, master.numel(), rank, pieces, master)


class FlatLayout(ReplicatedLayout):
    """``ReplicatedLayout`` whose solver state lies in flat pieces."""

    def __init__(
        self,
        layers: Mapping[str, SubspaceLayer],
        solver: torch.optim.Optimizer,
        device: torch.device,
        groups: Sequence[FlatGroup],
        group: Any,
        master_weights: str,
    ) -> None:
        super().__init__(layers, solver, device, group=group, master_weights=master_weights)
        self._group_of = {param: flat for flat in groups for param in flat.offsets}

    def solver_key(self, param: Any) -> Any:
        flat = self._group_of.get(id(param))
        return None if flat is None else flat.master

    def solver_part(self, param: Any) -> SolverShard:
        flat = self._group_of[id(param)]
        begin = flat.offsets[id(param)]
        end = begin + param.numel()
        piece_begin = flat.rank * flat.piece
        lo = min(max(begin, piece_begin), end)
        hi = max(min(end, piece_begin + flat.piece), lo)
        local = slice(lo - piece_begin, hi - piece_begin) if hi > lo else slice(0, 0)
        first, second = moments(self.solver.state.get(flat.master, {}))
        return SolverShard(
            lo - begin,
            hi - begin,
            None if first is None else first.view(-1)[local],
            None if second is None else second.view(-1)[local],
            [flat.master.data[local]],
        )

    def shard_boundaries(self, layer: SubspaceLayer) -> list[int]:
        flat = self._group_of[id(layer.B)]
        begin = flat.offsets[id(layer.B)]
        at = [i * flat.piece - begin for i in range(1, flat.pieces)]
        return [c for c in at if 0 < c < layer.B.numel()]

    def replicated_moments(self, dense: Mapping[str, Any]) -> list[tuple[str, Tensor]]:
        if any(flat.pieces > 1 for flat in self._group_of.values()):
            return []
        return super().replicated_moments(dense)

    def moments_of(self, param: Any) -> tuple[Tensor | None, Tensor | None]:
        part = self.solver_part(param)
        return part.first, part.second

    def restart_step(self) -> None:
        for flat in {id(f): f for f in (self._group_of[id(x.B)] for x in self.layers.values())}.values():
            restart_step(self.solver.state.get(flat.master, {}))
