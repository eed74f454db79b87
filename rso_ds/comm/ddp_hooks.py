"""What the communication hooks of DistributedDataParallel have in common."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from rso_ds.errors import RSOUnsupportedError


class HookState:
    """State of a hook: names of parameters, a process group, and a count of bytes.

    Buckets are rebuilt after the first step, so that a bucket's index identifies nothing: parameters are
    known by name. Pickles without the process group and the parameters; ``bind`` gives them back.

    Raises ``RSOUnsupportedError`` where a hook would not come into effect: a model that is not wrapped in
    DistributedDataParallel (a DeepSpeed engine, FSDP), that has a hook already, or a single rank.
    """

    def __init__(self, model: nn.Module) -> None:
        self.dense_bytes = 0
        self.sent_bytes = 0
        self.bind(model)

    def bind(self, model: nn.Module) -> None:
        """Serve the parameters of ``model``; needed after unpickling, before ``register_comm_hook``."""
        ddp = _checked(model)
        self._group: Any = ddp.process_group
        self.names = {id(param): name for name, param in ddp.module.named_parameters()}

    def compression_stats(self) -> tuple[float, int, int]:
        """(rate, bytes of the dense gradients, bytes handed to collectives instead) of all steps so far."""
        return self.dense_bytes / max(1, self.sent_bytes), self.dense_bytes, self.sent_bytes

    def __getstate__(self) -> dict[str, Any]:
        return {key: value for key, value in vars(self).items() if key not in ("_group", "names")}

    @property
    def group(self) -> Any:
        """The process group. Raises ``RSOUnsupportedError`` after unpickling, until ``bind``."""
        if not hasattr(self, "_group"):
            raise RSOUnsupportedError(f"this {type(self).__name__} was unpickled: call state.bind(model) first.")
        return self._group

    def _parameter_name(self, param: Tensor) -> str:
        return self.names[id(param)]


def _checked(model: nn.Module) -> DistributedDataParallel:
    if type(model).__module__.startswith("deepspeed."):
        raise RSOUnsupportedError(
            "a DeepSpeed engine reduces gradients itself and never calls a DDP hook: select RSO in its JSON instead"
            " (rso_ds.initialize)."
        )
    if not isinstance(model, DistributedDataParallel):
        raise RSOUnsupportedError(
            f"communication hooks belong to DistributedDataParallel, and this is {type(model).__name__}: wrap the model"
            " first. Under FSDP2 convert the model (rso_ds.convert), which needs no hook."
        )
    refuse_second_hook(model)
    if dist.get_world_size(model.process_group) == 1:
        raise RSOUnsupportedError("there is one rank and nothing to exchange: register no communication hook.")
    return model


def refuse_second_hook(model: DistributedDataParallel) -> None:
    """Raise ``RSOUnsupportedError`` if ``model`` has a communication hook."""
    if model._comm_hooks:
        raise RSOUnsupportedError(
            f"the model has the communication hook {getattr(model._comm_hooks[0][0], '__name__', 'unknown')} already:"
            " DistributedDataParallel takes one, once. Keep one of the two."
        )


def forget_overflow_(error: Tensor) -> Tensor:
    """Zero what is not finite: one overflowing gradient must not spoil all later ones through the kept error."""
    return error.nan_to_num_(nan=0.0, posinf=0.0, neginf=0.0)


def finished(value: Tensor) -> torch.futures.Future[Tensor]:
    """A future that holds ``value`` already."""
    future: torch.futures.Future[Tensor] = torch.futures.Future(devices=[value.device] if value.is_cuda else None)
    future.set_result(value)
    return future
