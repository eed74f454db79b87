"""The table shown at start-up: what was converted and what that saves."""

from __future__ import annotations

import re
from collections import Counter

from torch import nn

from rso_ds.config import RSOConfig
from rso_ds.layers.base import rso_layers, subspace_modules
from rso_ds.layers.partitioned import full_numel
from rso_ds.layers.targets import describe_dense


def _folded(name: str) -> str:
    return re.sub(r"\.\d+(?=\.)", ".*", name)


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


# Above this share of the weights outside every subspace a run is told so.
MUCH_OUTSIDE = 0.2


def share_outside(model: nn.Module) -> tuple[float, dict[str, float]]:
    """(share of the weights of a converted model that is in no subspace, {parameter: its share} of those, largest
    first). A parameter's block index is folded into ``*``; B is no weight, W counts once where it is tied."""
    weights = {id(layer.weight) for _, layer in rso_layers(model)}
    b = {id(layer.B) for _, layer in rso_layers(model)}
    numels = {n: full_numel(p) for n, p in model.named_parameters() if id(p) not in b}
    names: Counter[str] = Counter()
    for name, param in model.named_parameters():
        if id(param) not in b | weights:
            names[_folded(name)] += numels[name]
    total = sum(numels.values())
    return names.total() / total, {name: n / total for name, n in names.most_common()}


def outside(model: nn.Module) -> str:
    """That share in a sentence, with the largest of what it consists of."""
    share, parts = share_outside(model)
    largest = ", ".join(f"{name} {part:.1%}" for name, part in list(parts.items())[:3] if part >= 0.001)
    return f"{share:>16.1%}  of the weights are in no subspace{f': {largest}' if largest else ''}"


def much_outside(model: nn.Module) -> str:
    """A warning where more than ``MUCH_OUTSIDE`` of the weights of a converted model are in no subspace, else ""."""
    if share_outside(model)[0] <= MUCH_OUTSIDE:
        return ""
    return (
        f"{outside(model).strip()}. They take the gradients, solver state and communication of dense training."
        ' \'targets\' selects further layers, the embeddings and the head by ["default", "embeddings", "head"].'
    )


def summary_table(model: nn.Module, config: RSOConfig) -> str:
    """Plain text, a line per kind of layer (block indices folded into ``*``, tied layers joined by =), then
    the totals, and what stays dense though 'targets' selects it."""
    kinds: Counter[tuple[str, int, int, int, int]] = Counter()
    names: dict[int, list[str]] = {}
    for name, layer in subspace_modules(model):
        names.setdefault(id(layer.B), []).append(name)
    for _, layer in rso_layers(model):
        folded = _folded(" = ".join(names[id(layer.B)]))
        kinds[(folded, layer.experts or 1, layer.out_features, layer.in_features, layer.subspace.rank)] += 1
    width = max([len("layer"), *(len(kind[0]) for kind in kinds)])
    lines = [
        f"RSO: solver {config.solver}, sampler {config.sampler}, interval {config.interval} applied steps,"
        f" carry-over {config.carry_over}, seed {config.seed}",
        f"  {'layer':<{width}} {'count':>7} {'out':>6} {'in':>6} {'rank':>5} {'W':>14} {'B':>14}",
    ]
    for (folded, experts, out_features, in_features, rank), count in kinds.items():
        rows = count * experts * out_features
        shown = str(count) if experts == 1 else f"{count}x{experts}"
        lines.append(
            f"  {folded:<{width}} {shown:>7} {out_features:>6} {in_features:>6} {rank:>5}"
            f" {rows * in_features:>14,} {rows * rank:>14,}"
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
        f"  outside      {outside(model)}",
    ]
    left_dense = getattr(model, "_rso_left_dense", None)
    if left_dense:
        lines.append(f"  left dense   {describe_dense(left_dense)}")
    return "\n".join(lines)
