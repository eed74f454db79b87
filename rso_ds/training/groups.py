"""Weight decay as usual: on matrices, for every optimizer and engine alike."""

from __future__ import annotations

from typing import Any

from torch import nn

from rso_ds.layers.partitioned import full_shape


def decay_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Groups of the trainable parameters: matrices with weight decay, biases and norms without."""
    trainable = [p for p in model.parameters() if p.requires_grad]
    matrices = [p for p in trainable if len(full_shape(p)) > 1]
    vectors = [p for p in trainable if len(full_shape(p)) <= 1]
    groups = [{"params": matrices, "weight_decay": weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    return [g for g in groups if g["params"]]
