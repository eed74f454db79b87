"""What a layer computes: y = x W^T + (x P) B^T + b, keeping x P instead of x for backward.

Paper (arXiv 2502.07222, section 4): Z = Y (W + P B) with Y [tokens, in], W [in, out], B [r, out].
Here everything is in PyTorch's layout: ``weight`` is the transpose [out, in], ``B`` is [out, r].
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


class _SubspaceLinear(torch.autograd.Function):
    # Plain matmul instead of F.linear: DeepSpeed ZeRO-3 replaces F.linear process-wide by a version
    # that keeps its input even when the weight is frozen.

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any, x: Tensor, weight: Tensor, B: Tensor, P: Tensor, bias: Tensor | None
    ) -> Tensor:
        dtype = _compute_dtype(x)
        rows = x.reshape(-1, x.shape[-1]).to(dtype)
        z = rows @ P.to(dtype)
        w_t = weight.to(dtype).t()
        y = rows @ w_t if bias is None else torch.addmm(bias.to(dtype), rows, w_t)
        y.addmm_(z, B.to(dtype).t())
        # The parameters themselves are saved, not low-precision copies: ZeRO-3 frees their storage after
        # forward and gathers it again for backward, and autocast would otherwise keep a second W alive.
        ctx.save_for_backward(z, weight, B, P)
        ctx.x_dtype, ctx.x_shape = x.dtype, x.shape
        return y.view(*x.shape[:-1], y.shape[-1])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_y: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        z, weight, B, P = ctx.saved_tensors
        dtype = z.dtype
        dy = grad_y.reshape(-1, grad_y.shape[-1]).to(dtype)
        dx = d_b = d_bias = None
        if ctx.needs_input_grad[0]:
            dx = dy @ weight.to(dtype)
            dx.addmm_(dy @ B.to(dtype), P.to(dtype).t())
            dx = dx.to(ctx.x_dtype).view(ctx.x_shape)
        if ctx.needs_input_grad[2]:
            d_b = (dy.t() @ z).to(B.dtype)
        if ctx.needs_input_grad[4]:
            d_bias = dy.sum(0)
        return dx, None, d_b, None, d_bias


def _compute_dtype(x: Tensor) -> torch.dtype:
    device_type = x.device.type
    if torch.is_autocast_enabled(device_type) and x.dtype != torch.float64:
        return torch.get_autocast_dtype(device_type)
    return x.dtype


def subspace_linear(x: Tensor, weight: Tensor, B: Tensor, P: Tensor, bias: Tensor | None = None) -> Tensor:
    """``x W^T + (x P) B^T + bias``, differentiable once in x, B and bias; W and P are constants.

    Shapes: x [..., in], weight [out, in], B [out, r], P [in, r], bias [out] or None; returns [..., out].
    Computes in x's dtype, or in the autocast dtype where autocast is on. Kept for backward: x P
    [tokens, r] in the compute dtype, and references to weight, B and P; never x.
    """
    return _SubspaceLinear.apply(x, weight, B, P, bias)
