"""P as a linear map: what it does to inputs, gradients and weights.

P is stored in one of two forms. Dense: a floating tensor [in, r]. Coordinates: an int64 tensor [r] of
distinct indices, standing for sqrt(in/r) times those columns of the identity, so that x P is a gather
and P occupies r integers. ``in`` is known from the tensors that P meets.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


def is_coordinates(P: Tensor) -> bool:
    return not P.is_floating_point()


def _scale(P: Tensor, in_features: int) -> float:
    return math.sqrt(in_features / P.shape[0])


def project(x: Tensor, P: Tensor) -> Tensor:
    """x P: [tokens, in] -> [tokens, r], in x's dtype."""
    if is_coordinates(P):
        return x.index_select(1, P) * _scale(P, x.shape[1])
    return x @ P.to(x.dtype)


def lift(z: Tensor, P: Tensor, in_features: int) -> Tensor:
    """z P^T: [rows, r] -> [rows, in], in z's dtype."""
    if is_coordinates(P):
        return z.new_zeros(z.shape[0], in_features).index_copy_(1, P, coordinate_columns(z, P, in_features))
    return z @ P.to(z.dtype).t()


def add_lifted_(base: Tensor, z: Tensor, P: Tensor, beta: float = 1.0) -> Tensor:
    """``base <- beta * base + z P^T`` in place: base [rows, in], z [rows, r] of one dtype."""
    if is_coordinates(P):
        base = base if beta == 1.0 else base.mul_(beta)
        # The coordinates are distinct. Along the last dimension index_add_ is several times slower on CPU.
        return base.scatter_add_(1, P.expand(z.shape), coordinate_columns(z, P, base.shape[1]))
    return base.addmm_(z, P.to(z.dtype).t(), beta=beta)


def coordinate_columns(z: Tensor, P: Tensor, in_features: int) -> Tensor:
    """What z P^T is in the columns of P's coordinates, [rows, r]; it is zero in all others."""
    return z * _scale(P, in_features)


def dense_projection(P: Tensor, in_features: int) -> Tensor:
    """The matrix [in, r]: P itself, or its coordinates written out in fp64."""
    if is_coordinates(P):
        return lift(torch.eye(P.shape[0], dtype=torch.float64, device=P.device), P, in_features).t()
    return P


def overlap(P_old: Tensor, P_new: Tensor, in_features: int) -> Tensor:
    """(r/in) P_old^T P_new [r, r], in fp32 (fp64 if P is): Q_old^T Q_new where P = sqrt(in/r) Q."""
    if is_coordinates(P_old):
        return (P_old[:, None] == P_new[None, :]).float()
    dtype = torch.promote_types(P_old.dtype, torch.float32)
    return (P_old.to(dtype).t() @ P_new.to(dtype)) * (P_old.shape[1] / in_features)
