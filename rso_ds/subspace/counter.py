"""Random bits by number: each element is a function of (seed, its index), the same on every device."""

from __future__ import annotations

import torch
from torch import Tensor

_MASK = (1 << 64) - 1


def _signed(value: int) -> int:
    value &= _MASK
    return value - (1 << 64) if value >> 63 else value


_STEP, _FIRST, _SECOND = (_signed(x) for x in (0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB))


def random_bits(seed: int, start: int, count: int, device: torch.device | str = "cpu") -> Tensor:
    """int64 [count]: outputs ``start`` to ``start + count - 1`` of SplitMix64 (Steele, Lea, Flood 2014) from ``seed``.

    All of one seed are different, for the mixing is a bijection of the 64 bits. int64 products wrap around.
    """
    index = torch.arange(start + 1, start + count + 1, dtype=torch.int64, device=device)
    z = index * _STEP + _signed(seed)
    z = (z ^ _shifted(z, 30)) * _FIRST
    z = (z ^ _shifted(z, 27)) * _SECOND
    return z ^ _shifted(z, 31)


def _shifted(z: Tensor, by: int) -> Tensor:
    """``z >> by`` of the unsigned number that has the bits of ``z``."""
    return (z >> by) & ((1 << (64 - by)) - 1)
