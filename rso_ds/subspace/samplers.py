"""How a subspace is drawn: P [in, rank] with E[P P^T] = I.

P depends on (seed, group name, draw index, in, rank, sampler) and on nothing else, so that every rank
and every resumed run makes the same P and none is ever sent or stored.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable

import torch
from torch import Tensor


def projection_seed(seed: int, name: str, draw: int) -> int:
    """64-bit seed of one draw of one group; independent draws for any two different triples."""
    digest = hashlib.sha256(f"{seed}\x00{name}\x00{draw}".encode()).digest()
    return int.from_bytes(digest[:8], "little") >> 1  # torch.Generator takes a signed 64-bit integer


def _haar(generator: torch.Generator, in_features: int, rank: int, device: torch.device) -> Tensor:
    # QR alone is not Haar: its sign convention depends on the library. Dividing out the signs of R's
    # diagonal makes the factorisation unique and Q uniform on the Stiefel manifold (Mezzadri 2007).
    gaussian = torch.randn(in_features, rank, generator=generator, dtype=torch.float32, device="cpu").to(device)
    q, r = torch.linalg.qr(gaussian)
    signs = torch.where(torch.diagonal(r) < 0, -1.0, 1.0)
    return q * (signs * math.sqrt(in_features / rank))


def _gaussian(generator: torch.Generator, in_features: int, rank: int, device: torch.device) -> Tensor:
    gaussian = torch.randn(in_features, rank, generator=generator, dtype=torch.float32, device="cpu").to(device)
    return gaussian / math.sqrt(rank)


def _coordinate(generator: torch.Generator, in_features: int, rank: int, device: torch.device) -> Tensor:
    return torch.randperm(in_features, generator=generator, device="cpu")[:rank].clone().to(device)


_SAMPLERS: dict[str, Callable[[torch.Generator, int, int, torch.device], Tensor]] = {
    "haar": _haar,
    "gaussian": _gaussian,
    "coordinate": _coordinate,
}


@torch.no_grad()
def sample_projection(
    sampler: str,
    seed: int,
    name: str,
    draw: int,
    in_features: int,
    rank: int,
    device: torch.device | str = "cpu",
) -> Tensor:
    """P on ``device``: [in_features, rank] in fp32, or its coordinates, int64 [rank], for ``coordinate``.

    The random numbers always come from the CPU generator, so they do not depend on the device; the
    orthogonalisation of ``haar`` runs on ``device`` and agrees between equal devices bit for bit.

    Scaling: ``haar`` P = sqrt(in/rank) Q, so P^T P = (in/rank) I exactly (RSO, assumption on P;
    arXiv 2502.07222, section 5); ``gaussian`` entries N(0, 1/rank); ``coordinate`` sqrt(in/rank) times
    distinct columns of the identity, stored as their indices (``rso_ds.subspace.projection``).
    """
    generator = torch.Generator(device="cpu").manual_seed(projection_seed(seed, name, draw))
    return _SAMPLERS[sampler](generator, in_features, rank, torch.device(device))
