"""What a case may leave behind in its process, so that the next one is not what it claims to be."""

from __future__ import annotations

import os
import sys
from typing import Any


def fingerprint() -> dict[str, Any]:
    """Name -> value (or identity) of everything process-wide that a case of training can change: patched functions,
    defaults, environment, DeepSpeed's process groups, hooks, import finders.

    The groups of device meshes are left out: torch keeps them by name for the next equal mesh.
    """
    import deepspeed
    import torch
    import torch.distributed as dist
    from deepspeed.runtime.zero import partition_parameters
    from deepspeed.utils import groups
    from torch import nn
    from torch.nn.modules import module

    found: dict[str, Any] = {}
    places = (
        torch, torch.Tensor, torch.autograd, torch.nn.functional, nn.Module, nn.Linear, nn.Embedding, nn.LayerNorm,
        torch.optim.Optimizer, dist, deepspeed, deepspeed.comm,
    )  # fmt: skip
    for place in places:
        for name, value in vars(place).items():
            if callable(value) and not isinstance(value, type):
                found[f"{place.__name__}.{name}"] = id(value)
    for name, value in vars(groups).items():
        if not callable(value) and not name.startswith("__"):
            found[f"deepspeed groups {name}"] = id(value)
    found["zero.Init"] = partition_parameters.zero_init_context, partition_parameters.top_level_context
    found["accelerator"] = sorted(vars(deepspeed.accelerator.get_accelerator()))
    found["dtype"] = torch.get_default_dtype()
    found["device"] = torch.get_default_device()
    found["grad"] = torch.is_grad_enabled(), torch.is_autocast_enabled("cpu")
    found["deterministic"] = torch.are_deterministic_algorithms_enabled()
    found["threads"] = torch.get_num_threads()
    found["module hooks"] = [
        len(getattr(module, f"_global_{kind}_hooks")) for kind in ("forward", "forward_pre", "backward")
    ]
    found["environment"] = dict(os.environ)
    found["folder"] = os.getcwd()
    found["finders"] = [type(finder).__name__ for finder in sys.meta_path]
    return found


def differences(before: dict[str, Any], after: dict[str, Any]) -> list[str]:
    """Names of what is no longer what it was. What came new with a lazy import does not count."""
    changed = [name for name, value in before.items() if name in after and after[name] != value]
    if "environment" in changed:
        changed.remove("environment")
        pairs = before["environment"].items() ^ after["environment"].items()
        changed += [f"${name}" for name in sorted({name for name, _ in pairs})]
    return changed
