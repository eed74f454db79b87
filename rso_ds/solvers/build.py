"""The torch optimizer that a configuration names."""

from __future__ import annotations

from typing import Any

import torch

from rso_ds.config import RSOConfig


def build_solver(groups: list[dict[str, Any]], config: RSOConfig) -> torch.optim.Optimizer:
    """The torch optimizer that ``config.solver`` names, over ready-made groups (``rso_ds.solvers.groups``)."""
    if config.solver == "sgd":
        return torch.optim.SGD(groups, lr=config.lr, momentum=config.momentum)
    kind = torch.optim.AdamW if config.solver == "adamw" else torch.optim.Adam
    return kind(groups, lr=config.lr, betas=config.betas, eps=config.eps)
