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

from rso_ds.subspace.counter import random_bits
from rso_ds.subspace.transform import columns_of_q, factor_sizes


def projection_seed(seed: int, name: str, draw: int) -> int:
    """64-bit seed of one draw of one group; independent draws for any two different triples."""
    digest = hashlib.sha256(f"{seed}\x00{name}\x00{draw}".encode()).digest()
    return int.from_bytes(digest[:8], "little") >> 1  # torch.Generator takes a signed 64-bit integer


def _gaussian_matrix(seed: int, in_features: int, rank: int, device: torch.device) -> Tensor:
    generator = torch.Generator(device="cpu").manual_seed(seed)
    return torch.randn(in_features, rank, generator=generator, dtype=torch.float32, device="cpu").to(device)


def _haar(seed: int, in_features: int, rank: int, device: torch.device) -> Tensor:
    # QR alone is not Haar: its sign convention depends on the library. Dividing out the signs of R's
    # diagonal makes the factorisation unique and Q uniform on the Stiefel manifold (Mezzadri 2007).
    q, r = torch.linalg.qr(_gaussian_matrix(seed, in_features, rank, device))
    signs = torch.where(torch.diagonal(r) < 0, -1.0, 1.0)
    return q * (signs * math.sqrt(in_features / rank))


def _gaussian(seed: int, in_features: int, rank: int, device: torch.device) -> Tensor:
    return _gaussian_matrix(seed, in_features, rank, device) / math.sqrt(rank)


def _coordinate(seed: int, in_features: int, rank: int, device: torch.device) -> Tensor:
    generator = torch.Generator(device="cpu").manual_seed(seed)
    return torch.randperm(in_features, generator=generator, device="cpu")[:rank].clone().to(device)


def _srht(seed: int, in_features: int, rank: int, device: torch.device) -> Tensor:
    # All keys differ, so that every device sorts them alike.
    columns = random_bits(seed, 0, in_features, device).argsort()[:rank].sort().values
    signs = 1 - 2 * (random_bits(seed, in_features, in_features, device) & 1)
    if transform_cost(in_features, rank) < rank:
        return torch.cat([signs, columns]).to(torch.int32)
    return columns_of_q(in_features, columns) * (signs * math.sqrt(in_features / rank))[:, None]


def transform_cost(in_features: int, rank: int) -> int:
    """What takes the place of r in the tokens * in * r operations of a product with a P of "srht": r itself where P is
    stored as a matrix, since that is faster (several small products take about twice their operations' time)."""
    sizes = factor_sizes(in_features)
    return min(2 * sum(sizes), rank) if max(sizes, default=1) <= _LARGEST_FACTOR else rank


_SAMPLERS: dict[str, Callable[[int, int, int, torch.device], Tensor]] = {
    "haar": _haar,
    "gaussian": _gaussian,
    "coordinate": _coordinate,
    "srht": _srht,
}
# Of the law by which a sampler makes P of a seed. A checkpoint holds the seed alone: who changes what a sampler draws
# raises its number, and runs of before end with a message instead of going on in another subspace.
GENERATOR_VERSIONS = {"haar": 1, "gaussian": 1, "coordinate": 1, "srht": 1}
_LARGEST_FACTOR = 256


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
    """P on ``device`` in one of the forms of ``rso_ds.subspace.projection``: dense ones [in_features, rank] in fp32.

    The random numbers of "haar", "gaussian" and "coordinate" come from torch's CPU generator, those of "srht" from a
    counter on ``device``: none depends on the device. The QR of ``haar`` runs on ``device`` and agrees between equal
    devices bit for bit.

    Scaling: ``haar`` P = sqrt(in/rank) Q, so P^T P = (in/rank) I exactly (RSO, assumption on P;
    arXiv 2502.07222, section 5); ``gaussian`` entries N(0, 1/rank); ``coordinate`` sqrt(in/rank) times
    distinct columns of the identity; ``srht`` sqrt(in/rank) times distinct columns of D Q, with D random signs and Q
    a fixed orthonormal transform (subsampled randomized Hadamard transform: Ailon and Chazelle 2006, Tropp 2011).
    """
    return _SAMPLERS[sampler](projection_seed(seed, name, draw), in_features, rank, torch.device(device))
