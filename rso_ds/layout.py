"""What the package asks of an engine: where W, B and the solver state lie on this rank.

Engines implement ``Layout`` (``rso_ds.engines``); boundary, optimizers, checkpoints and logs work with nothing else
of them. A parameter is ``Any`` here: a torch parameter, one with the attributes of ZeRO-3, or one whose data is a
DTensor.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from rso_ds.layers.base import SubspaceLayer
from rso_ds.weights.masters import WeightMasters
from rso_ds.weights.outer_momentum import OuterMomentum
from rso_ds.weights.rounding import Rounding


@dataclass
class SolverShard:
    """The solver state of one parameter (a B, for the boundary) that this rank owns.

    It covers the elements [start, stop) of the flattened parameter. ``first`` and ``second`` are flat views
    of that length into the solver's own tensors (None where the solver keeps none); ``masters`` are the flat
    fp32 copies that the solver updates, if the parameter itself is in low precision or partitioned.
    """

    start: int
    stop: int
    first: Tensor | None
    second: Tensor | None
    masters: list[Tensor] = field(default_factory=list)


class Layout(Protocol):
    """What an engine says about one rank. All ranks make the same calls in the same order."""

    device: torch.device  # where merges are computed and collectives run
    solver: torch.optim.Optimizer  # the one that steps on B and on what trains densely
    replica: int  # index among those that step apart
    replicas: int  # above 1 where ranks take their steps apart (``communicate: "boundary"``)
    weight_masters: WeightMasters | None  # fp32 copies of low-precision W, with ``master_weights``
    outer: OuterMomentum | None  # momentum of merged updates, with ``outer_momentum``
    merge_sends_weights: bool  # whether ``merge`` exchanges rows of W between ranks
    merge_sends: str  # what it sends, or makes ranks send later, and whereto, in words; empty if nothing

    # -- the optimizer asks, at every step -----------------------------------------------------------

    def step_apart(self, dense: Sequence[nn.Parameter], momentum: float) -> None:
        """Prepare for local steps; ``dense``: the parameters that train densely."""

    def begin_step(self) -> None:
        """Called before the solver's step: drop gathered copies that would not see it."""

    def finite(self, params: Iterable[Any]) -> bool:
        """Whether the gradients of a step are finite, equally answered by all ranks that step together."""

    # -- the boundary asks ---------------------------------------------------------------------------

    def begin(self) -> None:
        """Called before anything changes: drop gathered copies that would go stale."""

    def end(self) -> None:
        """Called after everything changed: restore what ``begin`` dropped."""

    def average(self) -> None:
        """Replace B and every densely trained parameter by its mean over the ranks that stepped apart."""

    def merge(self, name: str, layer: SubspaceLayer, P: Tensor, decay: float, rounding: Rounding) -> None:
        """W <- decay * W + B P^T on every copy of W that this rank holds; P [in, r] or coordinates [r]."""

    def zero(self, layer: SubspaceLayer) -> None:
        """B <- 0 in the model's own copies (the boundary zeroes the masters)."""

    def solver_part(self, param: Any) -> SolverShard:
        """This rank's part of the solver's state of ``param``; checkpoints ask this too."""

    def restart_step(self) -> None:
        """Set the solver's step count of all B to zero."""

    # -- for rows of B that are cut between ranks ----------------------------------------------------

    def shard_boundaries(self, layer: SubspaceLayer) -> list[int]:
        """Element indices of B.flatten() at which ownership passes from one rank to another."""

    def sum_over_ranks(self, tensor: Tensor) -> None:
        """In-place sum over the ranks that share the solver state; nothing to do on one rank."""

    # -- for the comparison of replicas --------------------------------------------------------------

    def replicated(self, dense: Mapping[str, Any]) -> list[tuple[str, Tensor]]:
        """(name, this rank's part) of everything of which several ranks hold copies that must be equal: W, the
        ``dense`` parameters (name -> parameter), moments."""

    def whole(self, checksums: Tensor) -> Tensor:
        """int64 checksums [n] of this rank's part of each of ``replicated`` -> [n] of the whole tensors."""

    def extremes_over_ranks(self, values: Tensor) -> tuple[Tensor, Tensor]:
        """(minimum, maximum) of an int64 vector over all data-parallel ranks."""

    # -- checkpoints and logs ask --------------------------------------------------------------------

    def model_part(self, param: Any) -> tuple[int, Tensor]:
        """(index of the first element, flat memory in the parameter's dtype) of what this rank holds of ``param``
        itself."""

    def solver_key(self, param: Any) -> Any:
        """The tensor under which the solver keeps the state of ``param``; None if it does not train it."""

    def prepare_solver(self, param: Any) -> None:
        """Allocate the solver's state of ``param`` if no step has yet."""

    def solver_step(self, param: Any) -> int | None:
        """The solver's step count of ``param``; None if it keeps none."""

    def set_solver_step(self, param: Any, step: int) -> None:
        """Set that count, where there is one."""

    def keeps(self) -> list[str]:
        """Names of what this configuration keeps beside W: "masters" (fp32 copies of W), "outer_momentum"."""

    def holds(self) -> list[str]:
        """What of ``keeps`` there is by now: masters are made at the first boundary."""

    def kept_rows(self, what: str, weight: Any) -> tuple[int, Tensor]:
        """(first element, flat fp32 memory) of what this rank keeps beside W, made from W if need be; ``what`` is one
        of ``keeps``."""

    def forget_masters(self) -> None:
        """Before a load: masters that the checkpoint does not bring start from its W."""

    def reloaded(self) -> None:
        """Called after a checkpoint has filled the memory that the methods above have shown."""
