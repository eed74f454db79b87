"""What the solvers of torch and DeepSpeed keep of a parameter, and under which names."""

from __future__ import annotations

from collections.abc import Mapping, MutableMapping
from typing import Any

import torch
from torch import Tensor

# Names under which solvers keep the moments of a parameter.
FIRST_MOMENTS = ("exp_avg", "momentum_buffer")
SECOND_MOMENTS = ("exp_avg_sq",)


def moments(state: Mapping[str, Any]) -> tuple[Tensor | None, Tensor | None]:
    """(first, second) moment tensors in a solver's state of one parameter."""
    first = next((state[k] for k in FIRST_MOMENTS if state.get(k) is not None), None)
    second = next((state[k] for k in SECOND_MOMENTS if state.get(k) is not None), None)
    return first, second


def restart_step(state: MutableMapping[str, Any]) -> None:
    """Zero Adam's step count in place: a tensor in torch, an int in DeepSpeed's own solvers."""
    step = state.get("step")
    if isinstance(step, Tensor):
        step.zero_()
    elif step is not None:
        state["step"] = 0


def blank_state(solver: torch.optim.Optimizer, key: Any, like: Any) -> dict[str, Any]:
    """What ``solver`` keeps of parameter ``key`` before its first step, as it would allocate it in that step, of the
    dtype and layout of ``like``."""
    group = next((g for g in solver.param_groups if any(p is key for p in g["params"])), solver.param_groups[0])
    if "momentum" in group:
        return {"momentum_buffer": torch.zeros_like(like)} if group["momentum"] else {}
    step: Any = 0
    if isinstance(solver, (torch.optim.Adam, torch.optim.AdamW)):
        on_device = group.get("fused") or group.get("capturable")
        step = torch.zeros((), dtype=torch.float32, device=key.device if on_device else "cpu")
    return {"step": step, "exp_avg": torch.zeros_like(like), "exp_avg_sq": torch.zeros_like(like)}
