"""How a subspace is drawn, and the state of the current one."""

from rso_ds.subspace.samplers import projection_seed, sample_projection
from rso_ds.subspace.subspace import Subspace

__all__ = ["Subspace", "projection_seed", "sample_projection"]
