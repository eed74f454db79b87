"""Activations that keep their input only.

A gated MLP's stock form keeps gate, act(gate), up and (for the down projection) their product; an RSO
down projection does not need the product, and act(gate) is computed again here, so gate and up remain.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from rso_ds.saved.kernels import liger_silu_mul


def _quick_gelu(x: Tensor) -> Tensor:
    return x * torch.sigmoid(1.702 * x)


def _quick_gelu_backward(dy: Tensor, x: Tensor) -> Tensor:
    s = torch.sigmoid(1.702 * x)
    return dy * (s + 1.702 * x * s * (1 - s))


Forward = Callable[[Tensor], Tensor]
Backward = Callable[[Tensor, Tensor], Tensor]

# name -> (act(x), derivative(dy, x)). gelu_tanh is transformers' gelu_new, gelu_fast and gelu_pytorch_tanh.
ACTIVATIONS: dict[str, tuple[Forward, Backward]] = {
    "silu": (F.silu, torch.ops.aten.silu_backward),
    "gelu": (F.gelu, torch.ops.aten.gelu_backward),
    "gelu_tanh": (
        lambda x: F.gelu(x, approximate="tanh"),
        lambda dy, x: torch.ops.aten.gelu_backward(dy, x, approximate="tanh"),
    ),
    "quick_gelu": (_quick_gelu, _quick_gelu_backward),
}


class _Activation(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, kind: str) -> Tensor:  # type: ignore[override]
        ctx.save_for_backward(x)
        ctx.kind = kind
        return ACTIVATIONS[kind][0](x)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        (x,) = ctx.saved_tensors
        return ACTIVATIONS[ctx.kind][1](dy, x), None


class _Gated(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor, kind: str) -> Tensor:  # type: ignore[override]
        ctx.save_for_backward(gate, up)
        ctx.kind = kind
        return ACTIVATIONS[kind][0](gate).mul_(up)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        gate, up = ctx.saved_tensors
        forward, backward = ACTIVATIONS[ctx.kind]
        return backward(dy * up, gate), forward(gate).mul_(dy), None


def activation(x: Tensor, kind: str) -> Tensor:
    """act(x) elementwise; ``kind`` is a key of ``ACTIVATIONS``. Kept for backward: x."""
    return _Activation.apply(x, kind)


def gated(gate: Tensor, up: Tensor, kind: str, liger: bool = False) -> Tensor:
    """act(gate) * up, equal shapes and dtypes. ``liger`` allows liger-kernel's SwiGLU on CUDA.

    Kept for backward: gate and up.
    """
    if liger and gate.is_cuda and kind == "silu":
        return liger_silu_mul(gate, up)
    return _Gated.apply(gate, up, kind)
