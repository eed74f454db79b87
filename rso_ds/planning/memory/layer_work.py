"""What merging a layer at a boundary, and writing it densely, take for a moment: the code itself, on fake tensors."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial

import torch
from torch import nn

from rso_ds.config import RSOConfig
from rso_ds.layers import SubspaceLayer, dense_layer, rso_layers
from rso_ds.layout import SolverShard
from rso_ds.planning.memory.live import LiveBytes
from rso_ds.solvers.carry_over import CARRY_OVER, rotation
from rso_ds.solvers.cut_rows import carry_over_
from rso_ds.weights.masters import WeightMasters
from rso_ds.weights.merge import merge_
from rso_ds.weights.rounding import Rounding


@dataclass(frozen=True)
class LayerWork:
    """Bytes beyond what a rank holds, of the layer that takes most. ``merge``: a boundary, of which ``draw`` is the new
    P; ``dense``: W + B P^T of a whole layer."""

    merge: int = 0
    draw: int = 0
    dense: int = 0


def layer_work(model: nn.Module, config: RSOConfig, share: int, whole: bool, b_dtype: torch.dtype) -> LayerWork:
    """``model``: converted, on fake tensors, under whose mode this is called. ``share``: ranks that divide the rows of
    W between them to merge it, where ``whole`` says that each holds all of it even so; ``b_dtype``: of B."""
    merge = draw = dense = 0
    with torch.no_grad():
        for layer in _unlike(model):
            rule, rank = CARRY_OVER[config.carry_over], layer.subspace.rank
            rows = -(-layer.out_features // share)
            weight = layer.weight.new_empty(rows, layer.in_features)
            b, moments = weight.new_empty(rows, rank, dtype=b_dtype), torch.empty(2, rows * rank)
            old = layer.projection()
            shard = SolverShard(0, rows * rank, moments[0], moments[1] if config.solver != "sgd" else None)
            rounded = partial(Rounding(config.merge_rounding, config.seed, 1), dtype=weight.dtype, name="a layer")
            masters = None
            if config.master_weights != "none" and weight.element_size() < 4:
                masters = WeightMasters(config.master_weights)
                masters.rows["a layer"] = torch.empty(rows, layer.in_features)
            with LiveBytes(fake=True) as live:
                new = layer.subspace.sample(1, old.device, old.dtype)
                kept = live.live
                turn = rotation(old, new, layer.in_features) if rule.needs_rotation else None
                if masters is None:
                    merge_(weight, b, old, 1.0, rounded)
                else:
                    weight.copy_(rounded(masters.merge("a layer", weight, b, old, 1.0)))
                carry_over_(rule, shard, rank, turn, {})
            if masters is not None:
                on_device = masters.rows["a layer"].nbytes if masters.location == "cpu" else 0
                sent = 2 * layer.weight.nbytes if whole and share > 1 else 0  # gathered, and put together
                live.peak += on_device + sent
            merge, draw = max(merge, live.peak), max(draw, kept)
            with LiveBytes(fake=True) as live:
                dense_layer(layer)
            dense = max(dense, live.peak)
    return LayerWork(merge, draw, dense)


def _unlike(model: nn.Module) -> Iterator[SubspaceLayer]:
    """One layer of each shape and kind."""
    seen = set()
    for _, layer in rso_layers(model):
        key = (layer.out_features, layer.in_features, layer.subspace.rank, layer.kind, layer.bias is None)
        if key not in seen:
            seen.add(key)
            yield layer
