"""Hugging Face's Trainer on two real ranks, RSO from the DeepSpeed JSON, against the float64 reference."""

from __future__ import annotations

import pytest
import torch
from cases.deepspeed_cases import MICRO, RANK, RSO_DEFAULTS
from cases.trainer_cases import ENGINES, LR, SAVE_AT, STEPS, cases, lr_scale, weight_decay
from reference.rso import Settings, train
from support import tiny_llama
from support.environment import needs
from support.exhaustive import quick
from support.observed_norms import check_observed
from support.ranks import Cases

needs("deepspeed", "accelerate")


@pytest.fixture(scope="module")
def results(pools):
    return Cases(pools, "trainer")


def reference(spec, accumulation: int = 1):
    settings = Settings(
        groups=tiny_llama.groups(), rank=RANK, eps=RSO_DEFAULTS["eps"], lr=LR, clip=0.5,
        weight_decay=weight_decay(spec), form="two_path" if "stage" in spec else "folded",
    )  # fmt: skip
    batches = [list(tiny_llama.tokens(i, MICRO * 2 * accumulation).split(MICRO)) for i in range(STEPS)]
    return train(tiny_llama.build().double(), settings, tiny_llama.loss_of, batches, lr_scale())


def largest(a, b):
    return max(abs(x - y) for x, y in zip(a, b, strict=True))


QUICK = {*ENGINES, "zero2-accumulation", "zero3-checkpointing-reentrant"}


@pytest.mark.parametrize("name", quick(cases(), QUICK))
def test_training_equals_the_reference(results, name):
    spec, got = cases()[name], results[name]
    expected = reference(spec, spec.get("arguments", {}).get("gradient_accumulation_steps", 1))
    tolerance = spec["tolerance"]
    assert got["draw"] == 4
    if "stage" not in spec:
        compiled = "compiled" in name
        fsdp = ("FSDPLayout", "FSDPOptimizedModule" if compiled else "FSDPLlamaForCausalLM")
        ddp = ("ReplicatedLayout", "OptimizedModule" if compiled else "DistributedDataParallel")
        wrappers = fsdp if "fsdp" in name else ddp
        assert (got["layout"], got["wrapper"]) == wrappers
    assert largest(got["losses"], expected.losses) < tolerance
    if "bf16" not in name:
        assert got["weights"].keys() >= expected.weights.keys()
        for key, weight in expected.weights.items():
            assert (got["weights"][key] - weight).abs().max() < tolerance, key
        check_observed(got["observed"], expected, RSO_DEFAULTS, tolerance=1e-4)
    assert all(entry["comm_bytes_per_step"] > 0 < entry["peak_memory_bytes"] for entry in got["observed"])


@pytest.mark.parametrize("engine", ENGINES)
def test_resume_is_bitwise(results, engine):
    got = results[f"resume-{engine}"]
    assert got["resumed"]["losses"] == got["straight"]["losses"]
    for name, weight in got["straight"]["weights"].items():
        assert torch.equal(weight, got["resumed"]["weights"][name]), name


@pytest.mark.parametrize("engine", ENGINES)
def test_the_model_in_a_checkpoint_is_dense(results, engine):
    from transformers import AutoModelForCausalLM

    saved = results[f"resume-{engine}"]["saved"]
    model = AutoModelForCausalLM.from_pretrained(results.folder / f"resume-{engine}" / f"checkpoint-{SAVE_AT}")
    assert model.state_dict().keys() == saved.keys()
    for name, weight in model.state_dict().items():
        assert torch.equal(weight, saved[name]), name


@pytest.mark.parametrize("engine", ["zero2", "zero3", "ddp", "fsdp2", "ddp-only-model"])
def test_the_best_model_is_loaded_evaluated_and_saved(results, engine):
    from transformers import AutoModelForCausalLM

    got = results[f"best-{engine}"]
    best = min(got["evaluations"][:-1])
    assert got["evaluations"][3] > best + 0.1, "the last steps were to spoil the model"
    assert got["again"] == pytest.approx(best, abs=1e-5)
    assert got["predicted"] == pytest.approx(best, abs=1e-5)
    assert got["shape"] == (8, tiny_llama.SEQ, tiny_llama.VOCAB)
    model = AutoModelForCausalLM.from_pretrained(results.folder / f"best-{engine}")
    ids = torch.cat([tiny_llama.tokens(step, 4) for step in range(2)])
    with torch.no_grad():
        assert model(input_ids=ids, labels=ids).loss.item() == pytest.approx(best, abs=1e-4)


def test_refusals():
    from transformers import Trainer, TrainingArguments

    from rso_ds.errors import RSOConfigError
    from rso_ds.integrations.trainer import with_rso

    def start(rso, **more):
        args = TrainingArguments("unused", use_cpu=True, report_to="none")
        with_rso(Trainer)(tiny_llama.build(), args, rso=rso, **more)

    with pytest.raises(RSOConfigError, match="'lr' is set by learning_rate of TrainingArguments"):
        start({"lr": 1e-3})
    with pytest.raises(RSOConfigError, match="intervall.*interval"):
        start({"intervall": 3})
    with pytest.raises(RSOConfigError, match="optimizer in code"):
        start({"rank": 4}, optimizer_cls_and_kwargs=(torch.optim.AdamW, {}))
