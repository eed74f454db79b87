"""The optimizers that ``convergence.py`` compares, each on a model of its own."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from trial_rules import Trial, rank_of_input, subspace_groups

import rso_ds

RELORA_RESETS, RELORA_WARM_UP = 8, 10  # resets in a run, steps of warm-up after each


def block_linears(model: nn.Module) -> list[nn.Linear]:
    return [m for n, m in model.named_modules() if isinstance(m, nn.Linear) and ".layers." in n]


class Method:
    """A model with its optimizer; ``before`` is called before a step, ``after`` with the number of steps taken.
    ``scale(step)`` multiplies the learning rates, where ``scaled`` of a group says so."""

    def __init__(self, model: nn.Module, optimizer: Any, after: Callable[[int], None] | None = None) -> None:
        self.model, self.optimizer, self.after = model, optimizer, after
        self.before: Callable[[], None] = lambda: None
        self.rates = [group["lr"] for group in optimizer.param_groups]
        self.scaled = [True for _ in self.rates]
        self.scale: Callable[[int], float] = lambda step: 1.0

    def set_rates(self, step: int, schedule: float) -> None:
        """Learning rates of step ``step``, from 0."""
        for group, rate, scaled in zip(self.optimizer.param_groups, self.rates, self.scaled, strict=True):
            group["lr"] = rate * schedule * (self.scale(step) if scaled else 1.0)


def build(spec: dict[str, Any], model: PreTrainedModel, steps: int) -> Method:
    """``spec["lr"]`` is the rate in the matrices of the blocks, ``outside`` the rest's as a multiple of it."""
    options = dict(spec["options"])
    method, lr, outside = options.pop("method"), spec["lr"], options.pop("outside", 1.0)
    if method == "rso":
        return _rso(model, options, lr, outside, spec["seed"], steps)
    inside = [layer.weight for layer in block_linears(model)]
    ids = {id(p) for p in inside}
    rest = {"params": [p for p in model.parameters() if id(p) not in ids], "lr": lr * outside}
    if method == "adamw":
        return Method(model, torch.optim.AdamW([{"params": inside}, rest], lr=lr, weight_decay=0.0, **options))
    if method == "muon":
        muon = torch.optim.Muon(inside, lr=lr, weight_decay=0.0, adjust_lr_fn="match_rms_adamw")
        return Method(model, _Both(muon, torch.optim.AdamW([rest], weight_decay=0.0)))
    rank = max(1, round(options.pop("rank_ratio") * model.config.hidden_size))
    assert not options, options
    if method in ("galore", "apollo"):
        return Method(model, _projected(method, inside, rest, rank, lr))
    return _adapted(method, model, rank, lr, outside, steps)


class _Both:
    """Two optimizers as one."""

    def __init__(self, *optimizers: torch.optim.Optimizer) -> None:
        self.optimizers = optimizers
        self.param_groups = [group for optimizer in optimizers for group in optimizer.param_groups]

    def step(self) -> None:
        for optimizer in self.optimizers:
            optimizer.step()

    def zero_grad(self) -> None:
        for optimizer in self.optimizers:
            optimizer.zero_grad()


def _rso(model: PreTrainedModel, options: dict[str, Any], lr: float, outside: float, seed: int, steps: int) -> Method:
    rule, rank_of = options.pop("trial", None), options.pop("rank_of", "smaller")
    told = {key: options.pop(key) for key in ("part", "mu") if key in options}
    # What is saved for backward changes no number; a trial may watch the inputs of every layer.
    config = rso_ds.RSOConfig(
        lr=lr, dense_lr=lr * outside, seed=seed, lean="all" if rule is None else "none", **options
    )
    with rank_of_input() if rank_of == "input" else nullcontext():
        rso_ds.convert(model, config)
    optimizer = rso_ds.RSO(model, config)
    result = Method(model, optimizer)
    if rule is not None:
        trial = Trial(rule, optimizer, config, steps, **told)
        result.before = trial.before
        result.after, result.scale, result.scaled = trial.after, trial.scale, subspace_groups(optimizer)
    return result


def _projected(method: str, inside: list[Any], rest: dict[str, Any], rank: int, lr: float) -> Any:
    """Optimizers of dense layers that keep their state in a subspace; constants are their authors'."""
    low = {"params": inside, "rank": rank, "update_proj_gap": 200}
    if method == "galore":
        from galore_torch import GaLoreAdamW

        groups = [rest, {**low, "scale": 0.25, "proj_type": "std"}]
        return GaLoreAdamW(groups, lr=lr, weight_decay=0.0, no_deprecation_warning=True)
    from apollo_torch import APOLLOAdamW

    low |= {"scale": 1.0, "scale_type": "channel", "proj": "random", "proj_type": "std"}
    return APOLLOAdamW([rest, low], lr=lr, weight_decay=0.0)


def _adapted(method: str, model: PreTrainedModel, rank: int, lr: float, outside: float, steps: int) -> Method:
    """LoRA from random weights, embeddings, head and norms dense; ReLoRA merges and begins again now and then."""
    from peft import LoraConfig, get_peft_model
    from peft.tuners.lora import LoraLayer

    names = sorted({n.rpartition(".")[2] for n, m in model.named_modules() if m in set(block_linears(model))})
    adapted = get_peft_model(model, LoraConfig(r=rank, lora_alpha=rank, target_modules=names, lora_dropout=0.0))
    layers = [m for m in adapted.modules() if isinstance(m, LoraLayer)]
    frozen = {id(layer.get_base_layer().weight) for layer in layers}
    for p in adapted.parameters():
        p.requires_grad_(id(p) not in frozen)
    factors = [p for n, p in adapted.named_parameters() if "lora_" in n]
    ids = {id(p) for p in factors}
    rest = [p for p in adapted.parameters() if p.requires_grad and id(p) not in ids]
    groups = [{"params": factors}, {"params": rest, "lr": lr * outside}]
    optimizer = torch.optim.AdamW(groups, lr=lr, weight_decay=0.0)
    if method == "lora":
        return Method(adapted, optimizer)
    every = max(1, steps // RELORA_RESETS)

    @torch.no_grad()
    def restart(done: int) -> None:
        if done % every or done == steps:
            return
        for layer in layers:
            layer.get_base_layer().weight += layer.get_delta_weight("default")
            layer.reset_lora_parameters("default", True)
            for factor in (layer.lora_A, layer.lora_B):
                optimizer.state.pop(factor["default"].weight, None)

    result = Method(adapted, optimizer, restart)
    result.scale = lambda step: 1.0 if step < every else min(1.0, (step % every + 1) / RELORA_WARM_UP)
    result.scaled = [True, False]
    return result
