"""A model into its RSO form and back."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from rso_ds.config import RSOConfig
from rso_ds.errors import RSOConversionError
from rso_ds.layers.base import SubspaceLayer, rso_layers, subspace_modules
from rso_ds.layers.embedding import RSOEmbedding
from rso_ds.layers.experts import RSOExperts
from rso_ds.layers.foreign import refuse_foreign
from rso_ds.layers.kinds import is_turned, ordinary_shape, ordinary_weight
from rso_ds.layers.linear import RSOLinear
from rso_ds.layers.linears import is_conv1d
from rso_ds.layers.partitioned import full_shape, gathered, is_partitioned, partition_as, whole
from rso_ds.layers.shared_input import SharedInput
from rso_ds.layers.stacked import Ordinary, StackedLinear, ordinary_layer
from rso_ds.layers.targets import describe_dense, matches, resolve_targets, select_targets, shared_input_key
from rso_ds.layers.ties import tied_targets
from rso_ds.saved import apply_lean, pass_on, remove_lean
from rso_ds.subspace import Subspace
from rso_ds.weights.merge import merged_weight

logger = logging.getLogger(__name__)


@dataclass
class Conversion:
    """What ``convert`` did. ``layers`` maps names to layers in model order, tied ones once; ``replaced`` maps the
    id of each original weight Parameter to the B that is trained in its place. ``originals`` keeps those
    weights alive, since the id of a freed one may be given to another parameter. ``left_dense`` says of the layers that
    'targets' selects, and that train densely all the same, why (``rso_ds.layers.targets.select_targets``)."""

    layers: dict[str, SubspaceLayer]
    replaced: dict[int, nn.Parameter]
    originals: list[nn.Parameter]
    left_dense: dict[str, str]


def convert(model: nn.Module, config: RSOConfig) -> Conversion:
    """Replace, in place, the layers that ``config.targets`` selects by ``RSOLinear``, ``RSOEmbedding`` or
    ``RSOExperts``.

    W keeps its Parameter object (a transposed copy where it was stored [in, out]), its name and its dtype; B is added
    under the layer's name. A tied embedding and head, both selected, stay tied: one W, one B, one P. The rest of
    the block becomes lean as ``config.lean`` says (``rso_ds.saved``). Layers whose weight the caller has frozen
    stay as they are, and so do those that cannot train in a subspace or that "default" and "all-linear" leave dense,
    which a warning names. Works on plain models, on the meta device, and on models built under
    ``deepspeed.zero.Init``.

    Raises ``RSOConversionError`` if nothing matches, the model is converted already, the rank exceeds a
    layer's smaller side, or a target's weight is tied to another parameter's use; ``RSOUnsupportedError`` for a
    quantised model or one with adapters of peft.
    """
    if any(True for _ in rso_layers(model)):
        raise RSOConversionError("the model has RSO layers already: convert a model once.")
    refuse_foreign(model)
    selected, left_dense = select_targets(model, config.targets)
    ordinary = {name: ordinary_layer(model, name) for name in selected}
    trains = [name for name in selected if _trains(ordinary[name])]
    left_dense = {name: left_dense[name] for name in trains if name in left_dense}
    names = [name for name in trains if name not in left_dense and ordinary[name].weight.requires_grad]
    if not names:
        raise RSOConversionError(
            "every layer that 'targets' selects is frozen (requires_grad is False): nothing to train in a subspace."
        )
    ties = tied_targets(model, _modules(ordinary, names))
    names = [name for name in names if name not in ties]
    shapes = {name: _shape(ordinary[name]) for name in names}
    groups = [(members, _rank(members, shapes, config)) for members in _groups(names, shapes)]
    _select_dense(model, config, {id(ordinary[name].weight) for name in names})
    pieces = config.lean if isinstance(config.lean, str) else [p for p in config.lean if p != "shared_input"]
    apply_lean(model, pieces)
    # Nothing above changed a layer: a refused model is as it was.
    layers: dict[str, SubspaceLayer] = {}
    replaced: dict[int, nn.Parameter] = {}
    originals: list[nn.Parameter] = []
    form = config.form or "two_path"  # until an engine chooses: B is 0, so that both are the same
    subspaces: dict[str, Subspace] = {}
    for members, rank in groups:
        subspace = _subspace(subspaces, members, shapes[members[0]][1], rank, config)
        shared = _shared_input(model, members, config)
        for name in members:
            old = ordinary[name]
            originals.append(old.weight)  # type: ignore[arg-type]
            layers[name] = layer = _replacement(old, shapes[name], subspace, shared, form, config)
            replaced[id(originals[-1])] = layer.B
            _put(model, old, layer)
    for name, first in ties.items():
        old, tied = ordinary[name], layers[first]
        layer = _replacement(old, shapes[first], tied.subspace, SharedInput(1), form, config, tied.B)
        layer.__dict__["tied_to"] = tied
        _put(model, old, layer)
    model.__dict__["_rso_left_dense"] = left_dense
    if left_dense:
        logger.warning("%d layers that 'targets' selects stay dense: %s.", len(left_dense), describe_dense(left_dense))
    return Conversion({name: layers[name] for name in names}, replaced, originals, left_dense)


def target_subspaces(model: nn.Module, config: RSOConfig) -> dict[str, Subspace]:
    """The subspace that ``convert`` would give each layer, by layer name; the model stays as it is.

    Raises ``RSOConversionError`` as ``convert`` does for targets and ranks.
    """
    names = resolve_targets(model, config.targets)
    ordinary = {name: ordinary_layer(model, name) for name in names}
    ties = tied_targets(model, _modules(ordinary, names))
    shapes = {name: _shape(ordinary[name]) for name in names if name not in ties}
    found: dict[str, Subspace] = {}
    result: dict[str, Subspace] = {}
    for members in _groups(list(shapes), shapes):
        subspace = _subspace(found, members, shapes[members[0]][1], _rank(members, shapes, config), config)
        result.update(dict.fromkeys(members, subspace))
    return result


# Keys that act when a model is converted and at no other time.
_AT_CONVERSION = ("targets", "share_projection", "dense", "lean")


def check_conversion(layers: Mapping[str, SubspaceLayer], config: RSOConfig) -> None:
    """Raise ``RSOConversionError`` if ``layers`` were converted with another configuration than ``config``."""
    for name, layer in layers.items():
        pairs: list[tuple[str, Any, Any]] = [
            ("sampler", layer.subspace.sampler, config.sampler),
            ("seed", layer.subspace.seed, config.seed),
            ("rank", layer.subspace.rank, layer.subspace.rank if config.rank is None else config.rank),
            ("form", layer.form, config.form or layer.form),
        ]
        with_ = layer.converted_with
        keys = () if with_ is None else _AT_CONVERSION if config.rank is not None else ("rank_ratio", *_AT_CONVERSION)
        pairs += [(key, getattr(with_, key), getattr(config, key)) for key in keys]
        for key, found, wanted in pairs:
            if wanted != found:
                raise RSOConversionError(
                    f"layer '{name}' was converted with '{key}': {found!r}, the configuration says {wanted!r}:"
                    " convert the model with the configuration that it trains with."
                )


def dense_layer(layer: SubspaceLayer, merged: nn.Parameter | None = None) -> nn.Module:
    """A plain ``nn.Linear``, ``Conv1D`` or ``nn.Embedding`` with weight W + B P^T, merged in fp32, rounded once.

    ``merged`` is that weight, if a layer tied to this one has it already. The bias is the layer's own
    Parameter, which may be tied too. Under ZeRO-3 and FSDP2 the layer is gathered and the bias copied; every
    rank must call this together and gets the full layer.
    """
    with torch.no_grad(), gathered([layer.bias] if merged is not None else [layer.weight, layer.B, layer.bias]):
        if merged is None:
            weight = merged_weight(whole(layer.weight), whole(layer.B), layer.current_projection())
            merged = nn.Parameter(weight.to(layer.weight.dtype))
        bias = layer.bias
        if bias is not None and (is_partitioned(bias) or isinstance(bias, DTensor)):
            bias = nn.Parameter(whole(bias.detach()).clone())
    return layer.stock(merged, bias)


def to_dense(model: nn.Module) -> nn.Module:
    """Turn every RSO layer of ``model`` back, in place, with a trainable weight, and undo ``lean``.

    Raises ``RSOConversionError`` for a model that FSDP2 shards, whose modules cannot be replaced.
    """
    if any(isinstance(param, DTensor) for param in model.parameters()):
        raise RSOConversionError(
            "the model is sharded by FSDP2: use rso_ds.checkpoint.dense_state_dict or save_dense, which gather it."
        )
    merged: dict[int, nn.Parameter] = {}
    for _, layer in list(subspace_modules(model)):
        layer.detach()
        dense = dense_layer(layer, merged.get(id(layer.B)))
        merged[id(layer.B)] = dense.weight  # type: ignore[assignment]
        if isinstance(layer, RSOExperts):
            layer.give_back(dense.weight)  # type: ignore[arg-type]
        else:
            _put(model, layer, dense)
    remove_lean(model)
    model.__dict__.pop("_rso_left_dense", None)
    return model


def _modules(ordinary: Mapping[str, Ordinary], names: list[str]) -> list[str]:
    return [name for name in names if isinstance(ordinary[name], nn.Module)]


def _trains(ordinary: Ordinary) -> bool:
    params = [ordinary.weight] if isinstance(ordinary, StackedLinear) else ordinary.parameters(recurse=False)
    return any(param.requires_grad for param in params)


def _kind(ordinary: Ordinary) -> str:
    if isinstance(ordinary, StackedLinear):
        return "experts_t" if ordinary.transposed else "experts"
    if type(ordinary) is nn.Embedding:
        return "embedding"
    return "conv1d" if is_conv1d(ordinary) else "linear"


def _shape(ordinary: Ordinary) -> tuple[int, int]:
    """(out, in) of a linear layer, Conv1D, embedding or one of stacked experts, partitioned or not."""
    shape = ordinary_shape(full_shape(ordinary.weight), _kind(ordinary))
    return shape[-2], shape[-1]


def _groups(names: list[str], shapes: dict[str, tuple[int, int]]) -> list[list[str]]:
    found: dict[tuple, list[str]] = {}
    for name in names:
        found.setdefault((*shared_input_key(name), shapes[name][1]), []).append(name)
    return list(found.values())


def _rank(members: list[str], shapes: dict[str, tuple[int, int]], config: RSOConfig) -> int:
    smallest = min(members, key=lambda n: min(shapes[n]))
    limit = min(shapes[smallest])
    if config.rank is None:
        assert config.rank_ratio is not None
        wanted = math.floor(config.rank_ratio * max(min(shapes[n]) for n in members))
        return max(1, min(wanted, limit))
    if config.rank > limit:
        out_features, in_features = shapes[smallest]
        raise RSOConversionError(
            f"'rank': {config.rank} exceeds the smaller side of layer '{smallest}' (out={out_features},"
            f" in={in_features}). Use a rank of at most {limit}, or 'rank_ratio', or leave the layer out of"
            " 'targets'."
        )
    return config.rank


def _subspace(
    found: dict[str, Subspace], members: list[str], in_features: int, rank: int, config: RSOConfig
) -> Subspace:
    name = f"in={in_features},rank={rank}" if config.share_projection == "shape" else "+".join(members)
    if name not in found:
        found[name] = Subspace(name, in_features, rank, config.sampler, config.seed)
    return found[name]


def _shared_input(model: nn.Module, members: list[str], config: RSOConfig) -> SharedInput:
    if len(members) == 1 or not (config.lean == "all" or "shared_input" in config.lean):
        return SharedInput(1)
    shared = SharedInput(len(members))
    shared.forget_after(model.get_submodule(members[0].rpartition(".")[0]))
    return shared


_HOOKS = [key for key in vars(nn.Module()) if key.startswith(("_forward_", "_backward_", "_is_full_backward"))]


def _replacement(
    old: Ordinary,
    shape: tuple[int, int],
    subspace: Subspace,
    shared: SharedInput,
    form: str,
    config: RSOConfig,
    B: nn.Parameter | None = None,
) -> SubspaceLayer:
    weight: nn.Parameter = old.weight  # type: ignore[assignment]
    out_features, in_features = shape
    kind = _kind(old)
    if is_turned(kind):
        with torch.no_grad(), gathered([weight]):
            turned = nn.Parameter(ordinary_weight(weight.detach(), kind).contiguous())
        weight = partition_as(turned, weight)
    layer: SubspaceLayer
    if isinstance(old, StackedLinear):
        layer = RSOExperts(weight, in_features, out_features, subspace, kind, full_shape(weight)[0])
    elif type(old) is nn.Embedding:
        layer = RSOEmbedding(weight, in_features, out_features, subspace, old.padding_idx, B)
    else:
        bias: nn.Parameter | None = old.bias  # type: ignore[assignment]
        layer = RSOLinear(weight, bias, in_features, out_features, subspace, shared, kind == "conv1d", B)
        layer.take_the_place_of(old)
        pass_on(old, layer)
    if isinstance(old, nn.Module):
        for key in _HOOKS:  # those of the caller: their handles still remove them
            layer.__dict__[key] = old.__dict__[key]
    layer.form, layer.converted_with = form, config
    layer.train(old.training)
    return layer


def _put(model: nn.Module, old: Ordinary, new: nn.Module) -> None:
    if isinstance(old, StackedLinear):
        assert isinstance(new, RSOExperts)
        new.attach(old.owner, old.leaf)
        return
    # A module may hang in several places (ALBERT shares its blocks): replace every reference.
    for parent in list(model.modules()):
        for child_name, child in list(parent._modules.items()):
            if child is old:
                parent._modules[child_name] = new


def _select_dense(model: nn.Module, config: RSOConfig, ours: set[int]) -> None:
    if config.dense == "all":
        return
    patterns = () if config.dense == "none" else config.dense
    others = [(n, p) for n, p in model.named_parameters(remove_duplicate=False) if id(p) not in ours]
    for pattern in patterns:
        if not any(matches(n, (pattern, pattern + ".weight", pattern + ".bias")) for n, _ in others):
            raise RSOConversionError(f"'dense': no parameter outside the RSO layers matches {pattern!r}.")
    wanted = [p + s for p in patterns for s in ("", ".weight", ".bias")]
    keep = {id(p) for n, p in others if matches(n, wanted)}
    for _, param in others:
        if id(param) not in keep:
            param.requires_grad_(False)


__all__ = ["Conversion", "check_conversion", "convert", "dense_layer", "to_dense"]
