"""The linear layers that neither 'default' nor 'all-linear' puts into a subspace, though they could train there.

Heads begin with random weights that are theirs alone, and a head of three classes has no subspace worth the name.
Poolers get no gradient where the loss reads tokens, so that they would end the run at its first step. Routers are
small, and what they choose depends on few numbers.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator

from torch import nn

from rso_ds.layers.linears import is_linear
from rso_ds.layers.outputs import output_layers
from rso_ds.layers.partitioned import full_shape
from rso_ds.layers.wrappers import without_compile

_POOLER = re.compile("Pooler|PoolingHead")  # in names of classes
_TASK = re.compile("For[A-Z]")  # BertForTokenClassification; bare models and parts have no such name


def left_dense(model: nn.Module, names: Iterable[str]) -> dict[str, str]:
    """{name: why} for those of the linear layers ``names`` that stay dense."""
    heads = _heads(model)
    found: dict[str, str] = {}
    for name in names:
        layer = model.get_submodule(name)
        experts = _experts_beside(model, name)
        outputs: int = layer.out_features if isinstance(layer, nn.Linear) else layer.nf  # type: ignore[assignment]
        if name in heads:
            found[name] = heads[name]
        elif _is_pooler(model, name):
            found[name] = "a pooler, which many losses do not read"
        elif outputs in experts:
            found[name] = f"the router of {outputs} experts"
        elif outputs == 1:
            found[name] = "a single output"
    return found


def _heads(model: nn.Module) -> dict[str, str]:
    """{name of a linear layer: what makes it a head}."""
    names = {module: name for name, module in model.named_modules() if is_linear(module)}
    tables = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
    found = {name: "tied to an embedding" for module, name in names.items() if id(module.weight) in tables}
    if not type(model).__module__.startswith("transformers."):
        found |= {name: f"an output layer of {type(without_compile(model)).__name__}" for name in output_layers(model)}
    for task_model in _pretrained(model):
        heads = [(names[m], why) for head, why in _heads_of(task_model) for m in head.modules() if m in names]
        found |= dict(reversed(heads))
    return found


def _is_pretrained(module: nn.Module) -> bool:
    """True for a ``PreTrainedModel`` of transformers, which is not imported for that."""
    return any(
        k.__name__ == "PreTrainedModel" and k.__module__.startswith("transformers.") for k in type(module).__mro__
    )


def _pretrained(module: nn.Module) -> Iterator[nn.Module]:
    """The outermost models of transformers in ``module``, itself among them."""
    if _is_pretrained(module):
        yield module
    else:
        for child in module.children():
            yield from _pretrained(child)


def _heads_of(model: nn.Module) -> Iterator[tuple[nn.Module, str]]:
    """(module, what makes it a head): what a model of transformers has besides its body, and its output embeddings."""
    getter = getattr(model, "get_output_embeddings", None)
    try:
        output = getter() if callable(getter) else None
    except (NotImplementedError, AttributeError):  # transformers: this model has no such layer
        output = None
    if isinstance(output, nn.Module):
        yield output, "the output head"
    bodies = list(_bodies(model))
    for body in bodies:
        if _is_pretrained(body):
            yield from _heads_of(body)
    if bodies and (model.base_model is not model or _TASK.search(type(model).__name__)):
        inside = {id(m) for body in bodies for m in body.modules()}
        for module in model.modules():
            if is_linear(module) and id(module) not in inside:
                yield module, f"part of the head of {type(model).__name__}"


def _bodies(model: nn.Module) -> Iterator[nn.Module]:
    base = model.base_model
    if isinstance(base, nn.Module) and base is not model:
        yield base
    else:
        for child in model.children():
            yield from _pretrained(child)


def _is_pooler(model: nn.Module, name: str) -> bool:
    parts = name.split(".")
    around = (model.get_submodule(".".join(parts[: i + 1])) for i in range(len(parts)))
    return "pooler" in parts or any(_POOLER.search(type(module).__name__) for module in around)


def _experts_beside(model: nn.Module, name: str) -> set[int]:
    """Numbers of the experts that layer ``name`` may choose among: those beside it, or beside its own router module."""
    parts = name.split(".")
    depth = 2 if len(parts) > 1 and re.search("gate|router", parts[-2], re.IGNORECASE) else 1
    found: set[int] = set()
    for up in range(1, depth + 1):
        for child_name, child in model.get_submodule(".".join(parts[:-up])).named_children():
            if "expert" in child_name.lower() and child_name not in parts:
                found |= set(_number_of_experts(child))
    return found


def _number_of_experts(experts: nn.Module) -> Iterator[int]:
    if isinstance(experts, (nn.ModuleList, nn.ModuleDict)):
        yield sum(next(child.parameters(), None) is not None for child in experts.children())
    else:  # one tensor [experts, ...] for all of them
        yield from {shape[0] for shape in map(full_shape, experts.parameters(recurse=False)) if len(shape) >= 3}


__all__ = ["left_dense"]
