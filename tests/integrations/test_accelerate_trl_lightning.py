"""RSO in the loops of Accelerate, TRL and Lightning, on two real ranks, against the float64 reference."""

from __future__ import annotations

import pytest
import torch
from cases.deepspeed_cases import MICRO, RANK, RSO_DEFAULTS
from cases.trainer_cases import LR, STEPS, lr_scale
from reference.rso import Settings, train
from support import tiny_llama
from support.environment import needs
from support.ranks import Cases
from torch import nn

needs("deepspeed", "accelerate", "trl", "lightning", "datasets")


class Holder(nn.Module):
    """A model inside another module, as a LightningModule holds it."""

    def __init__(self) -> None:
        super().__init__()
        self.model = tiny_llama.build()

    def forward(self, **inputs):
        return self.model(**inputs)


@pytest.fixture(scope="module")
def results(pools):
    return Cases(pools, "loops")


def reference(scale, model=None, prefix=""):
    groups = [[prefix + name for name in members] for members in tiny_llama.groups().values()]
    groups = {"+".join(members): members for members in groups}
    settings = Settings(groups=groups, rank=RANK, eps=RSO_DEFAULTS["eps"], lr=LR, clip=0.5)
    batches = [list(tiny_llama.tokens(i, MICRO * 2).split(MICRO)) for i in range(STEPS)]
    model = tiny_llama.build() if model is None else model
    return train(model.double(), settings, tiny_llama.loss_of, batches, scale)


def compare(got, expected, prefix=""):
    assert max(abs(a - b) for a, b in zip(got["losses"], expected.losses, strict=True)) < 2e-5
    for name, weight in expected.weights.items():
        assert (got["weights"][name.removeprefix(prefix)] - weight).abs().max() < 2e-5, name


HARMONIC = [1 / (1 + step) for step in range(STEPS)]


@pytest.mark.parametrize("engine", ["zero0", "zero1", "zero2", "zero3", "ddp"])
def test_accelerate(results, engine):
    compare(results[f"accelerate-{engine}"], reference(HARMONIC))


@pytest.mark.parametrize("stage", range(4))
def test_accelerate_saves(results, stage):
    """save_state and load_state go on bit for bit; get_state_dict and save_pretrained give the dense model."""
    from transformers import AutoModelForCausalLM

    got = results[f"accelerate-zero{stage}"]
    assert got["again"] == got["losses"]
    model = AutoModelForCausalLM.from_pretrained(results.folder / f"accelerate{stage}" / "model")
    for name, weight in got["weights"].items():
        assert torch.equal(weight, got["resumed"][name]), name
        assert torch.equal(weight, model.state_dict()[name]), name


@pytest.mark.parametrize("engine", ["zero2", "ddp"])
def test_sft_trainer(results, engine):
    from transformers import AutoModelForCausalLM

    got = results[f"sft-{engine}"]
    compare(got, reference(lr_scale()))
    model = AutoModelForCausalLM.from_pretrained(results.folder / f"sft-{engine}")
    assert all(torch.equal(weight, got["weights"][name]) for name, weight in model.state_dict().items())


@pytest.mark.parametrize("stage", [2, 3])
def test_lightning(results, stage):
    """The names of the layers, and with them the draws, have the module's "model." in front."""
    got = results[f"lightning-zero{stage}"]
    compare(got, reference([1.0] * STEPS, Holder(), "model."), "model.")
    assert got["loaded_is_saved"]
