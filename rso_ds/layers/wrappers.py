"""What ``torch.compile`` puts around a model."""

from __future__ import annotations

from typing import Any

from torch import nn


def without_compile(model: nn.Module) -> nn.Module:
    """``model``, or the one inside if it is what ``torch.compile(model)`` returned."""
    inner: Any = model
    while isinstance(getattr(inner, "_orig_mod", None), nn.Module):
        inner = inner._orig_mod
    return inner  # type: ignore[no-any-return]
