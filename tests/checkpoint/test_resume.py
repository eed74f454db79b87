"""Runs saved in the middle of a subspace go on exactly, in new processes; on other ranks and engines, to rounding."""

from __future__ import annotations

import itertools

import pytest
import torch
from cases.resume_cases import CHAINS, CROSSINGS, CUTS, SAVE, four_rank_cases, two_rank_cases
from support.environment import needs
from support.exhaustive import EXHAUSTIVE, quick
from support.resumed_runs import Runs

needs("deepspeed")

TOLERANCE = {"fp32": 1e-5, "bf16": 2e-2, "fp16": 2e-2}
TWO, FOUR = two_rank_cases(), four_rank_cases()
QUICK = {
    "zero0", "zero1", "zero2", "zero3", "ddp", "fsdp2", "hsdp", "zero3-dropout", "ddp-dropout", "zero0-bf16-masters",
    "zero1-background",
    "zero1-offload", "zero2-bf16-folded", "zero3-offload_param", "zero3-background",
    "zero3-tokens-project", "ddp-background", "ddp-local", "fsdp2-background", "fsdp2-tokens-project", "fsdp2-bf16",
    "hsdp-local",
}  # fmt: skip
QUICK_CROSSINGS = {
    ("zero0", "zero3"), ("zero3", "zero1"), ("zero3", "fsdp2"), ("fsdp2", "zero2"), ("zero2", "ddp"),
    ("zero3", "zero0"), ("ddp", "fsdp2-folded"), ("zero1", "zero3-folded"),
}  # fmt: skip
QUICK_CHAINS = {"zero0", "zero1-fsdp2-zero3-ddp", "ddp-zero2-fsdp2-zero1"}


@pytest.fixture(scope="module")
def runs(pools):
    yield Runs(pools)
    pools.drop("saving")
    pools.drop("resuming")


def largest(one, other):
    return max(abs(a - b) for a, b in zip(one, other, strict=True))


@pytest.mark.parametrize("name", quick([*TWO, *FOUR], QUICK))
def test_resumes_bit_for_bit_in_new_processes(runs, name):
    """Losses and weights; dropout, loss scale, schedule and client state are in it."""
    straight, resumed = runs.saved(name), runs.resumed(name)
    assert straight["losses"][SAVE:] == resumed["losses"]
    assert straight["weights"].keys() == resumed["weights"].keys()
    different = [n for n, w in straight["weights"].items() if not torch.equal(w, resumed["weights"][n])]
    assert not different
    assert resumed["client"] == {"note": [1, "kept"]}
    assert (straight["draw"], straight.get("scale")) == (resumed["draw"], resumed.get("scale"))


@EXHAUSTIVE
def test_the_runs_are_not_all_one(runs):
    """Dropout acts, the loss scale moves, local steps differ: otherwise the test above would prove nothing of them."""
    plain = runs.saved("ddp")["losses"]
    for name in ("ddp-dropout", "ddp-local", "ddp-sgd", "ddp-tokens-project"):
        assert largest(plain, runs.saved(name)["losses"]) > 1e-4, name
    assert runs.saved("zero1-fp16")["scale"] not in (None, 2.0**15)


@pytest.mark.parametrize(("source", "target"), quick(CROSSINGS, QUICK_CROSSINGS))
def test_another_engine_goes_on(runs, source, target):
    straight, resumed = runs.saved(source), runs.resumed(source, target)
    tolerance = TOLERANCE[TWO[source]["precision"]]
    assert largest(straight["losses"][SAVE:], resumed["losses"]) <= tolerance
    gap = max((w.double() - resumed["weights"][n].double()).abs().max() for n, w in straight["weights"].items())
    assert gap <= 10 * tolerance


@pytest.mark.parametrize("chain", quick(CHAINS, QUICK_CHAINS))
def test_one_run_over_1_2_4_and_1_ranks(runs, chain):
    parts = runs.chain(chain)
    losses = [loss for part in parts for loss in part["losses"]]
    assert [len(part["losses"]) for part in parts] == [b - a for a, b in itertools.pairwise(CUTS)]
    straight = runs.saved("zero1")
    assert largest(losses, straight["losses"]) <= TOLERANCE["fp32"]
    gap = max((w - parts[-1]["weights"][n]).abs().max() for n, w in straight["weights"].items())
    assert gap <= 10 * TOLERANCE["fp32"]


WEIGHTS = [
    *((name, name) for name in ("zero0", "zero1", "zero2", "zero3", "ddp", "fsdp2", "zero2-bf16")),
    ("zero3-bf16-masters", "zero3-bf16-masters"), ("zero3-tokens-project", "fsdp2"),
    ("fsdp2", "zero3-tokens-project"), ("ddp-local", "zero2-folded"),
    ("ddp-sgd", "ddp-local"), ("zero3", "zero1-rank3"),
]  # fmt: skip
QUICK_WEIGHTS = {("zero2", "zero2"), ("zero3-tokens-project", "fsdp2"), ("fsdp2", "zero3-tokens-project")}
UNSOLVED = [
    *((name, name) for name in ("zero0", "zero1", "zero2", "zero3", "ddp", "fsdp2", "zero3-bf16")),
    ("zero3", "zero3-sgd"), ("zero1-sgd", "ddp"),
]  # fmt: skip


@pytest.mark.parametrize(("source", "target"), quick(WEIGHTS, QUICK_WEIGHTS))
def test_a_run_begins_with_the_weights_of_another(runs, source, target):
    """``load_module_only``: as if the model had had them from the start, whatever method and engine they are from."""
    got = runs.partly("weights", source, target)
    assert got["losses"] == got["expected"]["losses"]
    assert [n for n, w in got["weights"].items() if not torch.equal(w, got["expected"]["weights"][n])] == []


@pytest.mark.parametrize(("source", "target"), quick(UNSOLVED, {("zero3", "zero3"), ("zero1-sgd", "ddp")}))
def test_all_but_the_solvers_state_goes_on(runs, source, target):
    """``load_optimizer_states=False``: subspace, B and schedule go on, the solver of this run begins."""
    got = runs.partly("unsolved", source, target)
    if source == target:
        assert got["losses"] == got["expected"]["losses"]
        assert [n for n, w in got["weights"].items() if not torch.equal(w, got["expected"]["weights"][n])] == []
    straight = runs.saved(source)
    assert got["losses"] != straight["losses"][SAVE:]
    assert got["losses"][0] == pytest.approx(straight["losses"][SAVE], abs=1e-4)
    assert got["draw"] == straight["draw"]


@pytest.mark.parametrize("name", quick(["zero0", "zero3"], {"zero0"}))
def test_the_schedule_may_stay_as_it_is(runs, name):
    """``load_lr_scheduler_states=False``."""
    assert runs.schedule(name) == {"kept": True, "moved": True}
