"""W + B P^T: computed in fp32, rounded once."""

from __future__ import annotations

import torch
from torch import Tensor

from rso_ds.subspace import add_lifted_


def merged_weight(weight: Tensor, B: Tensor, P: Tensor, decay: float = 1.0, in_place: bool = False) -> Tensor:
    """``decay * weight + B P^T`` in fp32 (fp64 if the weight is).

    Shapes: weight [rows, in], B [rows, r], P [in, r] or coordinates [r], all on one device; any subset of
    rows will do. ``in_place``: the result may be ``weight`` itself, if it is of that dtype.
    """
    dtype = torch.promote_types(weight.dtype, torch.float32)
    return add_lifted_(weight.to(dtype, copy=not in_place), B.to(dtype), P, beta=decay)


def round_stochastically(values: Tensor, generator: torch.Generator) -> Tensor:
    """fp32 -> bf16 so that the expectation is the value: up with probability equal to the remainder.

    bf16 is the upper half of fp32: adding a uniform 16-bit integer to the lower half and cutting it off
    carries into the upper half with just that probability.
    """
    bits = values.contiguous().view(torch.int32)
    noise = torch.randint(0, 1 << 16, bits.shape, dtype=torch.int32, device=bits.device, generator=generator)
    return ((bits + noise) & -(1 << 16)).view(torch.float32).to(torch.bfloat16)
