"""Every import path of before the modules moved still leads to the module itself, and says where it is now."""

import importlib
import subprocess
import sys

import pytest
from support.environment import ROOT

from rso_ds.import_hooks import after_import
from rso_ds.moved import MODULES, NAMES

# Old package, new package: the modules, with "=" where their own name is another too.
MOVED = """
rso_ds rso_ds: lean=saved optim=solvers ds_json=deepspeed_json
rso_ds rso_ds.engines: observer
rso_ds rso_ds.layers: form
rso_ds rso_ds.planning: memory
rso_ds rso_ds.recipes: report finetuning training
rso_ds.cluster rso_ds: doctor
rso_ds.cluster rso_ds.comm: environment=launch
rso_ds.cluster rso_ds.planning.plan: plan=search plan_command=command plan_json=config_json plan_reasons=reasons
rso_ds.cluster.doctor rso_ds.doctor: command disks extensions gpus interfaces launcher limits meeting=rendezvous network
rso_ds.cluster.doctor rso_ds.doctor: ops report resources software speed together
rso_ds.comm rso_ds.planning.communication: exchange command network
rso_ds.engines rso_ds.integrations: deepspeed_import
rso_ds.engines rso_ds.weights: masters
rso_ds.engines.deepspeed rso_ds.engines.deepspeed: shards=layout
rso_ds.finetuning rso_ds.recipes.finetuning: arguments base causal classification command data
rso_ds.layers rso_ds.weights: merge
rso_ds.lean rso_ds.saved: activations apply kernels loss norms
rso_ds.memory rso_ds.planning.memory: account command kept measured methods peak profile report states trace
rso_ds.optim rso_ds.solvers: carry_over groups finite
rso_ds.report rso_ds.recipes.report: command page runs
rso_ds.training rso_ds.comm: distributed=rank_context
rso_ds.training rso_ds.recipes.data: corpus dataset tokenization read_ahead
rso_ds.training rso_ds.recipes.evaluation: evaluate=command evaluator
rso_ds.training rso_ds.recipes.training: deepspeed_json=fill_json steps evaluation=held_out arguments command engines
rso_ds.training rso_ds.recipes.training: loop metrics model_card monitor native_checkpoints signals torch_engine
"""


def paths():
    for line in MOVED.strip().splitlines():
        packages, _, leaves = line.partition(":")
        old, new = packages.split()
        for leaf in leaves.split():
            before, _, after = leaf.partition("=")
            yield f"{old}.{before}", f"{new}.{after or before}"


@pytest.mark.parametrize(("old", "new"), paths())
def test_an_old_module_is_the_new_one(old, new):
    sys.modules.pop(old, None)
    with pytest.warns(DeprecationWarning, match=f"^{old} is now {new}$"):
        module = importlib.import_module(old)
    assert module is importlib.import_module(new)
    assert (module.__name__, module.__spec__.name) == (new, new)


@pytest.mark.parametrize(("module", "name"), [(module, name) for module in NAMES for name in NAMES[module]])
def test_an_old_name_is_the_new_one(module, name):
    place, _, today = NAMES[module][name].rpartition(".")
    with pytest.warns(DeprecationWarning, match=f"^{module}.{name} is now {place}.{today}$"):
        found = getattr(importlib.import_module(module), name)
    assert found is getattr(importlib.import_module(place), today)


def test_nothing_is_in_the_table_that_was_not_there():
    assert set(MODULES) - {old for old, _ in paths()} == {"rso_ds.cluster"}


def test_what_programs_write():
    code = """
import rso_ds.memory.account as a
import rso_ds.planning.memory.account as b
assert a is b
import rso_ds
from rso_ds.cluster.environment import adopt
from rso_ds.layers import merge
from rso_ds.memory.kept import KeptRecorder
from rso_ds.training.distributed import Place
assert adopt is rso_ds.comm.launch.export_launch_environment
assert Place is rso_ds.comm.rank_context.RankContext
assert rso_ds.observer.Observer is rso_ds.engines.observer.Observer
assert merge is rso_ds.weights.merge and not hasattr(rso_ds, "nothing") and not hasattr(rso_ds.comm, "nothing")
"""
    command = [sys.executable, "-W", "always::DeprecationWarning", "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    assert "<string>:2: DeprecationWarning: rso_ds.memory.account is now rso_ds.planning.memory.account" in done.stderr


@pytest.mark.parametrize("name", ["rso_ds.training.nothing", "rso_ds.cluster.nothing", "rso_ds.nothing"])
def test_what_never_was(name):
    with pytest.raises(ModuleNotFoundError, match="nothing"):
        importlib.import_module(name)


def test_an_action_after_an_import(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "watched_module.py").write_text("value = 1\n")
    seen = []
    after_import("watched_module", lambda module: seen.append(module.value))
    assert importlib.util.find_spec("watched_module") is not None
    assert seen == []
    importlib.import_module("watched_module")
    assert seen == [1]
    after_import("watched_module", lambda module: seen.append(2))
    assert seen == [1, 2]
