"""What stacked linear layers compute: y_s = x_t W_e^T + (x_t P) B_e^T for each pair s of a token t and its expert e.

The pairs are sorted by expert, so that those of one expert are rows in sequence and a product with all experts is one
"grouped" product. All experts read the same kind of input and have one P: z = x P is computed once for a token, however
many experts it is sent to, and it is what backward keeps.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from rso_ds.dtypes import compute_dtype
from rso_ds.subspace import add_lifted_, project


@dataclass(frozen=True, eq=False)
class Routing:
    """S = tokens * k pairs (token, expert), sorted by expert.

    order   [S] int64: index of each pair in top_k_index.flatten()
    inverse [S] int64: place of each of those in ``order``
    expert  [S] int64: non-decreasing
    offsets [E] int32: end of each expert's pairs
    choices k, experts for each token
    """

    order: Tensor
    inverse: Tensor
    expert: Tensor
    offsets: Tensor
    choices: int

    @classmethod
    def of(cls, top_k_index: Tensor, experts: int) -> Routing:
        """``top_k_index``: [tokens, k], the experts of each token."""
        expert, order = torch.sort(top_k_index.reshape(-1), stable=True)
        each = torch.arange(experts, device=expert.device, dtype=expert.dtype)
        offsets = torch.searchsorted(expert, each, right=True).to(torch.int32)
        return cls(order, torch.argsort(order), expert, offsets, top_k_index.shape[-1])

    @property
    def token(self) -> Tensor:
        """[S] int64: the token of each pair."""
        return self.order // self.choices

    @functools.cached_property
    def sizes(self) -> list[int]:
        """Pairs of each expert. Waits for the device; a trace without values (of memory) has them spread evenly."""
        experts, pairs = self.offsets.shape[0], self.expert.shape[0]
        if isinstance(self.offsets, FakeTensor):
            return [pairs // experts + (i < pairs % experts) for i in range(experts)]
        ends = self.offsets.tolist()
        return [end - start for start, end in zip([0, *ends], ends, strict=False)]

    def sum_of_pairs(self, values: Tensor) -> Tensor:
        """[S, n] in the order of the pairs -> [tokens, n], each token's pairs added in the order of its choices."""
        return values[self.inverse].view(-1, self.choices, values.shape[-1]).sum(1)


def _one_kernel(*tensors: Tensor) -> bool:
    """Whether torch's grouped product takes ``tensors``: bf16 on recent CUDA devices, rows of 16 bytes or multiples."""
    first = tensors[0]
    if not (first.is_cuda and hasattr(F, "grouped_mm") and all(t.dtype == torch.bfloat16 for t in tensors)):
        return False
    aligned = all(stride * t.element_size() % 16 == 0 for t in tensors for stride in t.stride() if stride > 1)
    return aligned and torch.cuda.get_device_capability(first.device) >= (8, 0)


def grouped_product(rows: Tensor, matrices: Tensor, routing: Routing) -> Tensor:
    """rows_s matrices_e: [S, k] and [E, k, n] -> [S, n], in the dtype of both."""
    if _one_kernel(rows, matrices):
        return F.grouped_mm(rows, matrices, offs=routing.offsets)
    result = rows.new_empty(rows.shape[0], matrices.shape[2])
    for own, matrix, out in zip(
        rows.split(routing.sizes), matrices.unbind(0), result.split(routing.sizes), strict=True
    ):
        torch.mm(own, matrix, out=out)
    return result


def grouped_outer(left: Tensor, right: Tensor, routing: Routing) -> Tensor:
    """The sum of left_s right_s^T over the pairs of each expert: [S, m] and [S, n] -> [E, m, n]; zero without pairs."""
    if _one_kernel(left.t(), right):
        return F.grouped_mm(left.t(), right, offs=routing.offsets)
    result = left.new_empty(routing.offsets.shape[0], left.shape[1], right.shape[1])
    for own, other, out in zip(left.split(routing.sizes), right.split(routing.sizes), result.unbind(0), strict=True):
        torch.mm(own.t(), other, out=out)
    return result


class _SubspaceExperts(torch.autograd.Function):
    """(x, W, B, P, routing, spread, folded) -> y."""

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any, x: Tensor, weight: Tensor, B: Tensor, P: Tensor, routing: Routing, spread: bool, folded: bool
    ) -> Tensor:
        rows = x.to(compute_dtype(x))
        z = project(rows, P)
        y = grouped_product(rows[routing.token] if spread else rows, weight.to(rows.dtype).mT, routing)
        if not folded:
            of_pairs = z[routing.token] if spread else z
            y += grouped_product(of_pairs, B.to(rows.dtype).mT, routing)
        ctx.save_for_backward(z, weight, B, P)
        ctx.routing, ctx.spread, ctx.folded, ctx.x_dtype = routing, spread, folded, x.dtype
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_y: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        z, weight, B, P = ctx.saved_tensors
        routing, dy = ctx.routing, grad_y.to(z.dtype)
        dx = d_b = None
        if ctx.needs_input_grad[2]:
            d_b = grouped_outer(dy, z[routing.token] if ctx.spread else z, routing).to(B.dtype)
        if ctx.needs_input_grad[0]:
            dx = grouped_product(dy, weight.to(z.dtype), routing)
            dx = routing.sum_of_pairs(dx) if ctx.spread else dx
            if not ctx.folded:
                dz = grouped_product(dy, B.to(z.dtype), routing)
                dx = add_lifted_(dx, routing.sum_of_pairs(dz) if ctx.spread else dz, P)
            dx = dx.to(ctx.x_dtype)
        return dx, None, d_b, None, None, None, None


def subspace_experts(
    x: Tensor, weight: Tensor, B: Tensor, P: Tensor, routing: Routing, spread: bool, folded: bool = False
) -> Tensor:
    """``x W_e^T + (x P) B_e^T`` for every pair, [S, out]; differentiable once in x and B, W and P are constants.

    Shapes: x [tokens, in] with ``spread`` (each pair has the x of its token), else [S, in]; weight [E, out, in],
    B [E, out, r], P [in, r] or another form of it. ``folded``: W holds B P^T already, of B only the gradient counts.
    In x's dtype, or in autocast's where autocast is on. Kept for backward: x P, never x; references to weight, B and P.
    """
    return _SubspaceExperts.apply(x, weight, B, P, routing, spread, folded)


def dense_experts(x: Tensor, weight: Tensor, routing: Routing, spread: bool) -> Tensor:
    """The same without a subspace, ``x W_e^T`` [S, out], differentiable in x and weight [E, out, in]."""
    rows = x.to(compute_dtype(x))
    rows = rows[routing.token] if spread else rows
    pairs = zip(rows.split(routing.sizes), weight.to(rows.dtype).unbind(0), strict=True)
    return torch.cat([own @ matrix.t() for own, matrix in pairs])
