"""fp32 copies of trained parameters in bf16 or fp16: the solver steps on them, and the model gets them rounded.

In 16 bits a step that is below the last bit of a parameter is lost, and so is most of what a gradient adds to Adam's
second moment. DeepSpeed keeps such copies itself; these are for one process, DDP and FSDP2.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor


class ParameterMasters:
    """``of`` maps the id of each low-precision parameter of ``params`` to its fp32 copy, sharded as it is."""

    def __init__(self, params: Iterable[Any]) -> None:
        self._params = [p for p in params if p.element_size() < 4]
        self.of: Mapping[int, Tensor] = {id(p): p.detach().float() for p in self._params}
        self._back = {id(self.of[id(p)]): p for p in self._params}
        self._versions = [_version(p) for p in self._params]

    @contextmanager
    def instead(self, solver: torch.optim.Optimizer) -> Iterator[None]:
        """While it is entered, ``solver`` has the masters in its groups and state; else the model's parameters, which
        schedules, clipping and whoever reads its state look for."""
        self._exchange(solver, self.of)
        try:
            yield
        finally:
            self._exchange(solver, self._back)

    def _exchange(self, solver: torch.optim.Optimizer, others: Mapping[int, Any]) -> None:
        for group in solver.param_groups if others else ():
            for old in group["params"]:
                if id(old) in others and old in solver.state:
                    solver.state[others[id(old)]] = solver.state.pop(old)
            group["params"] = [others.get(id(p), p) for p in group["params"]]

    @torch.no_grad()
    def take_gradients(self) -> None:
        """Before the solver's step. A parameter that something else has written since (``load_state_dict``) is
        followed; one that is its master rounded leaves the master as it is."""
        for i, p in enumerate(self._params):
            master = self.of[id(p)]
            master.grad = None if p.grad is None else p.grad.float()
            if _version(p) != self._versions[i]:
                rows, mine = _rows(p), _rows(master)
                mine.copy_(torch.where(rows == mine.to(rows.dtype), mine, rows.float()))

    @torch.no_grad()
    def round(self) -> None:
        """After the solver's step, applied or not: parameters are their masters, rounded."""
        for i, p in enumerate(self._params):
            master = self.of[id(p)]
            master.grad = None
            _rows(p).copy_(_rows(master))
            self._versions[i] = _version(p)

    def values(self) -> list[Tensor]:
        """The masters of this rank, in the order of the parameters."""
        return [_rows(self.of[id(p)]) for p in self._params]


def _rows(tensor: Any) -> Tensor:
    return tensor._local_tensor if isinstance(tensor, DTensor) else tensor.detach()


def _version(param: Any) -> int:
    return int((param._local_tensor if isinstance(param, DTensor) else param)._version)
