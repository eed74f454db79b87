"""P as a linear map: what it does to inputs, gradients and weights.

P has one of three forms, told apart by dtype:

    dense         floating [in, r]
    coordinates   int64 [r]        distinct indices: sqrt(in/r) times those columns of the identity. x P is a gather.
    transform     int32 [in + r]   +-1 for each input, then r distinct indices: sqrt(in/r) times those columns of D Q,
                                   with D the diagonal of signs and Q of ``rso_ds.subspace.transform``. x P costs
                                   tokens * in * (sum of a few sizes up to 64) instead of tokens * in * r.

``in`` is known from the tensors that P meets.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from rso_ds.subspace.transform import factors, transform


def is_coordinates(P: Tensor) -> bool:
    return P.dtype == torch.int64


def is_transform(P: Tensor) -> bool:
    return P.dtype == torch.int32


def _scale(P: Tensor, in_features: int) -> float:
    return math.sqrt(in_features / _rank(P, in_features))


def _rank(P: Tensor, in_features: int) -> int:
    return P.shape[0] - in_features if is_transform(P) else P.shape[-1]


def _signs_and_columns(P: Tensor, in_features: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    return P[:in_features].to(dtype), P[in_features:].long()


def pieces(rows: int, in_features: int, device: str) -> list[slice]:
    """Slices of ``rows`` rows, between whose factors of a transform the temporaries stay small: in a CPU's caches, or
    below 64 MiB in fp32 on another ``device``."""
    step = max(1, (1 << 20 if device == "cpu" else 1 << 24) // in_features)
    return [slice(start, start + step) for start in range(0, rows, step)]


def project(x: Tensor, P: Tensor) -> Tensor:
    """x P: [tokens, in] -> [tokens, r], in x's dtype."""
    if is_coordinates(P):
        return x.index_select(1, P) * _scale(P, x.shape[1])
    if is_transform(P):
        signs, columns = _signs_and_columns(P, x.shape[1], x.dtype)
        z = x.new_empty(x.shape[0], columns.shape[0])
        q = factors(x.shape[1], z)
        for piece in pieces(x.shape[0], x.shape[1], x.device.type):
            z[piece] = transform(x[piece] * signs, q).index_select(1, columns) * _scale(P, x.shape[1])
        return z
    return x @ P.to(x.dtype)


def lift(z: Tensor, P: Tensor, in_features: int) -> Tensor:
    """z P^T: [rows, r] -> [rows, in], in z's dtype."""
    if is_coordinates(P):
        return z.new_zeros(z.shape[0], in_features).index_copy_(1, P, coordinate_columns(z, P, in_features))
    if is_transform(P):
        return add_lifted_(z.new_zeros(z.shape[0], in_features), z, P)
    return z @ P.to(z.dtype).t()


def add_lifted_(base: Tensor, z: Tensor, P: Tensor, beta: float = 1.0) -> Tensor:
    """``base <- beta * base + z P^T`` in place: base [..., in], z [..., r] of one dtype."""
    if base.dim() > 2:
        add_lifted_(base.view(-1, base.shape[-1]), z.reshape(-1, z.shape[-1]), P, beta)
        return base
    if is_coordinates(P):
        base = base if beta == 1.0 else base.mul_(beta)
        # The coordinates are distinct. Along the last dimension index_add_ is several times slower on CPU.
        return base.scatter_add_(1, P.expand(z.shape), coordinate_columns(z, P, base.shape[1]))
    if is_transform(P):
        base = base if beta == 1.0 else base.mul_(beta)
        signs, columns = _signs_and_columns(P, base.shape[1], z.dtype)
        scale = _scale(P, base.shape[1])
        q = factors(base.shape[1], z)
        for piece in pieces(base.shape[0], base.shape[1], base.device.type):
            full = torch.zeros_like(base[piece]).index_copy_(1, columns, z[piece])
            base[piece].addcmul_(transform(full, q, transposed=True), signs, value=scale)
        return base
    return base.addmm_(z, P.to(z.dtype).t(), beta=beta)


def coordinate_columns(z: Tensor, P: Tensor, in_features: int) -> Tensor:
    """What z P^T is in the columns of P's coordinates, [rows, r]; it is zero in all others."""
    return z * _scale(P, in_features)


def dense_projection(P: Tensor, in_features: int) -> Tensor:
    """The matrix [in, r]: P itself, or what its indices stand for, written out in fp64."""
    if P.is_floating_point():
        return P
    return lift(torch.eye(_rank(P, in_features), dtype=torch.float64, device=P.device), P, in_features).t()


def overlap(P_old: Tensor, P_new: Tensor, in_features: int) -> Tensor:
    """(r/in) P_old^T P_new [r, r], in fp32 (fp64 of transforms, and if P is): Q_old^T Q_new where P = sqrt(in/r) Q."""
    if is_coordinates(P_old):
        return (P_old[:, None] == P_new[None, :]).float()
    if is_transform(P_old):
        return project(dense_projection(P_old, in_features).t(), P_new) / _scale(P_old, in_features) ** 2
    dtype = torch.promote_types(P_old.dtype, torch.float32)
    return (P_old.to(dtype).t() @ P_new.to(dtype)) * (P_old.shape[1] / in_features)
