"""The layer that takes the place of a linear one."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from torch import Tensor, nn

from rso_ds.layers.base import SubspaceLayer
from rso_ds.layers.functional import folded_linear, projected_input, sharing_linear, subspace_linear_and_z
from rso_ds.layers.shared_input import SharedInput
from rso_ds.subspace import Subspace


class RSOLinear(SubspaceLayer):
    """A linear layer trained in a random subspace.

    ``shared_input`` serves the layers that are fed the same x. ``conv1d`` records that the layer was a
    transformers ``Conv1D`` (weight stored [in, out] there).
    """

    _stock_class: type[nn.Linear] = nn.Linear
    _stock_attributes: Mapping[str, Any] = MappingProxyType({})

    def __init__(
        self,
        weight: nn.Parameter,
        bias: nn.Parameter | None,
        in_features: int,
        out_features: int,
        subspace: Subspace,
        shared_input: SharedInput | None = None,
        conv1d: bool = False,
        B: nn.Parameter | None = None,
    ) -> None:
        super().__init__(weight, bias, in_features, out_features, subspace, B)
        self.shared_input = SharedInput(1) if shared_input is None else shared_input
        self.kind = "conv1d" if conv1d else "linear"

    def forward(self, x: Tensor) -> Tensor:
        """x [..., in] -> [..., out]."""
        p = self.projection()
        z = self.shared_input.take(x, p)
        if self.form == "folded":
            if z is None:
                z = projected_input(x, p)
                self.shared_input.put(x, p, z)
            return folded_linear(x, z, self.weight, self.B, self.bias)
        if z is not None:
            return sharing_linear(x, z, self.weight, self.B, self.bias)
        y, z = subspace_linear_and_z(x, self.weight, self.B, p, self.bias)
        self.shared_input.put(x, p, z)
        return y

    def reset_parameters(self) -> None:
        if self.kind == "conv1d":  # as transformers' Conv1D
            nn.init.normal_(self.weight, std=0.02)
            if self.bias is not None:
                nn.init.zeros_(self.bias)
        else:
            nn.Linear.reset_parameters(self)  # type: ignore[arg-type]
        nn.init.zeros_(self.B)

    def stock(self, weight: nn.Parameter, bias: nn.Parameter | None) -> nn.Module:
        linear: nn.Module
        if self.kind == "conv1d":
            from transformers.pytorch_utils import Conv1D

            linear = Conv1D(self.out_features, self.in_features)
            weight = nn.Parameter(weight.detach().t().contiguous())
        else:
            linear = nn.Linear(self.in_features, self.out_features, bias=bias is not None, device="meta")
            linear.__class__ = self._stock_class
            linear.__dict__.update(self._stock_attributes)
        linear.weight = weight
        if bias is not None:
            linear.bias = bias
        return linear

    def take_the_place_of(self, linear: nn.Module) -> None:
        """``stock`` gives back the subclass of ``nn.Linear`` that ``linear`` has, with the attributes that it added."""
        if type(linear) is not nn.Linear and isinstance(linear, nn.Linear):
            common = vars(nn.Linear(1, 1, device="meta"))
            self._stock_class = type(linear)
            self._stock_attributes = {key: value for key, value in vars(linear).items() if key not in common}

    def detach(self) -> None:
        self.shared_input.detach()

    def extra_repr(self) -> str:
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, "
            f"rank={self.subspace.rank}, bias={self.bias is not None}, group={self.subspace.name!r}"
        )
