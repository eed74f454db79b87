"""How an fp32 merge result goes back into W's dtype."""

from __future__ import annotations

import torch
from torch import Tensor

from rso_ds.subspace import projection_seed


class Rounding:
    """To the nearest value or stochastically (``kind``, of which the latter is for bf16). Replicas round alike: same
    layer, same step."""

    def __init__(self, kind: str, seed: int, applied_steps: int) -> None:
        self.kind, self.seed, self.applied_steps = kind, seed, applied_steps

    def __call__(self, merged: Tensor, dtype: torch.dtype, name: str) -> Tensor:
        """``merged`` in ``dtype``; ``name`` identifies the rows that are rounded and seeds the random bits."""
        if self.kind == "nearest" or dtype != torch.bfloat16:
            return merged.to(dtype)
        generator = torch.Generator(device=merged.device)
        generator.manual_seed(projection_seed(self.seed, "rounding:" + name, self.applied_steps))
        return round_stochastically(merged, generator)


def round_stochastically(values: Tensor, generator: torch.Generator) -> Tensor:
    """fp32 -> bf16 so that the expectation is the value: up with probability equal to the remainder.

    bf16 is the upper half of fp32: adding a uniform 16-bit integer to the lower half and cutting it off
    carries into the upper half with just that probability.
    """
    bits = values.contiguous().view(torch.int32)
    # One 64-bit number gives four of 16 bits: drawing is what takes the time on a CPU.
    drawn = torch.empty(-(-bits.numel() // 4), dtype=torch.int64, device=bits.device)
    drawn.random_(-(1 << 63), None, generator=generator)
    noise = drawn.view(torch.int16)[: bits.numel()].view_as(bits).to(torch.int32).bitwise_and_((1 << 16) - 1)
    return noise.add_(bits).bitwise_and_(-(1 << 16)).view(torch.float32).to(torch.bfloat16)
