"""The layer that takes the place of a linear one."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from rso_ds.layers.functional import sharing_linear, subspace_linear_and_z
from rso_ds.layers.shared_input import SharedInput
from rso_ds.subspace import Subspace


class RSOLinear(nn.Module):
    """A linear layer trained in a random subspace: effective weight W + B P^T.

    Parameters of the module:
        weight [out, in]: W, frozen; only a subspace boundary changes it.
        B [out, rank]: trainable, 0 at the start of every subspace.
        bias [out] or None: trained densely.
    ``subspace`` holds P [in, rank]; ``shared_input`` serves the layers that are fed the same x.
    ``conv1d`` records that the layer was a transformers ``Conv1D`` (weight stored [in, out] there).
    """

    B: nn.Parameter

    def __init__(
        self,
        weight: nn.Parameter,
        bias: nn.Parameter | None,
        in_features: int,
        out_features: int,
        subspace: Subspace,
        shared_input: SharedInput | None = None,
        conv1d: bool = False,
    ) -> None:
        super().__init__()
        self.in_features = in_features
        self.out_features = out_features
        self.subspace = subspace
        self.shared_input = SharedInput(1) if shared_input is None else shared_input
        self.conv1d = conv1d
        self.weight = weight
        self.weight.requires_grad_(False)
        self.bias = bias
        self.B = nn.Parameter(torch.zeros(out_features, subspace.rank, dtype=weight.dtype, device=weight.device))

    def forward(self, x: Tensor) -> Tensor:
        """x [..., in] -> [..., out]."""
        p = self.subspace.projection(self.weight.device, self.weight.dtype)
        z = self.shared_input.take(x, p)
        if z is not None:
            return sharing_linear(x, z, self.weight, self.B, self.bias)
        y, z = subspace_linear_and_z(x, self.weight, self.B, p, self.bias)
        self.shared_input.put(x, p, z)
        return y

    def extra_repr(self) -> str:
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, "
            f"rank={self.subspace.rank}, bias={self.bias is not None}, group={self.subspace.name!r}"
        )
