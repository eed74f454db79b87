"""Which form of the forward pass a run takes when its configuration leaves the choice (``form`` null).

Both forms take the same steps up to rounding (``rso_ds.boundary``). In operations of a rank and step, for a linear
layer [out, in] with rank r and T tokens:

    the two-path form computes z B^T, dy B and (dy B) P^T besides      2 T r (2 out + in)
    the folded form merges B P^T into W at every step                  2 out in r

With the coordinate sampler P costs nothing: 4 T r out against out r additions. Where P is a transform (srht), a product
with it costs ``rso_ds.subspace.transform_cost`` in place of r. An embedding computes alike in both forms, so that its
merges save nothing. Into 16-bit W merges are computed in fp32, converted and rounded (of W whole, with coordinates of
their columns), while the products that they save are 16-bit ones: ``LOW_PRECISION_*``.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable

from torch import nn

from rso_ds.config import RSOConfig
from rso_ds.layers import SubspaceLayer, subspace_modules
from rso_ds.subspace import transform_cost

# What a merge into 16-bit W costs in 16-bit operations: with dense P as a multiple of those of B P^T, with coordinates
# for each element that changes. Measured with benchmarks/speed/layer.py on cores that have 16-bit products
# (benchmarks/speed/README.md).
LOW_PRECISION_MERGE, LOW_PRECISION_ELEMENT = 9, 7000


@dataclasses.dataclass(frozen=True)
class Shape:
    """One W [out, in] with its rank; ``linear``: not an embedding. ``experts``: E of stacked ones, of which a token is
    counted to meet one, the least that it can."""

    out_features: int
    in_features: int
    rank: int
    linear: bool = True
    experts: int = 1

    @classmethod
    def of(cls, layer: SubspaceLayer) -> Shape:
        return cls(
            layer.out_features, layer.in_features, layer.subspace.rank, layer.kind != "embedding", layer.experts or 1
        )


def choose_form(
    config: RSOConfig, shapes: Iterable[Shape], low_precision: bool, decays: bool, merge_sends: str = ""
) -> tuple[str, str]:
    """("two_path" or "folded", why).

    ``low_precision``: W is in bf16 or fp16; ``decays``: weight decay acts on it. ``merge_sends``: what each
    merge would send, and whereto, empty if nothing (``Layout.merge_sends``).
    """
    if config.form is not None:
        return config.form, "set in the configuration"
    if config.proximal or config.communicate != "every_step":
        key = "proximal" if config.proximal else "communicate"
        return "two_path", f"'{key}' needs the B of the whole subspace"
    if decays:
        return "two_path", "weight decay of W would come with every merge, so that results were not the same"
    if merge_sends:
        return "two_path", f"merging at every step would send {merge_sends}"
    if low_precision and config.merge_rounding == "nearest":
        if config.master_weights == "none":
            return "two_path", "16-bit weights rounded to nearest would lose the updates of single steps"
        if config.master_weights == "cpu":
            return "two_path", "merging at every step would move the fp32 masters between CPU and device"
    cost, saved = _operations(config, shapes, low_precision)
    if not saved:
        return "two_path", "embeddings compute alike in both forms"
    enough, tokens = math.floor(cost / saved) + 1, config.tokens_per_step
    if tokens is None and low_precision:
        return "two_path", f"merges into 16-bit weights pay from {enough:,} 'tokens_per_step' on, which is not set"
    if tokens is not None and tokens < enough:
        return "two_path", f"{tokens:,} tokens a rank and step do not pay for the merges, {enough:,} would"
    return "folded", f"pays from {enough:,} tokens a rank and step on"


def _operations(config: RSOConfig, shapes: Iterable[Shape], low_precision: bool) -> tuple[float, float]:
    """(of all merges in a step, saved for each token)."""
    cost, saved = 0.0, 0.0
    coordinate = config.sampler == "coordinate"
    for s in shapes:
        width = transform_cost(s.in_features, s.rank) if config.sampler == "srht" else s.rank
        if coordinate:
            cost += s.experts * s.out_features * s.rank * (LOW_PRECISION_ELEMENT if low_precision else 1)
        else:
            merged = 2 * s.experts * s.out_features * s.in_features * width
            cost += merged * (LOW_PRECISION_MERGE if low_precision else 1)
        if s.linear:
            saved += 2 * (2 * s.out_features * s.rank + (0 if coordinate else s.in_features * width))
    return cost, saved


def settle_form(
    model: nn.Module, config: RSOConfig, layers: Iterable[SubspaceLayer], decays: Iterable[float], merge_sends: str
) -> tuple[RSOConfig, str]:
    """``config`` with its form chosen, put into effect in ``model``, and why it was chosen. ``decays``: of each W."""
    layers = list(layers)
    low_precision = any(layer.weight.element_size() < 4 for layer in layers)
    form, reason = choose_form(config, map(Shape.of, layers), low_precision, any(decays), merge_sends)
    for _, module in subspace_modules(model):
        module.form = form
    return dataclasses.replace(config, form=form), f"form {form}: {reason}"
