"""Solvers of the subproblem and what becomes of their state at a boundary."""

from rso_ds.solvers.carry_over import CARRY_OVER, CarryOver, rotation

__all__ = ["CARRY_OVER", "CarryOver", "rotation"]
