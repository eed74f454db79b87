"""Parameter groups: what the user passes to an optimizer, with every W replaced by its B."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from torch import nn

from rso_ds.config import RSOConfig
from rso_ds.errors import RSOConversionError
from rso_ds.layers import SubspaceLayer
from rso_ds.layers.partitioned import full_shape

# Keys that mark our groups inside the solver's param_groups; solvers carry unknown keys along.
IS_SUBSPACE = "rso_subspace"
W_DECAY = "rso_weight_decay"


def solver_groups(
    params: Iterable[Any],
    layers: Mapping[str, SubspaceLayer],
    replaced: Mapping[int, nn.Parameter],
    config: RSOConfig,
) -> list[dict[str, Any]]:
    """Groups for the inner solver.

    ``params`` is what an optimizer takes: parameters or group dicts; an original weight stands for its B.
    Each given group becomes up to two: its B, in a group of their own (the solver's step count is one
    scalar per flat group, and B's may restart) with no solver decay, the group's decay of W kept under
    ``W_DECAY``; and its dense parameters. Frozen parameters are dropped, as optimizers do not train them.

    Raises ``RSOConversionError`` if a B or a parameter appears twice, or no B appears at all.
    """
    given = list(params)
    groups: list[Mapping[str, Any]] = given if given and isinstance(given[0], Mapping) else [{"params": given}]
    b_ids = {id(layer.B) for layer in layers.values()}
    seen: set[int] = set()
    result: list[dict[str, Any]] = []
    for group in groups:
        options: dict[str, Any] = {k: v for k, v in group.items() if k != "params"}
        subspace: list[nn.Parameter] = []
        dense: list[nn.Parameter] = []
        members = group["params"]
        for param in [members] if isinstance(members, nn.Parameter) else list(members):
            param = replaced.get(id(param), param)
            if not param.requires_grad:
                continue
            if id(param) in seen:
                if id(param) in b_ids:
                    continue  # W and its B both listed: model.parameters() of a converted model
                raise RSOConversionError("a parameter appears twice in the optimizer's parameters.")
            seen.add(id(param))
            (subspace if id(param) in b_ids else dense).append(param)
        decay = options.pop("weight_decay", config.weight_decay)
        if subspace:
            result.append(
                {
                    "lr": config.lr,
                    **options,
                    "params": subspace,
                    "weight_decay": 0.0,
                    W_DECAY: float(decay),
                    IS_SUBSPACE: True,
                }
            )
        if dense:
            dense_lr = config.lr if config.dense_lr is None else config.dense_lr
            result.append({"lr": dense_lr, **options, "params": dense, "weight_decay": decay, IS_SUBSPACE: False})
    missing = [name for name, layer in layers.items() if id(layer.B) not in seen]
    if missing:
        raise RSOConversionError(
            f"B of {missing[0]} ({len(missing)} of {len(layers)} layers) is not among the optimizer's"
            " parameters: pass model.parameters(), or leave the layer out of 'targets'."
        )
    return result


def layer_groups(
    layers: Mapping[str, SubspaceLayer], groups: Sequence[Mapping[str, Any]]
) -> tuple[list[float], list[int]]:
    """(decoupled decay of W, index of the group that holds B) of every layer, in order."""
    index = {id(p): i for i, group in enumerate(groups) for p in group["params"]}
    where = [index[id(layer.B)] for layer in layers.values()]
    return [float(groups[i][W_DECAY]) for i in where], where


def proximal_hook(config: RSOConfig) -> Any:
    """Optimizer step pre-hook that adds the gradient of (proximal / 2) ||B||^2 to that of B.

    It works on whatever the solver steps on (B itself, fp32 masters, flat partitions), since the term is
    elementwise; padding is zero and stays zero. It comes after unscaling and clipping, as decay does.
    """

    def add_proximal(optimizer: Any, args: Any, kwargs: Any) -> None:
        for group in optimizer.param_groups:
            if group.get(IS_SUBSPACE):
                for param in group["params"]:
                    if param.grad is not None:
                        param.grad.add_(param.detach(), alpha=config.proximal)

    return add_proximal


def decay_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Groups of the trainable parameters, for every optimizer and engine alike: weight decay as usual, on matrices
    and not on biases and norms."""
    trainable = [p for p in model.parameters() if p.requires_grad]
    matrices = [p for p in trainable if len(full_shape(p)) > 1]
    vectors = [p for p in trainable if len(full_shape(p)) <= 1]
    groups = [{"params": matrices, "weight_decay": weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    return [g for g in groups if g["params"]]
