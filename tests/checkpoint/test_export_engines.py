"""``rso-ds export`` of checkpoints that two real ranks wrote, under every engine."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("deepspeed")
from cases.export_cases import CASES
from safetensors.torch import load_file
from support.ranks import run_ranks
from transformers import AutoModelForCausalLM

from rso_ds.checkpoint.export import export_dense


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("export")
    run_ranks("export", folder)
    return folder, torch.load(folder / "weights.pt")


@pytest.mark.parametrize("name", CASES)
def test_equals_the_training_model(runs, tmp_path, name):
    folder, results = runs
    assert "error" not in results[name], results[name]["error"]
    expected = results[name]["weights"]
    export_dense(folder / name, tmp_path / "out")
    found = load_file(tmp_path / "out" / "model.safetensors")
    assert set(expected) - set(found) == ({"lm_head.weight"} if CASES[name]["tie"] else set())
    for key, tensor in found.items():
        assert tensor.dtype == expected[key].dtype, key
        assert torch.equal(tensor, expected[key]), key
    state = AutoModelForCausalLM.from_pretrained(tmp_path / "out").state_dict()
    assert all(torch.equal(state[key], tensor) for key, tensor in expected.items())
