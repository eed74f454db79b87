"""An orthonormal matrix Q [n, n] for any n, whose products cost n times the sum of a few small sizes.

With n = 2^k m, m odd: Q = H (x) ... (x) H (x) C, the Kronecker product of Hadamard matrices (of 64 at the most) and of
the cosine transform (DCT-II) of size m. 4096 = 64 * 64; 11008 = 16 * 16 * 43. All entries of H are +-1 times one power
of two, so that 16 bits hold it exactly; C is cast to the dtype of its product.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

_LARGEST_EXPONENT = 6


def factor_sizes(n: int) -> list[int]:
    """Sizes of the Kronecker factors of Q; their product is n."""
    exponent = (n & -n).bit_length() - 1
    count = -(-exponent // _LARGEST_EXPONENT)
    powers = [2 ** (exponent // count + (i < exponent % count)) for i in range(count)]
    return powers + ([n >> exponent] if n >> exponent > 1 else [])


def _is_power(size: int) -> bool:
    return size & (size - 1) == 0


def _factor(size: int, device: torch.device, columns: Tensor | None = None) -> Tensor:
    """Those of the ``columns`` of one factor, or all, in fp64: orthonormal but for what ``_scale`` holds of it."""
    index = torch.arange(size, device=device)
    columns = index if columns is None else columns
    if _is_power(size):
        parity = index[:, None] & columns[None, :]
        for shift in (4, 2, 1):
            parity = parity ^ (parity >> shift)
        return (1 - 2 * (parity & 1)).double() * 2.0 ** -((size.bit_length() - 1) // 2)
    # By a table of the 4 size angles that occur, so that cosines are of one processor's making.
    angles = torch.arange(4 * size, dtype=torch.float64) * (math.pi / (2 * size))
    table = (torch.cos(angles) * math.sqrt(2 / size)).to(device)
    values = table[((2 * index[:, None] + 1) * columns[None, :]) % (4 * size)]
    return torch.where(columns[None, :] == 0, values * math.sqrt(0.5), values)


def _scale(sizes: list[int]) -> float:
    """What makes the product of the factors orthonormal: those of odd exponent lack 1/sqrt(2)."""
    odd = sum(_is_power(size) and size.bit_length() % 2 == 0 for size in sizes)
    return 2.0 ** (-odd / 2)


def factors(n: int, like: Tensor) -> list[Tensor]:
    """The factors of Q for ``transform``, in the dtype and on the device of ``like``; made once where tensors are real
    ones, and neither stand-ins (in a trace of memory) nor part of a graph that is being compiled."""
    sizes, dtype, device = factor_sizes(n), like.dtype, like.device
    if torch.compiler.is_compiling() or type(like) is not Tensor:
        return [_factor(size, device).to(dtype) for size in sizes]
    with torch.inference_mode(False), torch.no_grad():  # the first use may be an evaluation
        for size in sizes:
            if (size, dtype, device) not in _made:
                _made[size, dtype, device] = _factor(size, device).to(dtype)
    return [_made[size, dtype, device] for size in sizes]


_made: dict[tuple[int, torch.dtype, torch.device], Tensor] = {}


def transform(x: Tensor, factors: Sequence[Tensor], transposed: bool = False) -> Tensor:
    """x Q, or x Q^T, with the ``factors`` of Q: [rows, n] in x's dtype, which the products between the factors are
    rounded to."""
    rows, n = x.shape
    rest = n
    sizes = [f.shape[0] for f in factors]
    for size, f in zip(sizes, factors, strict=True):
        rest //= size
        f = f.t() if transposed else f
        x = x.reshape(-1, size) @ f if rest == 1 else f.t() @ x.reshape(-1, size, rest)
    return x.reshape(rows, n) * _scale(sizes)


def columns_of_q(n: int, columns: Tensor) -> Tensor:
    """The ``columns`` [r] of Q, [n, r] in fp32."""
    sizes = factor_sizes(n)
    result = torch.full((1, columns.shape[0]), _scale(sizes), dtype=torch.float32, device=columns.device)
    rest = n
    for size in sizes:
        rest //= size
        f = _factor(size, columns.device, columns // rest % size).to(torch.float32)
        result = (result[:, None, :] * f[None, :, :]).reshape(-1, columns.shape[0])
    return result
