"""W + B P^T: computed in fp32, rounded once."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from rso_ds.subspace import add_lifted_, coordinate_columns, is_coordinates
from rso_ds.weights.precision import full_precision


def merged_weight(weight: Tensor, B: Tensor, P: Tensor, decay: float = 1.0, in_place: bool = False) -> Tensor:
    """``decay * weight + B P^T`` in fp32 (fp64 if the weight is).

    Shapes: weight [..., in], B [..., r], P [in, r] or coordinates [r], all on one device; any subset of
    rows will do. ``in_place``: the result may be ``weight`` itself, if it is of that dtype.
    """
    dtype = torch.promote_types(weight.dtype, torch.float32)
    with full_precision():
        return add_lifted_(weight.to(dtype, copy=not in_place), B.to(dtype), P, beta=decay)


def merge_(weight: Tensor, B: Tensor, P: Tensor, decay: float, rounded: Callable[[Tensor], Tensor]) -> None:
    """``weight <- decay * weight + B P^T``, the sum in fp32 (fp64 if the weight is) and ``rounded`` to weight's dtype.

    Shapes as in ``merged_weight``; weight may be on another device than B and P. Columns that do not change are
    neither read nor written (``changed_columns``).
    """
    dtype = torch.promote_types(weight.dtype, torch.float32)
    columns = changed_columns(P, decay)
    if columns is None or (weight.dtype == dtype and weight.device == P.device):
        merged = merged_weight(weight.to(P.device), B, P, decay, in_place=True)
        if merged is not weight:
            weight.copy_(rounded(merged))
        return
    values = weight.index_select(-1, columns.to(weight.device)).to(P.device, dtype)
    write_columns_(weight, columns, rounded(values.add_(coordinate_columns(B.to(dtype), P, weight.shape[-1]))))


def changed_columns(P: Tensor, decay: float) -> Tensor | None:
    """Indices [r] of the columns of W that ``decay * W + B P^T`` can change; None: all."""
    return P if is_coordinates(P) and decay == 1.0 else None


def write_columns_(weight: Tensor, columns: Tensor, values: Tensor) -> None:
    """``weight[..., columns] <- values`` [..., r], from whichever device."""
    weight.index_copy_(-1, columns.to(weight.device), values.to(weight.device))
