"""How a subspace is drawn, what P does, and the state of the current subspace."""

from rso_ds.subspace.projection import (
    add_lifted_,
    coordinate_columns,
    dense_projection,
    is_coordinates,
    lift,
    overlap,
    project,
)
from rso_ds.subspace.samplers import projection_seed, sample_projection
from rso_ds.subspace.subspace import Subspace

__all__ = [
    "Subspace",
    "add_lifted_",
    "coordinate_columns",
    "dense_projection",
    "is_coordinates",
    "lift",
    "overlap",
    "project",
    "projection_seed",
    "sample_projection",
]
