"""What a layer shows to those who save and load models by ``state_dict``: the weight of the equal dense layer."""

from __future__ import annotations

from collections.abc import Callable
from weakref import WeakValueDictionary

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, zeros

from rso_ds.weights.merge import merged_weight

# Tied layers must show one tensor, else files hold it twice: those that somebody still has.
_shown: WeakValueDictionary[tuple[int, ...], Tensor] = WeakValueDictionary()


@torch.no_grad()
def effective_weight(weight: Tensor, B: Tensor, projection: Callable[[], Tensor], draw: int) -> Tensor:
    """W + B P^T [out, in] in the dtype of W, merged in fp32 and rounded once; ``weight`` itself where B is zero or
    has no memory yet.

    ``projection`` gives the current P [in, r] or coordinates [r], which is that of ``draw``. Under FSDP2 the rows of
    this rank: nothing is sent.
    """
    rows, b_rows = (t.to_local() if isinstance(t, DTensor) else t for t in (weight.detach(), B.detach()))
    if b_rows.is_meta or not b_rows.any():
        return weight
    key = (id(weight), weight._version, id(B), B._version, draw)
    shown = _shown.get(key)
    if shown is None:
        shown = merged_weight(rows, b_rows, projection()).to(weight.dtype)
        if isinstance(weight, DTensor):
            shown = DTensor.from_local(
                shown, weight.device_mesh, weight.placements, shape=weight.shape, stride=weight.stride()
            )
        _shown[key] = shown
    return shown


def zero_b(B: Tensor, weight: Tensor) -> Tensor:
    """A zero B [out, rank] beside ``weight`` [out, in], which is to be loaded: on its device where ``B`` has no
    memory yet (``load_state_dict(assign=True)`` of a model on the meta device)."""
    if not B.is_meta:
        return torch.zeros_like(B)
    if isinstance(weight, DTensor):
        return zeros(tuple(B.shape), dtype=weight.dtype, device_mesh=weight.device_mesh, placements=weight.placements)
    return torch.zeros(B.shape, dtype=weight.dtype, device=weight.device)
