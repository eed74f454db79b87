"""The layer that takes the place of a token embedding."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from rso_ds.layers.base import SubspaceLayer
from rso_ds.subspace import Subspace, add_lifted_, project


class _SubspaceEmbedding(torch.autograd.Function):
    """(ids, W, B, P, padding_idx) -> rows [tokens, hidden] of W + B P^T. torch's own index_add would keep B[ids]."""

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any, ids: Tensor, weight: Tensor, B: Tensor, P: Tensor, padding_idx: int | None
    ) -> Tensor:
        flat = ids.reshape(-1)
        rows = add_lifted_(F.embedding(flat, weight), F.embedding(flat, B), P)
        ctx.save_for_backward(ids, P)
        ctx.vocab, ctx.dtype, ctx.padding_idx = B.shape[0], B.dtype, -1 if padding_idx is None else padding_idx
        return rows

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        if not ctx.needs_input_grad[2]:
            return None, None, None, None, None
        ids, P = ctx.saved_tensors
        dz = project(grad.reshape(-1, grad.shape[-1]), P)
        # Sums over all occurrences of a token: in fp32, since hundreds of bf16 additions would lose the small ones.
        dz = dz.to(torch.promote_types(dz.dtype, torch.float32))
        d_b = torch.ops.aten.embedding_dense_backward(dz, ids.reshape(-1), ctx.vocab, ctx.padding_idx, False)
        return None, None, d_b.to(ctx.dtype), None, None


def subspace_embedding(ids: Tensor, weight: Tensor, B: Tensor, P: Tensor, padding_idx: int | None = None) -> Tensor:
    """``W[ids] + B[ids] P^T``, the rows ``ids`` of W + B P^T; differentiable once in B, W and P are constants.

    Shapes: ids [...] int, weight [vocab, hidden], B [vocab, r], P [hidden, r] or coordinates [r]; returns
    [..., hidden] in W's dtype, also under autocast, as ``torch.nn.functional.embedding`` does. The row
    ``padding_idx`` of B gets no gradient. Kept for backward: ids, and a reference to P. The gradient of B is
    [vocab, r] and dense.
    """
    rows = _SubspaceEmbedding.apply(ids, weight, B, P, padding_idx)
    return rows.view(*ids.shape, rows.shape[-1])  # not a view made inside, which nothing may change in place


class RSOEmbedding(SubspaceLayer):
    """A token embedding trained in a random subspace: out_features is the vocabulary, in_features hidden."""

    def __init__(
        self,
        weight: nn.Parameter,
        in_features: int,
        out_features: int,
        subspace: Subspace,
        padding_idx: int | None = None,
        B: nn.Parameter | None = None,
    ) -> None:
        super().__init__(weight, None, in_features, out_features, subspace, B)
        self.kind = "embedding"
        self.padding_idx = padding_idx

    def forward(self, ids: Tensor) -> Tensor:
        """ids [...] -> [..., in_features]."""
        return subspace_embedding(ids, self.weight, self.B, self.projection(), self.padding_idx)

    def reset_parameters(self) -> None:
        nn.init.normal_(self.weight)
        if self.padding_idx is not None:
            with torch.no_grad():
                self.weight[self.padding_idx].fill_(0)
        nn.init.zeros_(self.B)

    def stock(self, weight: nn.Parameter, bias: nn.Parameter | None) -> nn.Module:
        embedding = nn.Embedding(self.out_features, self.in_features, self.padding_idx, device="meta")
        embedding.weight = weight
        return embedding

    def extra_repr(self) -> str:
        return (
            f"vocabulary={self.out_features}, hidden={self.in_features}, rank={self.subspace.rank},"
            f" padding_idx={self.padding_idx}, group={self.subspace.name!r}"
        )
