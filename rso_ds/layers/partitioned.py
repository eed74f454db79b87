"""The little that layers must know about weights partitioned by ZeRO-3 or FSDP2."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from rso_ds.errors import RSOUnsupportedError


def is_partitioned(param: Any) -> bool:
    return hasattr(param, "ds_id")


def full_shape(param: Any) -> tuple[int, ...]:
    """Logical shape, also where ZeRO-3 has left an empty tensor behind."""
    return tuple(param.ds_shape if is_partitioned(param) else param.shape)


def full_numel(param: Any) -> int:
    return int(param.ds_numel if is_partitioned(param) else param.numel())


def flat_memory(tensor: Tensor) -> Tensor:
    """The memory of ``tensor`` as a vector. Raises ``RSOUnsupportedError`` where it does not lie in order."""
    if not tensor.is_contiguous():
        raise RSOUnsupportedError(
            f"a tensor of shape {tuple(tensor.shape)} and strides {tensor.stride()} cannot be taken in pieces: make the"
            " model's parameters contiguous (torch.contiguous_format) before the optimizer is built."
        )
    return tensor.detach().view(-1)


def local_part(param: Any) -> Tensor:
    """What this rank holds of ``param``: its piece under ZeRO-3 (flat, without padding) or FSDP2, else all of it."""
    if is_partitioned(param):
        piece: Tensor = param.ds_tensor.detach().view(-1)
        return piece[: max(0, param.ds_numel - dist.get_rank(param.ds_process_group) * piece.numel())]
    tensor = param.detach()
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def partition_as(param: nn.Parameter, example: Any) -> nn.Parameter:
    """``param`` itself, cut over the ranks if ``deepspeed.zero.Init`` has cut ``example``; all ranks call this
    together. So a model never holds more than one new parameter whole."""
    if is_partitioned(example):
        example.convert_to_zero_parameters(param_list=[param])
    return param


def whole(tensor: Tensor) -> Tensor:
    """``tensor`` itself, or the full value of one that FSDP2 has cut; all ranks call this together then."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def gathered(params: Iterable[nn.Parameter | None]) -> AbstractContextManager[Any]:
    """Context in which every given parameter holds its full value (read only under ZeRO-3)."""
    partitioned = [p for p in params if p is not None and is_partitioned(p)]
    if not partitioned:
        return nullcontext()
    import deepspeed

    return deepspeed.zero.GatheredParameters(partitioned)
