"""What a layer computes, and models made of such layers."""

from rso_ds.layers.convert import (
    Conversion,
    check_conversion,
    convert,
    dense_layer,
    rso_layers,
    target_subspaces,
    to_dense,
)
from rso_ds.layers.functional import subspace_linear
from rso_ds.layers.linear import RSOLinear
from rso_ds.layers.merge import merged_weight, round_stochastically
from rso_ds.layers.summary import parameter_counts, summary_table

__all__ = [
    "Conversion",
    "RSOLinear",
    "check_conversion",
    "convert",
    "dense_layer",
    "merged_weight",
    "parameter_counts",
    "round_stochastically",
    "rso_layers",
    "subspace_linear",
    "summary_table",
    "target_subspaces",
    "to_dense",
]
