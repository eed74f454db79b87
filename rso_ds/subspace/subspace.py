"""The current subspace of the layers that share one P."""

from __future__ import annotations

import torch
from torch import Tensor

from rso_ds.subspace.samplers import sample_projection


class Subspace:
    """One P [in_features, rank], shared by some layers, and the index of its draw.

    P is neither a Parameter nor a buffer: engines broadcast, cast and save those, while P is remade
    from (seed, name, draw) wherever it is needed. It is made on first use, in the dtype of the weights
    it works with; the merge uses exactly the values that the forward pass used.
    """

    def __init__(self, name: str, in_features: int, rank: int, sampler: str, seed: int) -> None:
        self.name = name
        self.in_features = in_features
        self.rank = rank
        self.sampler = sampler
        self.seed = seed
        self.draw = 0
        self.P: Tensor | None = None

    def sample(self, draw: int, device: torch.device | str, dtype: torch.dtype) -> Tensor:
        """P of any draw, without changing the current one: in ``dtype`` if it is dense."""
        p = sample_projection(self.sampler, self.seed, self.name, draw, self.in_features, self.rank, device)
        return p.to(dtype) if p.is_floating_point() else p

    @torch.compiler.disable
    def _materialize(self, device: torch.device, dtype: torch.dtype) -> Tensor:
        # The first use may be an evaluation under inference_mode, whose tensors autograd refuses later.
        with torch.inference_mode(False), torch.no_grad():
            self.P = self.sample(self.draw, device, dtype)
        return self.P

    def projection(self, device: torch.device, dtype: torch.dtype) -> Tensor:
        """The current P on ``device`` in ``dtype`` (or the indices that stand for it), drawn if it is not there yet."""
        p = self.P
        if p is None or p.device != device or (p.dtype != dtype and p.is_floating_point()):
            p = self._materialize(device, dtype)
        return p

    def current(self, device: torch.device, dtype: torch.dtype) -> Tensor:
        """The P that the last forward pass used, in the dtype it used; drawn in ``dtype`` if there was none.

        An engine may compute in another dtype than the one in which it keeps W: the merge must use the
        values that the forward pass used.
        """
        return self.projection(device, self.P.dtype if self.P is not None and self.P.is_floating_point() else dtype)

    def move_to(self, draw: int, P: Tensor | None = None) -> None:
        """Make ``draw`` the current subspace; ``P`` is its projection if the caller has it already."""
        self.draw = draw
        self.P = P

    def __repr__(self) -> str:
        return (
            f"Subspace({self.name!r}, in={self.in_features}, rank={self.rank}, "
            f"sampler={self.sampler!r}, draw={self.draw})"
        )
