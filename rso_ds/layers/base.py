"""What all layers that train in a random subspace have in common."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from rso_ds.subspace import Subspace


class SubspaceLayer(nn.Module):
    """A layer with the effective weight W + B P^T. What it computes with it is for the subclass to say.

    Parameters of the module:
        weight [out, in]: W, frozen; only a subspace boundary changes it.
        B [out, rank]: trainable, 0 at the start of every subspace.
        bias [out] or None: trained densely.
    ``subspace`` holds P [in, rank]. Boundary, engines, checkpoints and the account know a layer by these
    attributes alone. Tied layers have one weight, one B and one subspace between them.
    """

    form = "two_path"  # or "folded": between two steps W holds B P^T and B is 0
    kind: str  # of the ordinary module: "linear", "conv1d" (weight stored [in, out] there) or "embedding"
    weight: nn.Parameter
    B: nn.Parameter
    bias: nn.Parameter | None

    def __init__(
        self,
        weight: nn.Parameter,
        bias: nn.Parameter | None,
        in_features: int,
        out_features: int,
        subspace: Subspace,
        B: nn.Parameter | None = None,
    ) -> None:
        """``B``: that of the layer to which this one is tied; a new one, zero, if None."""
        super().__init__()
        self.in_features = in_features
        self.out_features = out_features
        self.subspace = subspace
        self.weight = weight
        self.weight.requires_grad_(False)
        self.bias = bias
        if B is None:
            B = nn.Parameter(torch.zeros(out_features, subspace.rank, dtype=weight.dtype, device=weight.device))
        self.B = B

    def projection(self) -> Tensor:
        """P [in, rank] in W's dtype and on its device, or its coordinates [rank]."""
        return self.subspace.projection(self.weight.device, self.weight.dtype)

    def current_projection(self) -> Tensor:
        """P as the last forward pass used it, whose dtype may be another than that of W at rest (FSDP2)."""
        return self.subspace.current(self.weight.device, self.weight.dtype)

    def stock(self, weight: nn.Parameter, bias: nn.Parameter | None) -> nn.Module:
        """The ordinary module with this ``weight`` [out, in] and ``bias``."""
        raise NotImplementedError

    def detach(self) -> None:
        """Take off what conversion has hung on other modules for this layer."""


def subspace_modules(model: nn.Module) -> Iterator[tuple[str, SubspaceLayer]]:
    """(name, module) of every RSO module of ``model``, in model order; tied ones are several."""
    for name, module in model.named_modules():
        if isinstance(module, SubspaceLayer):
            yield name, module


def rso_layers(model: nn.Module) -> Iterator[tuple[str, SubspaceLayer]]:
    """(name, layer) of every RSO layer of ``model``, in model order: each B once, under its first name."""
    seen: set[int] = set()
    for name, module in subspace_modules(model):
        if id(module.B) not in seen:
            seen.add(id(module.B))
            yield name, module
