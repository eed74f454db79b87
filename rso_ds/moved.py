"""Old import paths: where modules, and names in modules, have gone. Importing one warns and names the new place."""

from __future__ import annotations

import warnings
from functools import partial
from importlib import import_module
from types import ModuleType
from typing import Any

from rso_ds.import_hooks import after_import, alias_modules

# The modules of a package that has moved have gone with it, unless they are named here themselves. "": held nothing.
MODULES = {
    "rso_ds.cluster": "",
    "rso_ds.cluster.doctor": "rso_ds.doctor",
    "rso_ds.cluster.doctor.meeting": "rso_ds.doctor.rendezvous",
    "rso_ds.cluster.environment": "rso_ds.comm.launch",
    "rso_ds.cluster.plan": "rso_ds.planning.plan.search",
    "rso_ds.cluster.plan_command": "rso_ds.planning.plan.command",
    "rso_ds.cluster.plan_json": "rso_ds.planning.plan.config_json",
    "rso_ds.cluster.plan_reasons": "rso_ds.planning.plan.reasons",
    "rso_ds.comm.command": "rso_ds.planning.communication.command",
    "rso_ds.comm.exchange": "rso_ds.planning.communication.exchange",
    "rso_ds.comm.network": "rso_ds.planning.communication.network",
    "rso_ds.ds_json": "rso_ds.deepspeed_json",
    "rso_ds.engines.deepspeed.shards": "rso_ds.engines.deepspeed.layout",
    "rso_ds.engines.deepspeed_import": "rso_ds.integrations.deepspeed_import",
    "rso_ds.engines.masters": "rso_ds.weights.masters",
    "rso_ds.finetuning": "rso_ds.recipes.finetuning",
    "rso_ds.form": "rso_ds.layers.form",
    "rso_ds.layers.merge": "rso_ds.weights.merge",
    "rso_ds.lean": "rso_ds.saved",
    "rso_ds.memory": "rso_ds.planning.memory",
    "rso_ds.observer": "rso_ds.engines.observer",
    "rso_ds.optim": "rso_ds.solvers",
    "rso_ds.report": "rso_ds.recipes.report",
    "rso_ds.training": "rso_ds.recipes.training",
    "rso_ds.training.corpus": "rso_ds.recipes.data.corpus",
    "rso_ds.training.dataset": "rso_ds.recipes.data.dataset",
    "rso_ds.training.deepspeed_json": "rso_ds.recipes.training.fill_json",
    "rso_ds.training.distributed": "rso_ds.comm.rank_context",
    "rso_ds.training.evaluate": "rso_ds.recipes.evaluation.command",
    "rso_ds.training.evaluation": "rso_ds.recipes.training.held_out",
    "rso_ds.training.evaluator": "rso_ds.recipes.evaluation.evaluator",
    "rso_ds.training.read_ahead": "rso_ds.recipes.data.read_ahead",
    "rso_ds.training.tokenization": "rso_ds.recipes.data.tokenization",
}

# Module of today -> name that it had -> where that is now.
NAMES = {
    "rso_ds.boundary": {"Shards": "rso_ds.layout.Layout", "SolverShard": "rso_ds.layout.SolverShard"},
    "rso_ds.checkpoint.training_state": {"Places": "rso_ds.layout.Layout"},
    "rso_ds.comm.launch": {"adopt": "rso_ds.comm.launch.export_launch_environment"},
    "rso_ds.comm.rank_context": {"Place": "rso_ds.comm.rank_context.RankContext"},
    "rso_ds.doctor.rendezvous": {"meet": "rso_ds.doctor.rendezvous.rendezvous"},
    "rso_ds.engines.ddp": {"replicated_shards": "rso_ds.engines.ddp.replicated_layout"},
    "rso_ds.engines.deepspeed.flat": {"FlatShards": "rso_ds.engines.deepspeed.flat.FlatLayout"},
    "rso_ds.engines.deepspeed.layout": {"deepspeed_shards": "rso_ds.engines.deepspeed.layout.deepspeed_layout"},
    "rso_ds.engines.deepspeed.stage3": {"Stage3Shards": "rso_ds.engines.deepspeed.stage3.Stage3Layout"},
    "rso_ds.engines.fsdp2": {"FSDPShards": "rso_ds.engines.fsdp2.FSDPLayout"},
    "rso_ds.engines.local_steps": {"OuterMomentum": "rso_ds.weights.outer_momentum.OuterMomentum"},
    "rso_ds.engines.replicated": {
        "FIRST_MOMENTS": "rso_ds.solvers.state.FIRST_MOMENTS",
        "SECOND_MOMENTS": "rso_ds.solvers.state.SECOND_MOMENTS",
        "ReplicatedShards": "rso_ds.engines.replicated.ReplicatedLayout",
    },
    "rso_ds.integrations.deepspeed_import": {"own_initialize": "rso_ds.engines.deepspeed.initialize.own_initialize"},
    "rso_ds.planning.communication.exchange": {"Layout": "rso_ds.planning.communication.exchange.Deployment"},
    "rso_ds.recipes.finetuning.arguments": {
        "TASKS": "rso_ds.recipes.finetuning.parser.TASKS",
        "parse_arguments": "rso_ds.recipes.finetuning.parser.parse_arguments",
    },
    "rso_ds.recipes.training.steps": {"Meeting": "rso_ds.recipes.training.steps.StepSync"},
    "rso_ds.weights.merge": {"round_stochastically": "rso_ds.weights.rounding.round_stochastically"},
}


def keep_old_paths() -> None:
    """Let the old paths be imported, and modules of moved packages be found as attributes where they were."""
    alias_modules(new_name)
    for module in {*NAMES, *(old.rpartition(".")[0] for old in MODULES)} - set(MODULES):
        after_import(module, _look_up_old_names)


def new_name(old: str) -> str | None:
    """Today's name of the module ``old``: "" for a package that held nothing, None if it never had another."""
    if old in MODULES:
        return MODULES[old]
    package, _, leaf = old.rpartition(".")
    return f"{MODULES[package]}.{leaf}" if MODULES.get(package) else None


def _look_up_old_names(module: ModuleType) -> None:
    module.__getattr__ = partial(_old_name, module, getattr(module, "__getattr__", None))  # type: ignore[method-assign]


def _old_name(module: ModuleType, own: Any, name: str) -> Any:
    old = f"{module.__name__}.{name}"
    if MODULES.get(old):
        today = MODULES[old]
        found: Any = import_module(today)
    elif name in NAMES.get(module.__name__, {}):
        today = NAMES[module.__name__][name]
        place, _, attribute = today.rpartition(".")
        found = getattr(import_module(place), attribute)
    elif own is not None:
        return own(name)
    else:
        raise AttributeError(f"module {module.__name__!r} has no attribute {name!r}")
    warnings.warn(f"{old} is now {today}", DeprecationWarning, stacklevel=2)
    return found
