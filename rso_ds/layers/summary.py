"""The table shown at start-up: what was converted and what that saves."""

from __future__ import annotations

import re
from collections import Counter

from torch import nn

from rso_ds.config import RSOConfig
from rso_ds.layers.base import rso_layers, subspace_modules
from rso_ds.layers.partitioned import full_numel
from rso_ds.layers.targets import describe_dense


def parameter_counts(model: nn.Module) -> dict[str, int]:
    """Elements of a converted model, each parameter once.

    ``trainable`` is what has gradients (B and the dense parameters), hence also what ranks exchange per
    gradient reduction (``communicated``); ``frozen`` is W and whatever the caller froze; ``dense`` is what
    ordinary training of the same model would exchange.
    """
    b_ids = {id(layer.B) for _, layer in rso_layers(model)}
    trainable = frozen = b = 0
    for param in model.parameters():
        n = full_numel(param)
        if param.requires_grad:
            trainable += n
        else:
            frozen += n
        if id(param) in b_ids:
            b += n
    return {
        "trainable": trainable,
        "B": b,
        "frozen": frozen,
        "communicated": trainable,
        "dense": trainable - b + frozen,
    }


def summary_table(model: nn.Module, config: RSOConfig) -> str:
    """Plain text, a line per kind of layer (block indices folded into ``*``, tied layers joined by =), then
    the totals, and what stays dense though 'targets' selects it."""
    kinds: Counter[tuple[str, int, int, int]] = Counter()
    names: dict[int, list[str]] = {}
    for name, layer in subspace_modules(model):
        names.setdefault(id(layer.B), []).append(name)
    for _, layer in rso_layers(model):
        folded = re.sub(r"\.\d+\.", ".*.", " = ".join(names[id(layer.B)]))
        kinds[(folded, layer.out_features, layer.in_features, layer.subspace.rank)] += 1
    width = max([len("layer"), *(len(kind[0]) for kind in kinds)])
    lines = [
        f"RSO: solver {config.solver}, sampler {config.sampler}, interval {config.interval} applied steps,"
        f" carry-over {config.carry_over}, seed {config.seed}",
        f"  {'layer':<{width}} {'count':>5} {'out':>6} {'in':>6} {'rank':>5} {'W':>14} {'B':>14}",
    ]
    for (folded, out_features, in_features, rank), count in kinds.items():
        lines.append(
            f"  {folded:<{width}} {count:>5} {out_features:>6} {in_features:>6} {rank:>5}"
            f" {count * out_features * in_features:>14,} {count * out_features * rank:>14,}"
        )
    counts = parameter_counts(model)
    groups = len({id(layer.subspace) for _, layer in rso_layers(model)})
    dense = counts["dense"]
    lines += [
        f"  {sum(kinds.values())} layers in {groups} groups that share P",
        f"  trainable    {counts['trainable']:>16,}  ({counts['B']:,} in B,"
        f" {counts['trainable'] - counts['B']:,} dense)",
        f"  frozen       {counts['frozen']:>16,}",
        f"  communicated {counts['communicated']:>16,}  per gradient reduction, against {dense:,} of dense training"
        f" ({counts['communicated'] / dense:.1%})",
    ]
    left_dense = getattr(model, "_rso_left_dense", None)
    if left_dense:
        lines.append(f"  left dense   {describe_dense(left_dense)}")
    return "\n".join(lines)
