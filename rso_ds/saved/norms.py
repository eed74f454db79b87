"""RMSNorm that keeps its input and one number a row; everything else is computed again in backward.

Stock Hugging Face RMSNorm in bf16 keeps the input twice in fp32 and the normalised row once: five units
of tokens x hidden x 2 bytes, against one here.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from rso_ds.saved.kernels import liger_rms_norm


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float, offset: float) -> Tensor:  # type: ignore[override]
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        rstd = torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
        ctx.save_for_backward(x, weight, rstd)
        ctx.offset = offset
        return _scale(wide * rstd, x.dtype, weight, offset)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        x, weight, rstd = ctx.saved_tensors
        normalised = x.to(rstd.dtype) * rstd
        dx = d_weight = None
        if ctx.needs_input_grad[0]:
            g = dy.to(rstd.dtype) * (weight.to(rstd.dtype) + ctx.offset)
            mean = torch.linalg.vecdot(g, normalised, dim=-1).unsqueeze(-1) / x.shape[-1]
            dx = g.addcmul_(normalised, mean, value=-1).mul_(rstd).to(x.dtype)
        if ctx.needs_input_grad[1]:
            seen = normalised if ctx.offset else normalised.to(x.dtype)
            d_weight = (dy.to(rstd.dtype) * seen).reshape(-1, x.shape[-1]).sum(0).to(weight.dtype)
        return dx, d_weight, None, None


def _scale(normalised: Tensor, dtype: torch.dtype, weight: Tensor, offset: float) -> Tensor:
    # LLaMA rounds the normalised row, then multiplies; Gemma multiplies by 1 + weight, then rounds.
    if offset:
        return (normalised * (weight.to(normalised.dtype) + offset)).to(dtype)
    return weight * normalised.to(dtype)


def rms_norm(x: Tensor, weight: Tensor, eps: float, offset: float = 0.0, liger: bool = False) -> Tensor:
    """RMSNorm over the last dimension: x [..., n], weight [n]; computed in fp32 (fp64 for fp64 inputs).

    ``offset`` 0 is LLaMA's form, 1 Gemma's (scale 1 + weight). ``liger`` allows liger-kernel's kernel on
    CUDA. Kept for backward: x, the weight itself, and rstd [..., 1] in fp32.
    """
    if liger and x.is_cuda:
        return liger_rms_norm(x, weight, eps, offset)
    return _RMSNorm.apply(x, weight, eps, offset)
