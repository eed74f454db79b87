"""FSDP2 (``torch.distributed.fsdp.fully_shard``) and HSDP: W and B cut along their rows, alike.

Shard(0) cuts by the first dimension alone, so a rank's rows of B are its rows of W and the boundary sends
nothing. On a 2-D mesh (replicas, shards) each replica does the same work on the same rows.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel
from torch.distributed.tensor import DTensor, Shard

from rso_ds.config import RSOConfig
from rso_ds.engines.replicated import ReplicatedLayout
from rso_ds.errors import RSOUnsupportedError
from rso_ds.layers import SubspaceLayer
from rso_ds.layout import SolverShard
from rso_ds.solvers.finite import gradients_finite
from rso_ds.weights.rounding import Rounding


def refuse_fsdp1(model: nn.Module) -> None:
    """Raise ``RSOUnsupportedError`` for the older ``FullyShardedDataParallel`` class."""
    if any(isinstance(module, FullyShardedDataParallel) for module in model.modules()):
        raise RSOUnsupportedError(
            "FullyShardedDataParallel (FSDP1) reduces the flat gradient of a whole unit, frozen W included, and cuts"
            " parameters inside rows: RSO would save no traffic. Use FSDP2: torch.distributed.fsdp.fully_shard on each"
            " block and on the model, after rso_ds.convert."
        )


def is_sharded(model: nn.Module) -> bool:
    return any(isinstance(module, FSDPModule) for module in model.modules())


class FSDPLayout(ReplicatedLayout):
    """``model`` has been through ``rso_ds.convert``, then ``fully_shard``.

    ``replicas``: for local steps, the process group of the ranks that hold the same rows; ``fully_shard`` was
    then given the 1-D mesh of one replica's shards, so that it averages gradients inside the replica only.
    """

    def __init__(
        self,
        model: nn.Module,
        layers: Mapping[str, SubspaceLayer],
        solver: torch.optim.Optimizer,
        config: RSOConfig,
        replicas: Any = None,
        precise: Mapping[int, Tensor] | None = None,
    ) -> None:
        self._wrapped = [m for m in model.modules() if isinstance(m, FSDPModule)]
        self._reshard()
        _refuse_mixed_dtypes(model)
        _refuse_other_layouts(layers)
        mesh = next(p for p in model.parameters() if isinstance(p, DTensor)).device_mesh
        kind = mesh.device_type
        device = torch.device(kind, torch.accelerator.current_device_index()) if kind != "cpu" else torch.device(kind)
        super().__init__(layers, solver, device, master_weights=config.master_weights, precise=precise)
        self.merge_sends_weights, self.merge_sends = False, ""
        self._replicas = mesh.get_group(0) if mesh.ndim == 2 else replicas
        self._shard_group = mesh.get_group(mesh.ndim - 1)
        self._piece, self._shards = mesh.get_local_rank(mesh.ndim - 1), mesh.size(mesh.ndim - 1)
        _refuse_uneven_cover(mesh, replicas, config)

    def step_apart(self, dense: Sequence[nn.Parameter], momentum: float) -> None:
        super().step_apart(dense, momentum)
        self.replica, self.replicas = dist.get_rank(self._replicas), dist.get_world_size(self._replicas)

    def finite(self, params: Iterable[Any]) -> bool:
        return gradients_finite(params, self._shard_group)  # replicas on a 2-D mesh have averaged: they agree

    def begin_step(self) -> None:
        self._reshard()

    def begin(self) -> None:
        self._reshard()

    def _reshard(self) -> None:
        # A forward pass without backward leaves the root's parameters whole: plain tensors in the modules' hands,
        # which the next forward pass would use again as they are. A step or merge would be lost without a word.
        for module in self._wrapped:
            module.reshard()

    def rows(self, tensor: Tensor) -> Tensor:
        assert isinstance(tensor, DTensor), "gathered parameters must have been resharded"
        return tensor._local_tensor

    def average(self) -> None:
        self.average_over(self._replicas)

    def merge(self, name: str, layer: SubspaceLayer, P: Tensor, decay: float, rounding: Rounding) -> None:
        rows = self.rows(layer.weight)
        if rows.numel():
            rounded = partial(rounding, dtype=rows.dtype, name=f"{name}:{self._piece}")
            self.merge_rows_(name, rows, self.rows(layer.B).to(P.device), P, decay, rounded)

    def zero(self, layer: SubspaceLayer) -> None:
        self.rows(layer.B).zero_()

    def solver_part(self, param: Any) -> SolverShard:
        start, flat = self.model_part(param)  # whole rows: none is ever split between ranks
        first, second = (None if m is None else m.view(-1) for m in self.moments_of(param))
        masters = [self.rows(self.precise[id(param)]).view(-1)] if id(param) in self.precise else []
        return SolverShard(start, start + flat.numel(), first, second, masters)

    def replicated(self, dense: Mapping[str, Any]) -> list[tuple[str, Tensor]]:
        return [] if self._replicas is None else super().replicated(dense)

    def model_part(self, param: Any) -> tuple[int, Tensor]:
        share = -(-param.shape[0] // self._shards)  # rows of all ranks but the last
        inner = param.numel() // max(1, param.shape[0])
        return min(self._piece * share, param.shape[0]) * inner, self.rows(param).view(-1)

    def merged_part(self, weight: Any) -> tuple[Tensor, int, int, int]:
        rows = self.rows(weight)
        return rows, self.model_part(weight)[0], 0, rows.numel()

    def whole(self, checksums: Tensor) -> Tensor:
        summed = checksums.clone()
        dist.all_reduce(summed, group=self._shard_group)
        return summed


def _refuse_uneven_cover(mesh: Any, replicas: Any, config: RSOConfig) -> None:
    ranks = dist.get_world_size()
    if config.communicate == "boundary":
        if mesh.ndim != 1 or replicas is None:
            raise RSOUnsupportedError(
                "'communicate': 'boundary' under FSDP2 needs replicas that step apart: make a 2-D mesh (replicas,"
                " shards), give fully_shard mesh['shards'] and RSO replicas=mesh['replicas'].get_group()."
            )
        pieces: list[Any] = [None] * dist.get_world_size(replicas)
        dist.all_gather_object(pieces, mesh.get_local_rank(), group=replicas)
        if len(set(pieces)) > 1 or len(pieces) * mesh.size() != ranks:
            raise RSOUnsupportedError(
                f"replicas= joins ranks that hold the pieces {pieces} of {mesh.size()} shards, of {ranks} ranks: it"
                " must be the group of the ranks that hold the same rows, mesh['replicas'].get_group()."
            )
    elif mesh.size() != ranks or replicas is not None:
        raise RSOUnsupportedError(
            f"the mesh of fully_shard covers {mesh.size()} of {ranks} ranks, so that gradients are not averaged over"
            " all: give it the whole 2-D mesh (replicas, shards) without replicas=, or use 'communicate': 'boundary'."
        )


def _refuse_mixed_dtypes(model: nn.Module) -> None:
    owner: dict[nn.Module, nn.Module] = {}
    seen: dict[nn.Module, tuple[str, torch.dtype]] = {}
    for module in model.modules():
        if isinstance(module, FSDPModule):
            for inner in module.modules():  # type: ignore[attr-defined]
                owner[inner] = module  # type: ignore[assignment]  # inner units come later and take their modules over
    for name, module in model.named_modules():
        for leaf, param in module.named_parameters(recurse=False):
            unit = owner.get(module)
            if unit is None or not param.requires_grad:
                continue
            first, dtype = seen.setdefault(unit, (f"{name}.{leaf}", param.dtype))
            if dtype != param.dtype:
                raise RSOUnsupportedError(
                    f"FSDP2 needs one dtype for the trainable parameters of a unit: {first} is {dtype}, {name}.{leaf}"
                    f" is {param.dtype}. Convert the model to one dtype before fully_shard, and choose the compute"
                    " dtype with MixedPrecisionPolicy."
                )


def _refuse_other_layouts(layers: Mapping[str, SubspaceLayer]) -> None:
    for name, layer in layers.items():
        for param in (layer.weight, layer.B):
            placements = param.placements if isinstance(param, DTensor) else None
            if placements is None or placements[-1] != Shard(0) or any(p.is_shard() for p in placements[:-1]):
                raise RSOUnsupportedError(
                    f"layer '{name}' is laid out as {placements}: RSO needs fully_shard's Shard(0) on a 1-D mesh, or a"
                    " 2-D mesh (replicas, shards), without ignored_params, shard_placement_fn or tensor parallelism."
                )
