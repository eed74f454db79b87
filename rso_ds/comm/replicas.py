"""Ranks compare, bit for bit, what several of them hold copies of."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from rso_ds.errors import RSOReplicaError
from rso_ds.layout import Layout
from rso_ds.subspace import Subspace

_BITS = {8: torch.int64, 4: torch.int32, 2: torch.int16, 1: torch.int8}


def check_replicas(layout: Layout, subspaces: Sequence[Subspace], dense: Mapping[str, Any], applied_steps: int) -> None:
    """Raise ``RSOReplicaError`` on every rank, naming the first tensor of which ranks hold different bits: a
    P of ``subspaces``, or what they hold copies of (``Layout.replicated``, which is told the ``dense`` parameters by
    name). One int64 a tensor is exchanged; all ranks call this together."""
    projections = [(f"P of {s.name}", s.P) for s in subspaces if s.P is not None]
    weights = layout.replicated(dense)
    sums = [_checksums(projections, layout.device)]
    if weights:
        sums.append(layout.whole(_checksums(weights, layout.device)))
    low, high = layout.extremes_over_ranks(torch.cat(sums))
    names = [name for name, _ in (*projections, *weights)]
    differing = [name for name, bad in zip(names, (low != high).tolist(), strict=True) if bad]
    if differing:
        raise RSOReplicaError(
            f"ranks hold different bits of {differing[0]} ({len(differing)} of {len(names)} tensors differ)"
            f" after {applied_steps} applied steps. Unlike hardware or thread counts can make the"
            " orthogonalisation of sampler 'haar' differ: use equal nodes, or another sampler."
            " If another tensor differs, memory or network has failed or code has changed it on some ranks only:"
            " continue from the last checkpoint."
        )


def _checksums(tensors: Sequence[tuple[str, Tensor]], device: torch.device) -> Tensor:
    return torch.stack([_checksum(t) for _, t in tensors]).to(device)


def _checksum(tensor: Tensor) -> Tensor:
    """Sum of the bit patterns, as int64: cheap, and any single changed bit changes it."""
    return tensor.detach().contiguous().view(_BITS[tensor.element_size()]).sum(dtype=torch.int64)
