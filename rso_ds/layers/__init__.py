"""What a layer computes, and models made of such layers."""

from rso_ds.layers.base import SubspaceLayer, rso_layers, subspace_modules
from rso_ds.layers.convert import Conversion, check_conversion, convert, dense_layer, target_subspaces, to_dense
from rso_ds.layers.embedding import RSOEmbedding, subspace_embedding
from rso_ds.layers.experts import RSOExperts
from rso_ds.layers.functional import subspace_linear
from rso_ds.layers.linear import RSOLinear
from rso_ds.layers.summary import much_outside, parameter_counts, summary_table
from rso_ds.weights.merge import changed_columns, merge_, merged_weight, write_columns_
from rso_ds.weights.rounding import round_stochastically

__all__ = [
    "Conversion",
    "RSOEmbedding",
    "RSOExperts",
    "RSOLinear",
    "SubspaceLayer",
    "changed_columns",
    "check_conversion",
    "convert",
    "dense_layer",
    "merge_",
    "merged_weight",
    "much_outside",
    "parameter_counts",
    "round_stochastically",
    "rso_layers",
    "subspace_embedding",
    "subspace_linear",
    "subspace_modules",
    "summary_table",
    "target_subspaces",
    "to_dense",
    "write_columns_",
]
