"""``rso-ds export`` of checkpoints that two real ranks wrote, under every engine."""

from __future__ import annotations

import pytest
import torch
from cases.export_cases import CASES
from safetensors.torch import load_file
from support.environment import needs
from support.exhaustive import quick
from support.ranks import Cases
from transformers import AutoModelForCausalLM

from rso_ds.checkpoint.export import export_dense

needs("deepspeed")


@pytest.fixture(scope="module")
def runs(pools):
    return Cases(pools, "export")


QUICK = {"zero0-bf16", "zero1-bf16-masters", "zero2-bf16-tied", "zero3", "fsdp2-tied", "ddp-local"}


@pytest.mark.parametrize("name", quick(CASES, QUICK))
def test_equals_the_training_model(runs, tmp_path, name):
    expected = runs[name]["weights"]
    export_dense(runs.folder / name, tmp_path / "out")
    found = load_file(tmp_path / "out" / "model.safetensors")
    if CASES[name]["moe"] == "qwen3_moe":  # published expert by expert, fused again when it is loaded
        found = {key: tensor for key, tensor in found.items() if ".experts." not in key}
        found |= {key: tensor for key, tensor in expected.items() if ".experts." in key}
    assert set(expected) - set(found) == ({"lm_head.weight"} if CASES[name]["tie"] else set())
    for key, tensor in found.items():
        assert tensor.dtype == expected[key].dtype, key
        assert torch.equal(tensor, expected[key]), key
    state = AutoModelForCausalLM.from_pretrained(tmp_path / "out").state_dict()
    assert all(torch.equal(state[key], tensor) for key, tensor in expected.items())
