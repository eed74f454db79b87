"""Rules for RSO that were tried in ``benchmarks/convergence.py`` (study "rules"), each as short as it can be.

They work on one process and one engine, and reach into the package for it. None is an option of the package: that takes
a trial that it wins over several seeds (docs/convergence.md).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

import rso_ds
from rso_ds.layers import SubspaceLayer
from rso_ds.optim import CarryOver
from rso_ds.optim.groups import IS_SUBSPACE
from rso_ds.subspace import Subspace, projection_seed


class Trial:
    """``optimizer`` changed by rule ``name``.

    ``after(step)`` is to be called with the number of steps taken, ``scale(step)`` multiplies the learning rate of
    every B in step ``step`` (from 0), besides the schedule.
    """

    def __init__(self, name: str, optimizer: rso_ds.RSO, config: rso_ds.RSOConfig, steps: int) -> None:
        self.optimizer, self.config, self.steps = optimizer, config, steps
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
        self._watch_inputs(_principal_and_random)

    def _important(self) -> None:
        """Coordinates are drawn without replacement with odds in proportion to the size of their inputs."""
        for subspace, statistics in self._watch(energy=True).items():

            def sample(draw: int, s: Subspace = subspace, seen: dict[str, Tensor] = statistics) -> Tensor:
                generator = torch.Generator().manual_seed(projection_seed(s.seed, s.name, draw))
                noise = -torch.log(-torch.log(torch.rand(s.in_features, generator=generator)))
                odds = 0.5 * torch.log(seen["energy"] + 1e-12) if "energy" in seen else torch.zeros(s.in_features)
                return torch.topk(odds + noise, s.rank).indices

            self._replace(subspace, sample)

    def _watch_inputs(self, make: Callable[[Subspace, int, Tensor | None], Tensor]) -> None:
        for subspace, seen in self._watch(energy=False).items():
            self._replace(subspace, lambda draw, s=subspace, seen=seen: make(s, draw, seen.get("covariance")))

    def _watch(self, energy: bool) -> dict[Subspace, dict[str, Tensor]]:
        """Statistics of the last inputs of one layer of each subspace: mean x^2 [in], or the covariance of z [r, r]."""
        found: dict[Subspace, dict[str, Tensor]] = {}
        for layer in self.optimizer.boundary.layers.values():
            if layer.subspace in found:
                continue
            found[layer.subspace] = {}

            def look(module: SubspaceLayer, args: tuple[Tensor, ...]) -> None:
                x = args[0].detach().flatten(0, -2)
                if energy:
                    found[module.subspace]["energy"] = x.square().mean(dim=0)
                else:
                    z = x @ module.projection()
                    found[module.subspace]["covariance"] = z.t() @ z

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


def _principal_and_random(subspace: Subspace, draw: int, covariance: Tensor | None) -> Tensor:
    """P of ``draw`` [in, r]; ``covariance``: of z under the P before [r, r], None at first: then all of P is random."""
    generator = torch.Generator().manual_seed(projection_seed(subspace.seed, subspace.name, draw))
    size, rank = subspace.in_features, subspace.rank
    main = rank // 2 if covariance is not None and subspace.P is not None else 0
    columns = torch.randn(size, rank, generator=generator)
    if main:
        assert covariance is not None
        assert subspace.P is not None
        columns[:, :main] = subspace.P @ torch.linalg.eigh(covariance).eigenvectors[:, -main:]
    q, _ = torch.linalg.qr(columns)
    q[:, main:] *= ((size - main) / (rank - main)) ** 0.5
    return q


def subspace_groups(optimizer: rso_ds.RSO) -> list[bool]:
    """For every group of the optimizer, whether it holds B."""
    return [bool(group[IS_SUBSPACE]) for group in optimizer.param_groups]
