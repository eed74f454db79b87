"""Where the bytes of a running engine, DeepSpeed's or FSDP2's, are, by unique storage."""

from __future__ import annotations

import gc
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from rso_ds.boundary import Boundary
from rso_ds.layers import rso_layers

# In the order in which a storage is claimed: a flat buffer that parameters are views of counts as theirs.
KINDS = ("P", "B", "W", "dense parameters", "solver state", "masters", "gradients", "other")


def split_of_state(engine: Any) -> dict[str, int]:
    """Bytes of every live tensor of this process, by kind; call it between two steps.

    "W" are the frozen weights of RSO layers, "dense parameters" all other parameters; each in the form in
    which this rank holds it (whole, or its ZeRO-3 piece, and what is gathered at the moment). "masters" are
    fp32 copies of trained parameters and, with ``master_weights``, of W. "gradients" include the buffers
    that DeepSpeed reduces in. "other" is whatever else is alive: inputs, rotary tables, views of none.
    """
    claims: dict[int, str] = {}
    sizes: dict[int, int] = {}

    def claim(kind: str, tensors: Iterable[Any]) -> None:
        for tensor in tensors:
            tensor = tensor._local_tensor if isinstance(tensor, DTensor) else tensor
            if isinstance(tensor, Tensor) and not tensor.is_meta:
                storage = tensor.untyped_storage()
                key = storage._cdata
                sizes[key] = storage.nbytes()
                claims.setdefault(key, kind)

    module = engine.module
    layers = [layer for _, layer in rso_layers(module)]
    b = {id(layer.B) for layer in layers}
    w = {id(layer.weight) for layer in layers}
    claim("P", (layer.subspace.P for layer in layers))
    for param in module.parameters():
        kind = "B" if id(param) in b else "W" if id(param) in w else "dense parameters"
        claim(kind, (param.data, getattr(param, "ds_tensor", None), getattr(param, "ds_secondary_tensor", None)))
    optimizer = engine.optimizer
    claim("solver state", _tensors([dict(s) for s in optimizer.state.values()]))
    claim("solver state", _tensors(list(getattr(getattr(optimizer, "optimizer", None), "state", {}).values())))
    for attribute in (
        "single_partition_of_fp32_groups",
        "fp32_partitioned_groups_flat",
        "fp32_groups",
        "fp32_groups_flat",
    ):
        claim("masters", _tensors(getattr(optimizer, attribute, None)))
    boundary: Boundary | None = getattr(engine, "rso", None)
    if boundary is not None and boundary.layout.weight_masters is not None:
        claim("masters", boundary.layout.weight_masters.rows.values())
    claim("gradients", (p.grad for p in module.parameters()))
    for attribute in (
        "averaged_gradients", "grad_partitions_flat_buffer", "ipg_buckets", "ipg_buffer", "grads_in_partition",
        "all_grad_tensors", "temp_grad_buffer_for_cpu_offload", "temp_grad_buffer_for_gpu_offload",
    ):  # fmt: skip
        claim("gradients", _tensors(getattr(optimizer, attribute, None)))
    gc.collect()
    claim("other", (o for o in gc.get_objects() if _is_plain_tensor(o)))
    totals = dict.fromkeys(KINDS, 0)
    for key, kind in claims.items():
        totals[kind] += sizes[key]
    return totals


def _is_plain_tensor(thing: Any) -> bool:
    try:
        return isinstance(thing, Tensor) and type(thing) in (Tensor, torch.nn.Parameter)
    except ReferenceError:
        return False


def _tensors(thing: Any) -> Iterator[Tensor]:
    """Every tensor inside nested lists, dicts and plain objects."""
    if isinstance(thing, Tensor):
        yield thing
    elif isinstance(thing, dict):
        for value in thing.values():
            yield from _tensors(value)
    elif isinstance(thing, (list, tuple)):
        for value in thing:
            yield from _tensors(value)
    elif hasattr(thing, "__dict__") and type(thing).__module__.startswith("deepspeed"):
        yield from _tensors(vars(thing))
