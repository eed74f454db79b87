"""Momentum of the merged updates, for local steps: an outer optimizer over the boundaries."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from rso_ds.subspace import add_lifted_
from rso_ds.weights.precision import full_precision


class OuterMomentum:
    """M <- momentum * M + B P^T and W <- decay * W + M, with M in fp32 for each layer.

    ``weight_rows``: layer name -> the rows [rows, in] of W that this rank merges.
    """

    def __init__(self, momentum: float, weight_rows: Mapping[str, Tensor]) -> None:
        self.momentum = momentum
        self.rows = {
            name: torch.zeros_like(rows, dtype=torch.promote_types(rows.dtype, torch.float32))
            for name, rows in weight_rows.items()
        }

    def merge(self, name: str, weight_rows: Tensor, B_rows: Tensor, P: Tensor, decay: float) -> Tensor:
        """The new W in fp32 (fp64 if W is); shapes as in ``merged_weight``."""
        dtype = torch.promote_types(weight_rows.dtype, torch.float32)
        with full_precision():
            update = add_lifted_(self.rows[name], B_rows.to(dtype), P, beta=self.momentum)
        return decay * weight_rows.to(dtype) + update
