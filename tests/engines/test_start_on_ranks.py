"""How a run begins on two ranks: memory after conversion and sharding, B in pieces, the device chosen first."""

from __future__ import annotations

import pytest
import torch
from support.environment import needs
from support.ranks import Cases

needs("deepspeed")


@pytest.fixture(scope="module")
def results(pools):
    return Cases(pools, "deferred")


def test_fsdp2_from_the_meta_device(results):
    """The same weights as with memory from the start, and ``state_dict`` shows the effective ones of each rank."""
    plain, deferred = results["fsdp2"], results["fsdp2-meta"]
    for name, weight in plain["weights"].items():
        assert torch.equal(weight, deferred["weights"][name]), name
        assert torch.equal(weight, deferred["shown"][name]), name


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_zero_init_cuts_B_as_it_is_made(results, kind):
    for name, parts in results[f"zero-init-{kind}"].items():
        for whole, held, numel in parts:
            assert (whole, held) == (0, numel // 2), name


def test_the_device_is_chosen_before_the_first_collective(results):
    calls = results["first-calls"]
    assert calls[0] == "set_device"
    assert "collective" in calls
