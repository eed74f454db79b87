"""What happens in the subspaces of a run: for logs, under every engine."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor

from rso_ds.boundary import Boundary
from rso_ds.comm.counter import install
from rso_ds.layers.partitioned import full_numel
from rso_ds.solvers.groups import IS_SUBSPACE


class Observer:
    """Watches one engine's ``Boundary``. Every rank makes one; all call ``record`` together.

    The gradient of B is looked at in the steps before which ``watch_step`` was called, as the solver gets it:
    averaged over ranks and micro batches, unscaled and clipped. The merge is looked at whenever a boundary is crossed:
    each boundary then sends 32 bytes more.
    """

    def __init__(self, boundary: Boundary) -> None:
        self._boundary = boundary
        self._layers = list(boundary.layers.values())
        self._b_elements = sum(full_numel(layer.B) for layer in self._layers)
        self._w_elements = sum(full_numel(layer.weight) for layer in self._layers)
        self._watching = False
        self._gradient: list[Tensor] = []
        self._merge_ratio: float | None = None
        boundary.before_merge = self._measure_merge
        boundary.layout.solver.register_step_pre_hook(self._measure_gradient)

    def watch_step(self) -> None:
        """Look at the gradient of B in the step that comes now."""
        self._watching = True
        self._gradient = []

    def record(self) -> dict[str, int | float]:
        """What is known by now:

        draw, applied_steps    of the boundary
        subspace_grad_norm     norm of the gradient of all B in the step last watched
        merge_ratio            sqrt(sum ||B P^T||^2 / sum ||W||^2), Frobenius norms over all RSO layers, at the last
                               boundary; ||B P^T||^2 = in/r ||B||^2, for "gaussian" in expectation, else exact;
                               in the folded form B is that of the boundary's step alone
        """
        found: dict[str, int | float] = {"draw": self._boundary.draw, "applied_steps": self._boundary.applied_steps}
        if self._watching:
            self._watching = False
            squares, elements = _over_ranks(_total(self._gradient, self._boundary.layout.device))
            if elements:  # several ranks may have looked at copies of one gradient
                found["subspace_grad_norm"] = math.sqrt(squares / max(1, round(elements / self._b_elements)))
        if self._merge_ratio is not None:
            found["merge_ratio"] = self._merge_ratio
        return found

    def _measure_gradient(self, solver: Any, *_: Any) -> None:
        if self._watching:  # ZeRO-3 steps one piece after the other
            for group in solver.param_groups:
                if group[IS_SUBSPACE]:
                    self._gradient += [_sums(p.grad) for p in group["params"] if p.grad is not None]

    def _measure_merge(self) -> None:
        layout = self._boundary.layout
        merged, weights = [], []
        for layer in self._layers:
            scale = layer.in_features / layer.subspace.rank
            merged.append(_sums(layout.model_part(layer.B)[1], scale))
            weights.append(_sums(layout.model_part(layer.weight)[1]))
        sums = torch.stack([_total(merged, layout.device), _total(weights, layout.device)])
        (b, b_elements), (w, w_elements) = _over_ranks(sums)
        # Ranks hold copies or pieces, of B as of W: either way each element equally often on all together.
        ratio = (b * self._b_elements / b_elements) / (w * self._w_elements / w_elements) if w else math.inf
        self._merge_ratio = math.sqrt(ratio)


@torch.no_grad()
def _sums(tensor: Tensor, scale: float = 1.0) -> Tensor:
    """[2]: scaled sum of squares, and the number of elements, of this rank's part."""
    local = tensor._local_tensor if isinstance(tensor, DTensor) else tensor
    square = torch.linalg.vector_norm(local.detach(), dtype=torch.float32).double() ** 2 * scale
    return torch.stack([square, square.new_tensor(float(local.numel()))])


def _total(sums: list[Tensor], device: torch.device) -> Tensor:
    total = torch.zeros(2, dtype=torch.float64, device=device)
    for pair in sums:
        total += pair.to(device)
    return total


def _over_ranks(sums: Tensor) -> Any:
    """``sums`` of all ranks together, as nested lists of numbers."""
    if dist.is_initialized() and dist.get_world_size() > 1:
        with install().phase("other"):
            dist.all_reduce(sums)
    return sums.tolist()
