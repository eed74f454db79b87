"""What a layer computes: y = x W^T + z B^T + b with z = x P, keeping z instead of x for backward.

In the folded form W holds B P^T already and y = x W^T + b; z is for the gradient of B alone.

Paper (arXiv 2502.07222, section 4): Z = Y (W + P B) with Y [tokens, in], W [in, out], B [r, out].
Here everything is in PyTorch's layout: ``weight`` is the transpose [out, in], ``B`` is [out, r]. z is
an output beside y, so that layers with one input compute and keep it once.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from rso_ds.dtypes import compute_dtype
from rso_ds.subspace import add_lifted_, lift, project


def _rows(x: Tensor) -> Tensor:
    """[tokens, in], in the dtype of the computation."""
    return x.reshape(-1, x.shape[-1]).to(compute_dtype(x))


def _times_weight(rows: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    # Plain matmul instead of F.linear: DeepSpeed ZeRO-3 replaces F.linear process-wide by a version
    # that keeps its input even when the weight is frozen.
    w_t = weight.to(rows.dtype).t()
    return rows @ w_t if bias is None else torch.addmm(bias.to(rows.dtype), rows, w_t)


def _forward(ctx: Any, x: Tensor, z: Tensor | None, weight: Tensor, B: Tensor, P: Tensor | None, bias: Any) -> Any:
    rows = _rows(x)
    if z is None:
        assert P is not None
        z = project(rows, P)
    y = _times_weight(rows, weight, bias).addmm_(z, B.to(rows.dtype).t())
    # The parameters themselves are saved, not low-precision copies: ZeRO-3 frees their storage after
    # forward and gathers it again for backward, and autocast would otherwise keep a second W alive.
    ctx.save_for_backward(z, weight, B, P)
    ctx.set_materialize_grads(False)
    ctx.x_dtype, ctx.x_shape = x.dtype, x.shape
    return y, z


class _SubspaceLinear(torch.autograd.Function):
    """(x, W, B, P, b) -> (y [tokens, out], z); z is an output so that other layers with this x can use it."""

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any, x: Tensor, weight: Tensor, B: Tensor, P: Tensor, bias: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        return _forward(ctx, x, None, weight, B, P, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_y: Tensor | None, grad_z: Tensor | None) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        z, weight, B, P = ctx.saved_tensors
        dtype = z.dtype
        dx = d_b = d_bias = None
        if grad_y is not None:
            dy = grad_y.reshape(-1, weight.shape[0]).to(dtype)
            d_b = (dy.t() @ z).to(B.dtype) if ctx.needs_input_grad[2] else None
            d_bias = dy.sum(0) if ctx.needs_input_grad[4] else None
        if ctx.needs_input_grad[0]:
            if grad_y is not None:
                dz = dy @ B.to(dtype) if grad_z is None else torch.addmm(grad_z, dy, B.to(dtype))
                dx = add_lifted_(dy @ weight.to(dtype), dz, P)
            elif grad_z is not None:
                dx = lift(grad_z, P, weight.shape[1])
            dx = None if dx is None else dx.to(ctx.x_dtype).view(ctx.x_shape)
        return dx, None, d_b, None, d_bias


class _SharingLinear(torch.autograd.Function):
    """(x, z, W, B, b) -> y [tokens, out], with the z of the layer that was called first with this x."""

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any, x: Tensor, z: Tensor, weight: Tensor, B: Tensor, bias: Tensor | None
    ) -> Tensor:
        return _forward(ctx, x, z, weight, B, None, bias)[0]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_y: Tensor | None) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        if grad_y is None:
            return None, None, None, None, None
        z, weight, B, _ = ctx.saved_tensors
        dtype = z.dtype
        dy = grad_y.reshape(-1, weight.shape[0]).to(dtype)
        want_x, want_z, _, want_b, want_bias = ctx.needs_input_grad
        return (
            (dy @ weight.to(dtype)).to(ctx.x_dtype).view(ctx.x_shape) if want_x else None,
            dy @ B.to(dtype) if want_z else None,
            None,
            (dy.t() @ z).to(B.dtype) if want_b else None,
            dy.sum(0) if want_bias else None,
        )


class _FoldedLinear(torch.autograd.Function):
    """(x, z, W, B, b) -> y [tokens, out], where W holds B P^T; z = x P is a constant to autograd, of B only the
    gradient counts."""

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any, x: Tensor, z: Tensor, weight: Tensor, B: Tensor, bias: Tensor | None
    ) -> Tensor:
        y = _times_weight(_rows(x), weight, bias)
        ctx.save_for_backward(z, weight)
        ctx.x_dtype, ctx.x_shape, ctx.b_dtype = x.dtype, x.shape, B.dtype
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_y: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        z, weight = ctx.saved_tensors
        dy = grad_y.reshape(-1, grad_y.shape[-1]).to(z.dtype)
        want_x, _, _, want_b, want_bias = ctx.needs_input_grad
        return (
            (dy @ weight.to(z.dtype)).to(ctx.x_dtype).view(ctx.x_shape) if want_x else None,
            None,
            None,
            (dy.t() @ z).to(ctx.b_dtype) if want_b else None,
            dy.sum(0) if want_bias else None,
        )


def _in_shape(y: Tensor, x: Tensor) -> Tensor:
    """y [tokens, out] as [..., out] of x [..., in].

    Outside of the functions above: autograd refuses changes in place, with which Falcon adds residuals, to views that
    were made inside.
    """
    return y.view(*x.shape[:-1], y.shape[-1])


@torch.no_grad()
def projected_input(x: Tensor, P: Tensor) -> Tensor:
    """z = x P [tokens, r] for ``folded_linear``, in the dtype of the computation. Shapes: x [..., in], P [in, r] or
    coordinates [r]."""
    return project(_rows(x), P)


def folded_linear(x: Tensor, z: Tensor, weight: Tensor, B: Tensor, bias: Tensor | None = None) -> Tensor:
    """``x W^T + bias`` [..., out], where W [out, in] holds B P^T; backward gives B [out, r] the gradient dy^T z.

    Shapes and dtypes as in ``subspace_linear_and_z``. Kept for backward: z, and a reference to weight.
    """
    return _in_shape(_FoldedLinear.apply(x, z, weight, B, bias), x)


def subspace_linear_and_z(
    x: Tensor, weight: Tensor, B: Tensor, P: Tensor, bias: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """``(x W^T + z B^T + bias, z)`` with z = x P; differentiable once in x, B and bias, W and P are constants.

    Shapes: x [..., in], weight [out, in], B [out, r], P [in, r] or coordinates [r], bias [out] or None;
    returns [..., out] and [tokens, r], computed in x's dtype, or in autocast's where autocast is on. Kept
    for backward: z, and references to weight, B and P; never x.
    """
    y, z = _SubspaceLinear.apply(x, weight, B, P, bias)
    return _in_shape(y, x), z


def sharing_linear(x: Tensor, z: Tensor, weight: Tensor, B: Tensor, bias: Tensor | None = None) -> Tensor:
    """``x W^T + z B^T + bias`` with the z [tokens, r] that ``subspace_linear_and_z`` gave for the same x."""
    return _in_shape(_SharingLinear.apply(x, z, weight, B, bias), x)


def subspace_linear(x: Tensor, weight: Tensor, B: Tensor, P: Tensor, bias: Tensor | None = None) -> Tensor:
    """``x W^T + (x P) B^T + bias`` of a layer that shares its input with no other."""
    return subspace_linear_and_z(x, weight, B, P, bias)[0]
