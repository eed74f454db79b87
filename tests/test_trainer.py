"""Hugging Face's Trainer on two real ranks, RSO from the DeepSpeed JSON, against the float64 reference."""

from __future__ import annotations

import pytest
import tiny_llama
import torch
from deepspeed_cases import MICRO, RANK, RSO_DEFAULTS
from ranks import run_ranks
from reference import Settings, train
from trainer_cases import LR, SAVE_AT, STEPS, cases, lr_scale

pytest.importorskip("deepspeed")
pytest.importorskip("accelerate")


@pytest.fixture(scope="module")
def out(tmp_path_factory):
    folder = tmp_path_factory.mktemp("trainer")
    run_ranks("trainer", folder)
    return folder


@pytest.fixture(scope="module")
def results(out):
    found = torch.load(out / "trainer.pt", weights_only=False)
    for name, result in found.items():
        assert "error" not in result, f"{name}: {result['error']}"
    return found


def reference(accumulation: int = 1, carry_over: str = "row_mean_second"):
    settings = Settings(
        groups=tiny_llama.groups(), rank=RANK, eps=RSO_DEFAULTS["eps"], lr=LR, weight_decay=0.1, clip=0.5,
        carry_over=carry_over,
    )  # fmt: skip
    batches = [list(tiny_llama.tokens(i, MICRO * 2 * accumulation).split(MICRO)) for i in range(STEPS)]
    return train(tiny_llama.build().double(), settings, tiny_llama.loss_of, batches, lr_scale())


def largest(a, b):
    return max(abs(x - y) for x, y in zip(a, b, strict=True))


@pytest.mark.parametrize("name", cases())
def test_training_equals_the_reference(results, name):
    spec, got = cases()[name], results[name]
    expected = reference(spec.get("arguments", {}).get("gradient_accumulation_steps", 1))
    tolerance = spec.get("tolerance", 2e-5)
    assert got["draw"] == 4
    # Trainer rounds what it logs to four digits at some verbosity; never worse than that.
    assert largest(got["losses"], expected.losses) < max(tolerance, 1e-4)
    if "bf16" not in name:
        assert got["weights"].keys() >= expected.weights.keys()
        for key, weight in expected.weights.items():
            assert (got["weights"][key] - weight).abs().max() < tolerance, key


@pytest.mark.parametrize("stage", range(4))
def test_resume_is_bitwise(results, stage):
    got = results[f"resume-zero{stage}"]
    assert got["resumed"]["losses"] == got["straight"]["losses"]
    for name, weight in got["straight"]["weights"].items():
        assert torch.equal(weight, got["resumed"]["weights"][name]), name


@pytest.mark.parametrize("stage", range(4))
def test_the_model_in_a_checkpoint_is_dense(out, results, stage):
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(out / f"resume{stage}" / f"checkpoint-{SAVE_AT}")
    saved = results[f"resume-zero{stage}"]["saved"]
    assert model.state_dict().keys() == saved.keys()
    for name, weight in model.state_dict().items():
        assert torch.equal(weight, saved[name]), name


@pytest.mark.parametrize("stage", [2, 3])
def test_the_best_model_is_loaded_evaluated_and_saved(out, results, stage):
    from transformers import AutoModelForCausalLM

    got = results[f"best-zero{stage}"]
    best = min(got["evaluations"][:-1])
    assert got["evaluations"][3] > best + 0.1, "the last steps were to spoil the model"
    assert got["again"] == pytest.approx(best, abs=1e-5)
    assert got["predicted"] == pytest.approx(best, abs=1e-5)
    assert got["shape"] == (8, tiny_llama.SEQ, tiny_llama.VOCAB)
    model = AutoModelForCausalLM.from_pretrained(out / f"best{stage}")
    ids = torch.cat([tiny_llama.tokens(step, 4) for step in range(2)])
    with torch.no_grad():
        assert model(input_ids=ids, labels=ids).loss.item() == pytest.approx(best, abs=1e-4)
