"""Rules for RSO that were tried in ``convergence.py`` (study "rules"), each as short as it can be.

They work on one process and one engine, and reach into the package for it. None is an option of the package: that takes
a trial that it wins over several seeds (benchmarks/convergence/README.md).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from unittest.mock import patch

import torch
from torch import Tensor

import rso_ds
from rso_ds.layers import SubspaceLayer
from rso_ds.solvers import CarryOver
from rso_ds.solvers.groups import IS_SUBSPACE
from rso_ds.subspace import Subspace, projection_seed


class Trial:
    """``optimizer`` changed by rule ``name``.

    ``before()`` is to be called before each step, ``after(step)`` with the number of steps taken; ``scale(step)``
    multiplies the learning rate of every B in step ``step`` (from 0), besides the schedule. ``part`` and ``mu`` are of
    the rules that name them.
    """

    def __init__(
        self,
        name: str,
        optimizer: rso_ds.RSO,
        config: rso_ds.RSOConfig,
        steps: int,
        part: float = 0.5,
        mu: float = 0.9,
    ) -> None:
        self.optimizer, self.config, self.steps, self.part, self.mu = optimizer, config, steps, part, mu
        self.before: Callable[[], None] = lambda: None
        self.after: Callable[[int], None] | None = None
        self.scale: Callable[[int], float] = lambda step: 1.0
        getattr(self, "_" + name)()

    def _rotate_row_mean(self) -> None:
        """First moment in the new basis, second moment averaged over the row."""

        def rule(first: Tensor, second: Tensor | None, rotation: Tensor | None) -> None:
            assert second is not None
            assert rotation is not None
            first.copy_(first @ rotation)
            second.copy_(second.mean(dim=1, keepdim=True).expand_as(second))

        self.optimizer.boundary._carry_over = CarryOver(rule, needs_whole_rows=True, needs_rotation=True)

    def _row_second(self) -> None:
        """One second moment for each row of B: half of the solver's state."""

        def after(step: int) -> None:
            for group in self.optimizer.param_groups:
                for p in group["params"] if group[IS_SUBSPACE] else ():
                    second = self.optimizer.state[p]["exp_avg_sq"]
                    second.copy_(second.mean(dim=1, keepdim=True).expand_as(second))

        self.after = after

    def _full_first_step(self) -> None:
        """The first moment's bias correction begins anew with each subspace, the second's goes on."""
        beta1, interval = self.config.betas[0], self.config.interval
        self.scale = lambda step: 1.0 / (1.0 - beta1 ** (step % interval + 1))

    def _inner_warm_up(self) -> None:
        """The learning rate rises over the first fifth of each subspace, besides what beta1 does."""
        rise = max(2, self.config.interval // 5)
        self.scale = lambda step: min(1.0, (step % self.config.interval + 1) / rise)

    def _growing_interval(self) -> None:
        """Half the interval in the first half of the run, twice the interval in the second."""
        first, boundary = self.config.interval // 2, self.optimizer.boundary
        later = self.config.interval * 2

        def set_interval(step: int) -> None:
            object.__setattr__(boundary.config, "interval", first if step < self.steps // 2 else later)

        set_interval(0)
        self.after = set_interval

    def _sweep(self) -> None:
        """In/r subspaces in turn are the parts of one random orthogonal matrix (or permutation): each direction is
        trained once before any is trained again. Every single draw has the distribution it had."""
        for subspace in self.optimizer.boundary.subspaces:
            self._replace(subspace, lambda draw, s=subspace: swept(s, draw))

    def _principal(self) -> None:
        """Half of P spans the inputs' main directions inside the last subspace, the rest is random and orthogonal to
        them (as in PRAC): P = [Q1, sqrt((in - r1) / (r - r1)) Q2], so that E[P P^T] = I given Q1."""
        for subspace, seen in self._watch("of z").items():
            self._replace(subspace, lambda draw, s=subspace, seen=seen: partly_random(s, draw, _lifted(s, seen)))

    def _main_directions(self) -> None:
        """As ``principal``, from the inputs' exact covariance [in, in], which no one would keep: what better statistics
        could give. ``part`` of P spans its main directions."""
        for subspace, seen in self._watch("covariance").items():
            self._replace(
                subspace,
                lambda draw, s=subspace, seen=seen: partly_random(s, draw, self._main(seen.get("covariance"), s.rank)),
            )

    def _main(self, covariance: Tensor | None, rank: int) -> Tensor | None:
        if covariance is None:
            return None
        return torch.linalg.eigh(covariance).eigenvectors[:, -round(self.part * rank) :]

    def _polar(self) -> None:
        """Muon in the subspace: B moves along the polar factor U = M (M^T M)^(-1/2) of its momentum, which begins anew
        with each subspace; the root mean square of U P^T's entries, times the
        scale, is 0.2, as that of AdamW's steps about is."""
        momentum: dict[str, Tensor] = {}

        @torch.no_grad()
        def before() -> None:
            rates = {id(p): group["lr"] for group in self.optimizer.param_groups for p in group["params"]}
            if self.optimizer.boundary.applied_steps % self.config.interval == 0:
                momentum.clear()
            for name, layer in self.optimizer.boundary.layers.items():
                gradient, layer.B.grad = layer.B.grad, None
                assert gradient is not None
                m = momentum.setdefault(name, torch.zeros_like(gradient)).mul_(self.mu).add_(gradient)
                m = gradient + self.mu * m
                values, vectors = torch.linalg.eigh(m.t() @ m)
                inverse_root = vectors * values.clamp_min(1e-8 * values[-1] + 1e-30).rsqrt() @ vectors.t()
                layer.B.sub_(m @ inverse_root, alpha=rates[id(layer.B)] * 0.2 * layer.out_features**0.5)

        self.before = before

    def _important(self) -> None:
        """Coordinates are drawn without replacement with odds in proportion to the size of their inputs."""
        for subspace, statistics in self._watch("energy").items():

            def sample(draw: int, s: Subspace = subspace, seen: dict[str, Tensor] = statistics) -> Tensor:
                generator = torch.Generator().manual_seed(projection_seed(s.seed, s.name, draw))
                noise = -torch.log(-torch.log(torch.rand(s.in_features, generator=generator)))
                odds = 0.5 * torch.log(seen["energy"] + 1e-12) if "energy" in seen else torch.zeros(s.in_features)
                return torch.topk(odds + noise, s.rank).indices

            self._replace(subspace, sample)

    def _watch(self, what: str) -> dict[Subspace, dict[str, Tensor]]:
        """Of the inputs of one layer of each subspace: the last ones' "energy", mean x^2 [in], or covariance "of z"
        [r, r], or their running "covariance" [in, in]."""
        found: dict[Subspace, dict[str, Tensor]] = {}
        for layer in self.optimizer.boundary.layers.values():
            if layer.subspace in found:
                continue
            found[layer.subspace] = {}

            def look(module: SubspaceLayer, args: tuple[Tensor, ...]) -> None:
                if not module.training:
                    return
                seen, x = found[module.subspace], args[0].detach().flatten(0, -2)
                if what == "energy":
                    seen[what] = x.square().mean(dim=0)
                elif what == "of z":
                    z = x @ module.projection()
                    seen[what] = z.t() @ z
                else:
                    seen[what] = 0.9 * seen.get(what, torch.zeros(())) + x.t() @ x

            layer.register_forward_pre_hook(look)
        return found

    def _replace(self, subspace: Subspace, sample: Callable[[int], Tensor]) -> None:
        subspace.sample = lambda draw, device, dtype: sample(draw)  # type: ignore[method-assign]
        subspace.move_to(0)


def swept(subspace: Subspace, draw: int) -> Tensor:
    """P of ``draw``: [in, r] in fp32, or coordinates, int64 [r]. The last of a sweep overlaps the one before it where
    r does not divide in."""
    parts = -(-subspace.in_features // subspace.rank)
    generator = torch.Generator().manual_seed(projection_seed(subspace.seed, subspace.name, draw // parts))
    start = min(draw % parts * subspace.rank, subspace.in_features - subspace.rank)
    mine = slice(start, start + subspace.rank)
    if subspace.sampler == "coordinate":
        return torch.randperm(subspace.in_features, generator=generator)[mine].clone()
    q, r = torch.linalg.qr(torch.randn(subspace.in_features, subspace.in_features, generator=generator))
    q = q * torch.where(torch.diagonal(r) < 0, -1.0, 1.0)
    return q[:, mine] * (subspace.in_features / subspace.rank) ** 0.5


def partly_random(subspace: Subspace, draw: int, main: Tensor | None) -> Tensor:
    """P of ``draw`` [in, r] = [main, k Q], orthogonal columns, Q random, k such that E[P P^T] = I given ``main``
    [in, r1]; all of it random if that is None."""
    generator = torch.Generator().manual_seed(projection_seed(subspace.seed, subspace.name, draw))
    size, rank = subspace.in_features, subspace.rank
    columns = torch.randn(size, rank, generator=generator)
    count = 0 if main is None else main.shape[1]
    if main is not None:
        columns[:, :count] = main
    q, _ = torch.linalg.qr(columns)
    q[:, count:] *= ((size - count) / (rank - count)) ** 0.5
    return q


def _lifted(subspace: Subspace, seen: dict[str, Tensor]) -> Tensor | None:
    """[in, r/2]: the main directions of the last inputs inside the last subspace."""
    if "of z" not in seen or subspace.P is None:
        return None
    return subspace.P @ torch.linalg.eigh(seen["of z"]).eigenvectors[:, -(subspace.rank // 2) :]


@contextmanager
def rank_of_input() -> Iterator[None]:
    """``rank_ratio`` is that of a layer's input size, and not of its smaller side."""

    def rank(members: list[str], shapes: dict[str, tuple[int, int]], config: rso_ds.RSOConfig) -> int:
        assert config.rank_ratio is not None
        return int(config.rank_ratio * shapes[members[0]][1])

    with patch("rso_ds.layers.convert._rank", rank):
        yield


def subspace_groups(optimizer: rso_ds.RSO) -> list[bool]:
    """For every group of the optimizer, whether it holds B."""
    return [bool(group[IS_SUBSPACE]) for group in optimizer.param_groups]
