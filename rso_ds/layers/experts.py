"""The layer that takes the place of stacked experts."""

from __future__ import annotations

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from rso_ds.layers.base import SubspaceLayer
from rso_ds.layers.grouped import Routing, subspace_experts
from rso_ds.layers.kinds import is_turned, ordinary_weight
from rso_ds.layers.stacked import experts_forward, name_the_parameter
from rso_ds.saved.apply import replace_forward
from rso_ds.subspace import Subspace


class RSOExperts(SubspaceLayer):
    """E linear layers, of which each token's input meets a few, trained in one random subspace.

    weight [E, out, in], B [E, out, rank], P [in, rank]; ``kind``: "experts" or "experts_t" (``rso_ds.layers.kinds``).
    """

    def __init__(
        self,
        weight: nn.Parameter,
        in_features: int,
        out_features: int,
        subspace: Subspace,
        kind: str,
        experts: int,
    ) -> None:
        super().__init__(weight, None, in_features, out_features, subspace, experts=experts)
        self.kind = kind
        self._hook: RemovableHandle | None = None

    def forward(self, x: Tensor, routing: Routing, spread: bool) -> Tensor:
        """x [tokens, in] with ``spread``, else [S, in] -> [S, out]: ``subspace_experts``."""
        return subspace_experts(x, self.weight, self.B, self.projection(), routing, spread, self.form == "folded")

    def reset_parameters(self) -> None:
        nn.init.normal_(self.weight, std=0.02)  # transformers' usual initializer_range
        nn.init.zeros_(self.B)

    def stock(self, weight: nn.Parameter, bias: nn.Parameter | None) -> nn.Module:
        module = nn.Module()
        if is_turned(self.kind):
            weight = nn.Parameter(ordinary_weight(weight.detach(), self.kind).contiguous())
        module.weight = weight
        return module

    def attach(self, owner: nn.Module, leaf: str) -> None:
        """Take the place of the parameter ``owner.leaf``: ``owner`` computes with this layer, and loads its weight."""
        assert self.converted_with is not None
        lean = self.converted_with.lean
        replace_forward(owner, experts_forward, {"recompute": lean == "all" or "activation" in lean})
        del owner._parameters[leaf]
        owner.register_module(leaf, self)
        self._hook = owner.register_load_state_dict_pre_hook(name_the_parameter)
        self.__dict__["_place"] = owner, leaf  # past nn.Module, whose child the owner is not

    def give_back(self, weight: nn.Parameter) -> None:
        """Let the owner have ``weight``, stored as its parameter was, in place of this layer."""
        owner, leaf = self.__dict__["_place"]
        del owner._modules[leaf]
        owner.register_parameter(leaf, weight)

    def detach(self) -> None:
        if self._hook is not None:
            self._hook.remove()

    def extra_repr(self) -> str:
        return (
            f"experts={self.experts}, in_features={self.in_features}, out_features={self.out_features}, "
            f"rank={self.subspace.rank}, group={self.subspace.name!r}"
        )
