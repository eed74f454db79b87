"""Saves after every optimizer step of several micro batches, the last of an epoch short, and exact continuation."""

from __future__ import annotations

import pytest
import torch
from cases.trainer_cases import ACCUMULATED_BATCHES, accumulated_cases
from support.environment import needs
from support.exhaustive import quick
from support.ranks import Cases

needs("deepspeed", "accelerate", "trl", "datasets")

LOOPS = {"trainer": "trainer", "sft": "loops", "accelerate": "loops"}
NAMES = {name: (loop, n) for loop in LOOPS for (_, n), name in accumulated_cases(loop).items()}
QUICK = {"accumulated-accelerate-zero3-2"}


@pytest.fixture(scope="module")
def results(pools):
    return {loop: Cases(pools, worker) for loop, worker in LOOPS.items()}


@pytest.mark.parametrize("name", quick(NAMES, QUICK))
def test_goes_on_bit_for_bit(results, name):
    loop, accumulation = NAMES[name]
    got = results[loop][name]
    straight, resumed = got["straight"], got["resumed"]
    assert resumed["losses"] == straight["losses"]
    different = [n for n, w in straight["weights"].items() if not torch.equal(w, resumed["weights"][n])]
    assert not different
    if loop == "accelerate":
        assert straight["applied"] == resumed["applied"] == -(-ACCUMULATED_BATCHES // accumulation)
        assert "no optimizer step has used yet" in straight["refused"]
