"""The model in a checkpoint, read tensor by tensor by one process, without building it."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rso_ds.checkpoint.state import STATE_FILE
from rso_ds.checkpoint.storage import StoredTensors
from rso_ds.errors import RSOCheckpointError
from rso_ds.layers import merged_weight
from rso_ds.layers.kinds import ordinary_name, ordinary_shape, ordinary_weight
from rso_ds.subspace import Subspace

CPU = torch.device("cpu")


@dataclass(frozen=True)
class StoredLayer:
    """An RSO layer: ``kind`` as in rso_ds.layers.kinds, ``out_features`` its rows, of all experts where it is stacked,
    ``projection_dtype`` that of P in the run."""

    kind: str
    group: str
    in_features: int
    out_features: int
    rank: int
    projection_dtype: torch.dtype


class StoredModel:
    """A checkpoint of any engine, stage and number of ranks, of RSO or of a dense run, in this package's format.

    ``path``: its folder, whose files have been verified; ``state``: the content of its rso_state.json. Raises
    ``RSOCheckpointError`` for the state of another version.
    """

    def __init__(self, path: Path, state: dict[str, Any]) -> None:
        self.path, self.state = path, state
        missing = {"rso", "parameters", "replicas", "dense"} - set(self.state)
        if missing:
            raise RSOCheckpointError(
                f"{self.path / STATE_FILE} has no '{min(missing)}': it was written by another version of rso_ds."
            )
        self._stored = StoredTensors(self.path)
        self._parameters: dict[str, Any] = self.state["parameters"]
        self.layers = self._layers()
        self._ordinary = {f"{name}.weight": ordinary_name(name, layer.kind) for name, layer in self.layers.items()}
        self._layer_of = {ordinary: name.removesuffix(".weight") for name, ordinary in self._ordinary.items()}
        self.tied: dict[str, tuple[str, bool]] = {n: (f, d) for n, (f, d) in self.state["dense"]["tied"].items()}
        self.projection = lru_cache(maxsize=4)(self._draw)  # layers of one group follow each other closely

    def _layers(self) -> dict[str, StoredLayer]:
        if self.state["rso"] is None:
            return {}
        layers = {}
        for name, (out_features, in_features, rank, group) in self.state["rso"]["layers"].items():
            kind, dtype = self.state["dense"]["layers"][name]
            layers[name] = StoredLayer(kind, group, in_features, out_features, rank, getattr(torch, dtype))
        return layers

    def names(self) -> list[str]:
        """Names of the dense model's tensors, without those that transformers ties by itself when it loads."""
        b = {f"{layer}.B" for layer in self.layers}
        further = [n for n, (first, declared) in self.tied.items() if not declared and first not in b]
        return [*(self._ordinary.get(n, n) for n in self._parameters if n not in b), *further]

    def first_name(self, name: str) -> str:
        """The name under which the tensor ``name`` is stored: another one if it is tied, or of stacked experts."""
        first = self.tied[name][0] if name in self.tied else name
        return f"{self._layer_of[first]}.weight" if first in self._layer_of else first

    def layer_of(self, name: str) -> StoredLayer | None:
        """The RSO layer whose weight the tensor ``name`` is."""
        layer, _, leaf = self.first_name(name).rpartition(".")
        return self.layers.get(layer) if leaf == "weight" else None

    def shape(self, name: str) -> tuple[int, ...]:
        """In the dense model, where the weight of a Conv1D is [in, out]."""
        shape = tuple(self._parameters[self.first_name(name)][0])
        layer = self.layer_of(name)
        return shape if layer is None else ordinary_shape(shape, layer.kind)

    def dtype(self, name: str) -> torch.dtype:
        """In the run, where an fp32 master is stored too."""
        dtype: torch.dtype = getattr(torch, self._parameters[self.first_name(name)][1])
        return dtype

    def value(self, name: str, merged: bool = True) -> Tensor:
        """The tensor ``name`` of the dense model; ``merged``: with the current B P^T, added as at a boundary."""
        first, layer = self.first_name(name), self.layer_of(name)
        weight = self._at_rest(first)
        if layer is None:
            return weight
        if merged:
            b = self.b(first.removesuffix(".weight"))
            weight = merged_weight(weight, b, self.projection(layer)).to(weight.dtype)
        return ordinary_weight(weight, layer.kind).contiguous()

    def b(self, layer: str) -> Tensor:
        """B [out, rank] of a layer, or [E, out, rank], as the model holds it."""
        return self._at_rest(f"{layer}.B")

    def _draw(self, layer: StoredLayer) -> Tensor:
        rso = self.state["rso"]
        subspace = Subspace(layer.group, layer.in_features, layer.rank, rso["sampler"], rso["seed"])
        return subspace.sample(rso["draw"], CPU, layer.projection_dtype)

    def _at_rest(self, name: str) -> Tensor:
        """As the model holds it: in its dtype, and the mean of the replicas where they step apart."""
        dtype, trained = self.dtype(name), self._parameters[name][2]
        replicas = self.state["replicas"]
        if replicas == 1 or not trained:
            return self._load(f"model.{name}").to(dtype)
        total = self._load(f"replica0/model.{name}").to(torch.promote_types(dtype, torch.float32))
        for replica in range(1, replicas):
            total += self._load(f"replica{replica}/model.{name}")
        return total.div_(replicas).to(dtype)

    def _load(self, name: str) -> Tensor:
        if name not in self._stored:
            raise RSOCheckpointError(f"{self.path} holds no tensor '{name}', which its {STATE_FILE} names.")
        return self._stored.load(name)
