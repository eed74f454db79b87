"""The layer that takes the place of a token embedding."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional as F

from rso_ds.layers.base import SubspaceLayer
from rso_ds.subspace import Subspace, add_lifted_


def subspace_embedding(ids: Tensor, weight: Tensor, B: Tensor, P: Tensor, padding_idx: int | None = None) -> Tensor:
    """``W[ids] + B[ids] P^T``, the rows ``ids`` of W + B P^T; differentiable in B, W and P are constants.

    Shapes: ids [...] int, weight [vocab, hidden], B [vocab, r], P [hidden, r] or coordinates [r]; returns
    [..., hidden] in W's dtype, also under autocast, as ``torch.nn.functional.embedding`` does. The row
    ``padding_idx`` of B gets no gradient. Kept for backward: ids, and a reference to P. The gradient of B is
    [vocab, r] and dense.
    """
    flat = ids.reshape(-1)
    # Rows of W are a fresh tensor that needs no gradient: added to in place, nothing of size [tokens, hidden]
    # exists but the result.
    rows = add_lifted_(F.embedding(flat, weight), F.embedding(flat, B, padding_idx), P)
    return rows.view(*ids.shape, rows.shape[-1])


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
        self.padding_idx = padding_idx

    def forward(self, ids: Tensor) -> Tensor:
        """ids [...] -> [..., in_features]."""
        return subspace_embedding(ids, self.weight, self.B, self.projection(), self.padding_idx)

    def stock(self, weight: nn.Parameter, bias: nn.Parameter | None) -> nn.Module:
        embedding = nn.Embedding(self.out_features, self.in_features, self.padding_idx, device="meta")
        embedding.weight = weight
        return embedding

    def extra_repr(self) -> str:
        return (
            f"vocabulary={self.out_features}, hidden={self.in_features}, rank={self.subspace.rank},"
            f" padding_idx={self.padding_idx}, group={self.subspace.name!r}"
        )
