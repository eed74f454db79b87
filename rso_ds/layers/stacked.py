"""Experts that a model keeps as 3-D parameters, E linear layers in one, and how their module computes with them.

transformers 5 stores the experts of a mixture as two parameters of one module, ``gate_up_proj`` (or ``up_proj``) and
``down_proj``, and says on the module how they are laid out (``transformers.integrations.moe``). Such a parameter is a
target by its own name, and becomes an ``RSOExperts`` in its place.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from rso_ds.layers.grouped import Routing, dense_experts
from rso_ds.layers.partitioned import full_shape

# What transformers' decorator use_experts_implementation writes on a module whose forward it provides.
_DECLARED = ("has_gate", "has_bias", "has_post_expert_norm", "is_transposed", "_is_expert_parallel", "_apply_gate")


@dataclass(frozen=True, eq=False)
class StackedLinear:
    """One such parameter, ``owner.leaf`` [E, out, in], or [E, in, out] if ``transposed``; stands for a linear layer
    where targets are looked for."""

    owner: nn.Module
    leaf: str

    @property
    def weight(self) -> nn.Parameter:
        return self.owner._parameters[self.leaf]  # type: ignore[return-value]

    @property
    def transposed(self) -> bool:
        return bool(self.owner.is_transposed)

    @property
    def training(self) -> bool:
        return self.owner.training


def _leaves(module: nn.Module) -> tuple[str, str]:
    return ("gate_up_proj" if module.has_gate else "up_proj", "down_proj")


def stacked_linears(module: nn.Module) -> dict[str, StackedLinear]:
    """{name of the parameter: what it is} for those of ``module`` itself that are such experts."""
    if not all(hasattr(module, name) for name in _DECLARED) or module._is_expert_parallel:
        return {}
    own = {leaf: module._parameters.get(leaf) for leaf in _leaves(module)}
    return {n: StackedLinear(module, n) for n, p in own.items() if p is not None and len(full_shape(p)) == 3}


Ordinary = nn.Module | StackedLinear


def ordinary_layer(model: nn.Module, name: str) -> Ordinary:
    """The layer ``name`` of ``model``, a module or stacked experts."""
    owner, _, leaf = name.rpartition(".")
    parent = model.get_submodule(owner)
    return stacked_linears(parent).get(leaf) or model.get_submodule(name)


def experts_forward(self: Any, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    """The forward pass of a module of experts: hidden_states [tokens, hidden], the indices and weights of each token's
    experts [tokens, k] -> [tokens, hidden].

    Equal to transformers' but for rounding: where nothing nonlinear comes after the down projection, the weights of the
    router multiply its input, so that its output, k times the size of hidden_states, need not be kept.
    """
    routing = Routing.of(top_k_index, self.num_experts)
    weights = top_k_weights.reshape(-1)[routing.order]
    up, down = _leaves(self)
    inner = _product(self, up, hidden_states, routing, spread=True)
    if self.has_bias:
        inner = inner + getattr(self, f"{up}_bias")[routing.expert]
    activate = self._apply_gate if self.has_gate else self.act_fn
    if self.has_post_expert_norm:
        result = _product(self, down, activate(inner), routing, spread=False)
        if self.has_bias:
            result = result + self.down_proj_bias[routing.expert]
        result = routing.sum_of_pairs(self.post_expert_norm(result) * weights[:, None])
    else:
        weighted = _Recomputed.apply(inner, weights, activate) if self._lean["recompute"] else None
        weighted = activate(inner) * weights[:, None] if weighted is None else weighted
        result = routing.sum_of_pairs(_product(self, down, weighted.to(inner.dtype), routing, spread=False))
        if self.has_bias:
            of_experts = top_k_weights.new_zeros(len(top_k_weights), self.num_experts)
            of_experts = of_experts.scatter_add(1, top_k_index, top_k_weights)
            result = result + of_experts.to(result.dtype) @ self.down_proj_bias.to(result.dtype)
    return result.to(hidden_states.dtype)


def _product(owner: Any, leaf: str, x: Tensor, routing: Routing, spread: bool) -> Tensor:
    experts = getattr(owner, leaf)
    if isinstance(experts, nn.Module):
        return experts(x, routing, spread)  # type: ignore[no-any-return]
    return dense_experts(x, experts.mT if owner.is_transposed else experts, routing, spread)


class _Recomputed(torch.autograd.Function):
    """activate(inner) * weights, keeping inner [S, n] and weights [S] alone, not what the activation would."""

    @staticmethod
    def forward(ctx: Any, inner: Tensor, weights: Tensor, activate: Any) -> Tensor:  # type: ignore[override]
        ctx.save_for_backward(inner, weights)
        ctx.activate = activate
        return activate(inner) * weights[:, None]  # type: ignore[no-any-return]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        inner, weights = ctx.saved_tensors
        with torch.enable_grad():
            leaf = inner.detach().requires_grad_()
            active = ctx.activate(leaf)
        d_weights = (grad * active.detach()).sum(-1).to(weights.dtype) if ctx.needs_input_grad[1] else None
        d_inner = torch.autograd.grad(active, leaf, (grad * weights[:, None]).to(active.dtype))[0]
        return d_inner, d_weights, None


def name_the_parameter(owner: nn.Module, state_dict: Any, prefix: str, *_: Any) -> None:
    """Before ``owner`` loads: the weight of experts has the name of a parameter of ``owner`` in a state dict, and that
    of a module's weight here. Has the signature of a pre-hook of ``load_state_dict``."""
    for leaf in _leaves(owner):
        if leaf in owner._modules and prefix + leaf in state_dict:
            state_dict[f"{prefix}{leaf}.weight"] = state_dict.pop(prefix + leaf)
