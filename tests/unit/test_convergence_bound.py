"""The theorem on problems whose constants are known: least squares and multinomial logistic regression, in float64.

docs/algorithm.md: with Haar P, eta = 1/(2 L^) and L^ = (in/r) L, K intervals whose subproblems are left eps above their
minimum on average give
mean ||grad f(W_k)||^2 <= 6 L^ (f(W_0) - f*) / K + 6 L^ eps.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from support.exhaustive import quick
from torch import Tensor, nn

import rso_ds

SAMPLES, IN, OUT, RANK = 96, 24, 6, 6
INTERVALS, SEEDS = 120, 3


class Problem:
    """f(W) of a linear model of W [OUT, IN], its smoothness constant and its minimum."""

    def __init__(self, kind: str) -> None:
        generator = torch.Generator().manual_seed(0)
        self.x = torch.randn(SAMPLES, IN, generator=generator, dtype=torch.float64)
        truth = torch.randn(OUT, IN, generator=generator, dtype=torch.float64)
        noise = 0.5 * torch.randn(SAMPLES, OUT, generator=generator, dtype=torch.float64)
        targets = self.x @ truth.T / IN**0.5 + noise
        spectral = torch.linalg.eigvalsh(self.x.T @ self.x / SAMPLES)[-1].item()
        if kind == "quadratic":
            self.loss: Callable[[Tensor], Tensor] = lambda y: 0.5 * (y - targets).square().sum() / SAMPLES
            self.smoothness = spectral
        else:  # the Hessian of the softmax is at most 1/2
            labels = targets.argmax(dim=1)
            self.loss = lambda y: nn.functional.cross_entropy(y, labels)
            self.smoothness = spectral / 2
        self.minimum = minimum(self.f, torch.zeros(OUT, IN, dtype=torch.float64))

    def f(self, weight: Tensor) -> Tensor:
        return self.loss(self.x @ weight.T)

    def gradient_square(self, weight: Tensor) -> float:
        w = weight.clone().requires_grad_()
        return torch.autograd.grad(self.f(w), w)[0].square().sum().item()


def minimum(objective: Callable[[Tensor], Tensor], start: Tensor) -> float:
    """Of a convex function, by L-BFGS to the last digits."""
    point = start.clone().requires_grad_()
    solver = torch.optim.LBFGS(
        [point], max_iter=3000, tolerance_grad=1e-11, tolerance_change=0, line_search_fn="strong_wolfe"
    )

    def closure() -> Tensor:
        solver.zero_grad()
        value = objective(point)
        value.backward()
        return value

    solver.step(closure)
    return objective(point).item()


def intervals(problem: Problem, steps: int, seed: int) -> list[tuple[float, float, float]]:
    """RSO with gradient descent as the solver. For each interval: ||grad f(W_k)||^2, how far from its minimum the
    subproblem was left, and f(W_k) - f(W_{k+1})."""
    smooth = problem.smoothness * IN / RANK
    model = nn.Sequential(nn.Linear(IN, OUT, bias=False)).double()
    nn.init.zeros_(model[0].weight)
    config = rso_ds.RSOConfig(
        solver="sgd", momentum=0.0, lr=1 / (3 * smooth), proximal=2 * smooth, rank=RANK, interval=steps,
        sampler="haar", carry_over="reset", targets="all-linear", seed=seed, lean="none",
    )  # fmt: skip
    rso_ds.convert(model, config)
    optimizer = rso_ds.RSO(model, config)
    layer = model[0]
    found = []
    for _ in range(INTERVALS):
        before, projection = layer.weight.detach().clone(), layer.subspace.P.detach().clone()
        for _ in range(steps):
            problem.loss(model(problem.x)).backward()
            optimizer.step()
            optimizer.zero_grad()
        after = layer.weight.detach()
        solution = (after - before) @ projection * RANK / IN  # B, since P^T P = (in/r) I

        def subproblem(b: Tensor, w: Tensor = before, p: Tensor = projection) -> Tensor:
            return problem.f(w + b @ p.T) + smooth * b.square().sum()

        left = subproblem(solution).item() - minimum(subproblem, solution)
        found.append((problem.gradient_square(before), left, (problem.f(before) - problem.f(after)).item()))
    return found


@pytest.mark.parametrize("kind", ["quadratic", "logistic"])
@pytest.mark.parametrize("steps", quick([1, 3, 60], {1, 3}))
def test_the_bound_holds(kind, steps):
    problem = Problem(kind)
    smooth = problem.smoothness * IN / RANK
    runs = [intervals(problem, steps, seed) for seed in range(SEEDS)]
    gradients, left, falls = (sum(x[i] for run in runs for x in run) / (SEEDS * INTERVALS) for i in range(3))
    start = problem.f(torch.zeros(OUT, IN, dtype=torch.float64)).item()
    bound = 6 * smooth * ((start - problem.minimum) / INTERVALS + left)
    assert 0 < gradients <= bound
    if steps == 60:
        assert left < 1e-9
        assert bound < runs[0][0][0], "a bound above the first gradient would say nothing"
    # What it rests on: an interval lowers f by ||grad f||^2 / (6 L^) - eps on average.
    assert falls >= gradients / (6 * smooth) - left


@pytest.mark.parametrize("kind", ["quadratic", "logistic"])
def test_the_constants_are_those_of_the_problem(kind):
    """L bounds the curvature that is met, within a factor of ten; the minimum has no gradient."""
    problem = Problem(kind)
    torch.manual_seed(1)
    w, d = torch.randn(2, OUT, IN, dtype=torch.float64)
    curvature = []
    for _ in range(50):  # power iteration on the Hessian at 0
        d = d / d.norm()
        d = torch.func.jvp(torch.func.grad(problem.f), (0 * w,), (d,))[1]
        curvature.append(d.norm().item())
    assert problem.smoothness / 10 < curvature[-1] <= problem.smoothness * (1 + 1e-9)
    assert problem.minimum < problem.f(w).item()
