"""Runs saved in the middle of a subspace go on exactly, in new processes; on other ranks and engines, to rounding."""

from __future__ import annotations

import itertools

import pytest

pytest.importorskip("deepspeed")
import torch
from cases.resume_cases import CHAINS, CROSSINGS, CUTS, SAVE, four_rank_cases, two_rank_cases
from support.ranks import run_ranks

PHASES = {"first": 1, "save": 2, "resume": 2, "save4": 4, "resume4": 4, "last": 1}
TOLERANCE = {"fp32": 1e-5, "bf16": 2e-2, "fp16": 2e-2}
TWO, FOUR = two_rank_cases(), four_rank_cases()


@pytest.fixture(scope="module")
def phases(tmp_path_factory):
    out = tmp_path_factory.mktemp("resume")
    found = {}
    for phase, world in PHASES.items():
        run_ranks("resume", out, world, PHASE=phase)
        found[phase] = torch.load(out / f"{phase}.pt", weights_only=False)
    return found


def result(phases, phase, name):
    got = phases[phase][name]
    assert "error" not in got, got["error"]
    return got


def largest(one, other):
    return max(abs(a - b) for a, b in zip(one, other, strict=True))


@pytest.mark.parametrize("name", [*TWO, *FOUR])
def test_resumes_bit_for_bit_in_new_processes(phases, name):
    """Losses and weights; dropout, loss scale, schedule and client state are in it."""
    saving, resuming = ("save", "resume") if name in TWO else ("save4", "resume4")
    straight, resumed = result(phases, saving, name), result(phases, resuming, name)
    assert straight["losses"][SAVE:] == resumed["losses"]
    assert straight["weights"].keys() == resumed["weights"].keys()
    different = [n for n, w in straight["weights"].items() if not torch.equal(w, resumed["weights"][n])]
    assert not different
    assert resumed["client"] == {"note": [1, "kept"]}
    assert (straight["draw"], straight.get("scale")) == (resumed["draw"], resumed.get("scale"))


def test_the_runs_are_not_all_one(phases):
    """Dropout acts, the loss scale moves, local steps differ: otherwise the test above would prove nothing of them."""
    plain = result(phases, "save", "ddp")["losses"]
    for name in ("ddp-dropout", "ddp-local", "ddp-sgd", "ddp-tokens-project"):
        assert largest(plain, result(phases, "save", name)["losses"]) > 1e-4, name
    assert result(phases, "save", "zero1-fp16")["scale"] not in (None, 2.0**15)


@pytest.mark.parametrize(("source", "target"), CROSSINGS)
def test_another_engine_goes_on(phases, source, target):
    straight, resumed = result(phases, "save", source), result(phases, "resume", f"{source} -> {target}")
    tolerance = TOLERANCE[TWO[source]["precision"]]
    assert largest(straight["losses"][SAVE:], resumed["losses"]) <= tolerance
    gap = max((w.double() - resumed["weights"][n].double()).abs().max() for n, w in straight["weights"].items())
    assert gap <= 10 * tolerance


@pytest.mark.parametrize("chain", CHAINS)
def test_one_run_over_1_2_4_and_1_ranks(phases, chain):
    parts = [result(phases, phase, f"chain {chain}") for phase in ("first", "save", "save4", "last")]
    losses = [loss for part in parts for loss in part["losses"]]
    assert [len(part["losses"]) for part in parts] == [b - a for a, b in itertools.pairwise(CUTS)]
    straight = result(phases, "save", "zero1")
    assert largest(losses, straight["losses"]) <= TOLERANCE["fp32"]
    gap = max((w - parts[-1]["weights"][n]).abs().max() for n, w in straight["weights"].items())
    assert gap <= 10 * TOLERANCE["fp32"]
