"""The training methods that the account compares: how each changes a model, and what it holds."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from rso_ds.config import RSOConfig
from rso_ds.layers import convert, rso_layers
from rso_ds.layers.linears import is_conv1d
from rso_ds.layers.stacked import Ordinary, ordinary_layer
from rso_ds.layers.targets import resolve_targets
from rso_ds.planning.memory.states import Sizes
from rso_ds.planning.memory.trace import block_names

METHODS = ("rso", "adamw", "lora", "galore")


@dataclass(frozen=True)
class Method:
    """``prepare`` turns a dense model into the one that is trained, in place; ``count`` counts it."""

    name: str
    prepare: Callable[[nn.Module], None]
    count: Callable[[nn.Module], Sizes]
    note: str = ""


class _LoRALinear(nn.Module):
    """y = x W^T + (x A^T) C^T as adapters compute it: x is kept for the gradient of A."""

    def __init__(self, linear: nn.Module, rank: int) -> None:
        super().__init__()
        weight: Tensor = linear.weight  # type: ignore[assignment]
        self.weight = weight
        self.bias = linear.bias
        self.transposed = is_conv1d(linear)
        out_features, in_features = weight.shape[::-1] if self.transposed else weight.shape
        self.A = nn.Parameter(weight.new_zeros(rank, in_features))
        self.C = nn.Parameter(weight.new_zeros(out_features, rank))

    def forward(self, x: Tensor) -> Tensor:
        weight = self.weight.t() if self.transposed else self.weight
        y = nn.functional.linear(x, weight, self.bias)  # type: ignore[arg-type]
        return y + nn.functional.linear(nn.functional.linear(x, self.A), self.C)


class _LoRAEmbedding(nn.Module):
    """y = W[ids] + A[ids] C^T."""

    def __init__(self, embedding: nn.Module, rank: int) -> None:
        super().__init__()
        weight: Tensor = embedding.weight  # type: ignore[assignment]
        self.weight = weight
        vocab, hidden = weight.shape
        self.A = nn.Parameter(weight.new_zeros(vocab, rank))
        self.C = nn.Parameter(weight.new_zeros(hidden, rank))

    def forward(self, ids: Tensor) -> Tensor:
        rows = nn.functional.embedding(ids, self.weight)
        return rows + nn.functional.linear(nn.functional.embedding(ids, self.A), self.C)


def method(name: str, config: RSOConfig) -> Method:
    """One of ``METHODS`` with the rank and targets of ``config``."""
    if name == "rso":
        return Method("RSO", lambda model: (convert(model, config), None)[1], _count_rso)
    if name == "adamw":
        return Method("AdamW", lambda model: None, _count_dense)
    if name == "lora":
        return Method("LoRA", lambda model: _adapt(model, config), _count_dense, "adapters only; all else frozen")
    return Method(
        "GaLore",
        lambda model: None,
        lambda model: _count_galore(model, config),
        "as if ZeRO could shard it, which no implementation does",
    )


def _count_rso(model: nn.Module) -> Sizes:
    layers = [layer for _, layer in rso_layers(model)]
    b = sum(layer.B.numel() for layer in layers)
    spaces = {id(layer.subspace): layer for layer in layers}.values()
    p = 0
    for layer in spaces:
        P = layer.projection()
        p += P.numel() * P.element_size()
    base = _count_dense(model)
    return replace(
        base,
        subspace=b,
        dense=base.dense - b,
        projection_bytes=p,
        layer=max(layer.weight.numel() + layer.B.numel() for layer in layers),
        w=sum(layer.weight.numel() for layer in layers),
    )


def _count_dense(model: nn.Module) -> Sizes:
    params = list(model.parameters())
    names = block_names(model)
    blocks = [model.get_submodule(name) for name in names] or [model]
    in_blocks = {id(p) for block in blocks for p in block.parameters()} if names else set()
    root = [p for p in params if id(p) not in in_blocks]
    largest = max(blocks, key=lambda block: _numel(block.parameters()))
    head = model.get_output_embeddings()  # type: ignore[operator]
    return Sizes(
        frozen=_numel(p for p in params if not p.requires_grad),
        subspace=0,
        dense=_numel(p for p in params if p.requires_grad),
        largest_block=_numel(largest.parameters()),
        block_trained=_numel(p for p in largest.parameters() if p.requires_grad),
        numels=tuple(p.numel() for p in params),
        root=_numel(root),
        root_trained=_numel(p for p in root if p.requires_grad),
        head=0 if head is None else _numel(head.parameters()),
        block_module=max(_numel(m.parameters(recurse=False)) for b in blocks for m in b.modules()),
        largest_frozen=max((p.numel() for p in params if not p.requires_grad), default=0),
    )


def _numel(params: Iterable[Tensor]) -> int:
    return sum(p.numel() for p in params)


def _adapt(model: nn.Module, config: RSOConfig) -> None:
    names = resolve_targets(model, config.targets)
    for param in model.parameters():
        param.requires_grad_(False)
    for name in names:
        target = ordinary_layer(model, name)
        if not isinstance(target, nn.Module):
            continue  # PEFT leaves experts in one parameter as they are, unless told so by target_parameters
        parent, _, leaf = name.rpartition(".")
        adapter = _LoRAEmbedding if isinstance(target, nn.Embedding) else _LoRALinear
        setattr(model.get_submodule(parent), leaf, adapter(target, _rank(target, config)))


def _count_galore(model: nn.Module, config: RSOConfig) -> Sizes:
    """GaLore projects the smaller side of each target's gradient: moments [r, larger], projector [smaller, r]."""
    base = _count_dense(model)
    solver, projector = base.dense, 0
    targets = [ordinary_layer(model, name) for name in resolve_targets(model, config.targets)]
    for target in {id(t.weight): t for t in targets}.values():  # a tied weight has one gradient
        shape: torch.Size = target.weight.shape  # type: ignore[union-attr,assignment]
        rank, matrices = _rank(target, config), shape[:-2].numel()
        solver += matrices * rank * max(shape[-2:]) - shape.numel()
        projector += matrices * rank * min(shape[-2:]) * 4
    return replace(base, projection_bytes=projector, solver=solver)


def _rank(target: Ordinary, config: RSOConfig) -> int:
    smaller = min(target.weight.shape[-2:])  # type: ignore[union-attr,arg-type,index]
    if config.rank is not None:
        return min(config.rank, smaller)
    assert config.rank_ratio is not None
    return max(1, int(config.rank_ratio * smaller))
