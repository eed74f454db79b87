"""How a subspace is drawn, what P does, and the state of the current subspace."""

from rso_ds.subspace.projection import (
    add_lifted_,
    coordinate_columns,
    dense_projection,
    is_coordinates,
    is_transform,
    lift,
    overlap,
    project,
)
from rso_ds.subspace.samplers import GENERATOR_VERSIONS, projection_seed, sample_projection, transform_cost
from rso_ds.subspace.subspace import Subspace

__all__ = [
    "GENERATOR_VERSIONS",
    "Subspace",
    "add_lifted_",
    "coordinate_columns",
    "dense_projection",
    "is_coordinates",
    "is_transform",
    "lift",
    "overlap",
    "project",
    "projection_seed",
    "sample_projection",
    "transform_cost",
]
