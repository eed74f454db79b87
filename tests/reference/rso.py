"""The oracle: RSO as the paper writes it, slow and obvious, in float64, in one process.

It shares with the package only the sampler (whose statistics are tested on their own). Every layer is a
dense weight W + B P^T seen by ordinary autograd; the solver, clipping, accumulation and boundary are
written out by hand on whole tensors.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.func import functional_call

from rso_ds.subspace import dense_projection, sample_projection


@dataclass
class Settings:
    """``groups``: group name -> names of the layers that share its P. The weight of a layer [out, in] is
    ``layer.weight`` in the model, or the parameter ``layer`` itself: stacked experts [E, out, in] with one P."""

    groups: dict[str, list[str]]
    rank: int
    interval: int = 3
    sampler: str = "haar"
    carry_over: str = "row_mean_second"
    solver: str = "adamw"
    lr: float = 1e-3
    dense_lr: float | None = None
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-6
    momentum: float = 0.9
    weight_decay: float = 0.0
    proximal: float = 0.0
    seed: int = 0
    clip: float = 0.0
    form: str = (
        "two_path"  # "folded": W <- decay * W + B P^T and B <- 0 after every step, so that decay meets B P^T too
    )
    transposed: bool | Collection[str] = False  # weights stored [in, out], as GPT-2's Conv1D: all, or of these layers


@dataclass
class Moments:
    step: int = 0
    m: Tensor | float = 0.0
    v: Tensor | float = 0.0


@dataclass
class Result:
    """``gradient_norms``: of all B, as the solver gets them, at each step; ``merge_ratios``: ||B P^T|| / ||W|| over all
    layers, at each boundary."""

    losses: list[float] = field(default_factory=list)
    gradient_norms: list[float] = field(default_factory=list)
    merge_ratios: list[float] = field(default_factory=list)
    weights: dict[str, Tensor] = field(default_factory=dict)


def train(
    model: nn.Module,
    s: Settings,
    loss_of: Callable[[Callable[..., object], object], Tensor],
    batches: Sequence[Sequence[object]],
    lr_scale: Sequence[float] | None = None,
) -> Result:
    """Train a dense float64 ``model`` on ``batches[step][micro]``; returns losses and final dense weights.

    ``loss_of(forward, micro_batch)`` computes a loss with ``forward`` in place of ``model``. The loss of a
    step is the mean over its micro batches. ``lr_scale[step]`` multiplies both learning rates.
    """
    group_of = {layer: g for g, layers in s.groups.items() for layer in layers}
    parameters = {n: p for n, p in model.named_parameters() if p.requires_grad}  # what is frozen stays in the model
    stored = {layer: layer if layer in parameters else f"{layer}.weight" for layer in group_of}

    def turned(layer: str, w: Tensor) -> Tensor:
        return w.mT if (s.transposed if isinstance(s.transposed, bool) else layer in s.transposed) else w

    W = {layer: turned(layer, model.get_parameter(name).detach().clone()) for layer, name in stored.items()}
    dense = {n: p.detach().clone() for n, p in parameters.items() if n not in stored.values()}
    B = {layer: torch.zeros(*w.shape[:-1], s.rank, dtype=torch.float64) for layer, w in W.items()}
    state = {("B", n): Moments() for n in B} | {("dense", n): Moments() for n in dense}
    decay = 1.0
    draw = 0

    def projections(k: int) -> dict[str, Tensor]:
        P = {}
        for layer, g in group_of.items():
            in_features = W[layer].shape[-1]
            P[layer] = sample_projection(s.sampler, s.seed, g, k, in_features, s.rank)
            P[layer] = dense_projection(P[layer], in_features).double()
        return P

    P = projections(draw)
    result = Result()
    for step, micro_batches in enumerate(batches):
        scale = 1.0 if lr_scale is None else lr_scale[step]
        leaves = {("B", n): b.clone().requires_grad_() for n, b in B.items()}
        leaves |= {("dense", n): d.clone().requires_grad_() for n, d in dense.items()}

        def forward(*args, leaves=leaves, W=W, P=P, **kwargs):
            params = {n: leaves["dense", n] for n in dense}
            for layer in B:
                params[stored[layer]] = turned(layer, W[layer] + leaves["B", layer] @ P[layer].t())
            return functional_call(model, params, args, kwargs)

        loss = sum(loss_of(forward, mb) for mb in micro_batches) / len(micro_batches)
        grads = dict(zip(leaves, _gradients(loss, list(leaves.values())), strict=True))
        grads = {key: g for key, g in grads.items() if g is not None}
        result.losses.append(loss.item())
        if s.clip:
            norm = torch.sqrt(sum((g**2).sum() for g in grads.values()))
            grads = {k: g * min(1.0, s.clip / (norm.item() + 1e-6)) for k, g in grads.items()}
        squares = 0.0
        for key, g in grads.items():
            kind, name = key
            value = B[name] if kind == "B" else dense[name]
            lr = scale * (s.lr if kind == "B" or s.dense_lr is None else s.dense_lr)
            wd = 0.0 if kind == "B" else s.weight_decay
            if kind == "B":
                g = g + s.proximal * value
                squares += (g**2).sum().item()
            new = _solve(s, state[key], value, g, lr, wd)
            (B if kind == "B" else dense)[name] = new
        result.gradient_norms.append(squares**0.5)
        decay *= 1 - scale * s.lr * s.weight_decay
        if s.form == "folded" and (step + 1) % s.interval:
            for layer in B:
                W[layer] = decay * W[layer] + B[layer] @ P[layer].t()
                B[layer] = torch.zeros_like(B[layer])
            decay = 1.0
        if (step + 1) % s.interval == 0:
            P_next = projections(draw + 1)
            merged = sum(((B[n] @ P[n].t()) ** 2).sum().item() for n in B)
            result.merge_ratios.append((merged / sum((W[n] ** 2).sum().item() for n in B)) ** 0.5)
            for layer in B:
                W[layer] = decay * W[layer] + B[layer] @ P[layer].t()
                B[layer] = torch.zeros_like(B[layer])
                _carry(s, state["B", layer], P[layer], P_next[layer])
            P, draw, decay = P_next, draw + 1, 1.0
    for layer in B:
        result.weights[stored[layer]] = turned(layer, W[layer] + B[layer] @ P[layer].t())
    result.weights |= dense
    return result


def _gradients(loss: Tensor, leaves: list[Tensor]) -> tuple[Tensor | None, ...]:
    # None for what this loss does not depend on, which takes no step: a mask token, an expert without tokens.
    return torch.autograd.grad(loss, leaves, allow_unused=True)


def _solve(s: Settings, st: Moments, value: Tensor, g: Tensor, lr: float, wd: float) -> Tensor:
    st.step += 1
    if s.solver == "sgd":
        st.m = s.momentum * st.m + g + wd * value
        return value - lr * st.m
    if s.solver == "adam":
        g = g + wd * value
    else:
        value = value * (1 - lr * wd)
    b1, b2 = s.betas
    st.m = b1 * st.m + (1 - b1) * g
    st.v = b2 * st.v + (1 - b2) * g * g
    m_hat = st.m / (1 - b1**st.step)
    v_hat = st.v / (1 - b2**st.step)
    return value - lr * m_hat / (torch.sqrt(v_hat) + s.eps)


def _carry(s: Settings, st: Moments, P_old: Tensor, P_new: Tensor) -> None:
    in_features, r = P_old.shape
    if not st.step:
        return
    if s.carry_over == "reset":
        st.m, st.v, st.step = st.m * 0, st.v * 0, 0
    elif s.carry_over == "keep_second":
        st.m = st.m * 0
    elif s.carry_over == "row_mean_second":
        st.m = st.m * 0
        st.v = st.v.mean(dim=-1, keepdim=True).expand_as(st.v).clone()
    elif s.carry_over == "project":
        # Q_old^T Q_new where P = sqrt(in / r) Q
        st.m = st.m @ (P_old.t() @ P_new) * (r / in_features)
    else:
        raise ValueError(s.carry_over)
