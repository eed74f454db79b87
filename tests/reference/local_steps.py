"""The oracle of local steps: every replica solves the subproblem on its own data, B is averaged at boundaries."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from reference.rso import Moments, Result, Settings, _carry, _solve
from torch import Tensor, nn
from torch.func import functional_call

from rso_ds.subspace import dense_projection, sample_projection


def train_apart(
    model: nn.Module,
    s: Settings,
    loss_of: Callable[[Callable[..., object], object], Tensor],
    batches: Sequence[Sequence[Sequence[object]]],
    outer_momentum: float = 0.0,
) -> Result:
    """``batches[step][replica][micro]``; a loss is the mean over replicas. The result is that of an average
    taken at the end, as a boundary would take it, if the last step is one."""
    group_of = {layer: g for g, layers in s.groups.items() for layer in layers}
    parameters = dict(model.named_parameters())
    stored = {layer: layer if layer in parameters else f"{layer}.weight" for layer in group_of}
    W = {layer: parameters[name].detach().clone() for layer, name in stored.items()}
    momentum = {layer: torch.zeros_like(w) for layer, w in W.items()}
    start = {n: p.detach().clone() for n, p in parameters.items() if n not in stored.values()}
    replicas = range(len(batches[0]))
    B = [{n: torch.zeros(*w.shape[:-1], s.rank, dtype=torch.float64) for n, w in W.items()} for _ in replicas]
    dense = [{n: p.clone() for n, p in start.items()} for _ in replicas]
    state = [{k: Moments() for k in [*W, *start]} for _ in replicas]

    def projections(draw: int) -> dict[str, Tensor]:
        return {
            layer: dense_projection(
                sample_projection(s.sampler, s.seed, g, draw, W[layer].shape[-1], s.rank), W[layer].shape[-1]
            ).double()
            for layer, g in group_of.items()
        }

    P, draw, result = projections(0), 0, Result()
    for step, by_replica in enumerate(batches):
        total = 0.0
        for r, micro_batches in enumerate(by_replica):
            b = {n: x.clone().requires_grad_() for n, x in B[r].items()}
            d = {n: x.clone().requires_grad_() for n, x in dense[r].items()}

            def forward(*args, b=b, d=d, P=P, **kwargs):
                merged = {stored[n]: W[n] + b[n] @ P[n].t() for n in b}
                return functional_call(model, {**d, **merged}, args, kwargs)

            loss = sum(loss_of(forward, m) for m in micro_batches) / len(micro_batches)
            total += loss.item() / len(by_replica)
            grads = torch.autograd.grad(loss, [*b.values(), *d.values()])
            for name, g in zip([*b, *d], grads, strict=True):
                mine = B[r] if name in b else dense[r]
                mine[name] = _solve(s, state[r][name], mine[name], g, s.lr, 0.0)
        result.losses.append(total)
        if (step + 1) % s.interval == 0:
            P_next = projections(draw + 1)
            for n in W:
                mean = sum(B[r][n] for r in replicas) / len(replicas)
                momentum[n] = outer_momentum * momentum[n] + mean @ P[n].t()
                W[n] = W[n] + momentum[n]
                for r in replicas:
                    B[r][n] = torch.zeros_like(mean)
                    _carry(s, state[r][n], P[n], P_next[n])
            for n in start:
                mean = sum(dense[r][n] for r in replicas) / len(replicas)
                for r in replicas:
                    dense[r][n] = mean.clone()
            P, draw = P_next, draw + 1
    result.weights = {stored[n]: W[n] for n in W} | dense[0]
    return result
