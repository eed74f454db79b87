"""What becomes of the solver state of B when the subspace changes.

The moments of B describe the gradient G P_old, where G [out, in] is the gradient of W; the next
subspace sees G P_new. Every rule works on whole rows: ``first`` and ``second`` are [rows, r], changed
in place; ``second`` is None for solvers without one. See ``docs/algorithm.md`` for the evidence.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from rso_ds.subspace import overlap

Rule = Callable[[Tensor, Tensor | None, Tensor | None], None]


def _reset(first: Tensor, second: Tensor | None, rotation: Tensor | None) -> None:
    """Forget everything (the paper: a new subproblem starts from nothing)."""
    first.zero_()
    if second is not None:
        second.zero_()


def _keep_second(first: Tensor, second: Tensor | None, rotation: Tensor | None) -> None:
    """Forget the direction, keep the scale of every entry."""
    first.zero_()


def _row_mean_second(first: Tensor, second: Tensor | None, rotation: Tensor | None) -> None:
    """Forget the direction, keep only what does not depend on the basis: the mean scale of each row."""
    first.zero_()
    if second is not None:
        second.copy_(second.mean(dim=1, keepdim=True).expand_as(second))


def _project(first: Tensor, second: Tensor | None, rotation: Tensor | None) -> None:
    """Express the first moment in the new basis, keep the second."""
    assert rotation is not None
    first.copy_(first @ rotation)


@dataclass(frozen=True)
class CarryOver:
    """A rule with what the boundary must prepare for it."""

    rule: Rule
    restarts_step: bool = False  # Adam's bias correction starts anew
    needs_whole_rows: bool = False
    needs_rotation: bool = False


CARRY_OVER: dict[str, CarryOver] = {
    "reset": CarryOver(_reset, restarts_step=True),
    "keep_second": CarryOver(_keep_second),
    "row_mean_second": CarryOver(_row_mean_second, needs_whole_rows=True),
    "project": CarryOver(_project, needs_whole_rows=True, needs_rotation=True),
}


def rotation(P_old: Tensor, P_new: Tensor, in_features: int) -> Tensor:
    """[r, r] matrix (r/in) P_old^T P_new that takes a moment from the old basis to the new one.

    With P = sqrt(in/r) Q it equals Q_old^T Q_new: the moment is lifted to W's space by the orthogonal
    projection, not by the unbiased but r/in times longer P P^T, so that no norm grows.
    """
    return overlap(P_old, P_new, in_features)
