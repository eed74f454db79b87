"""One rank: Hugging Face's Trainer with RSO from the DeepSpeed JSON; ``import rso_ds`` is the only line for it."""

import gc
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch.distributed as dist
from accelerate.state import AcceleratorState, GradientState, PartialState
from accelerate.utils import DistributedType
from cases.deepspeed_cases import MICRO
from cases.trainer_cases import (
    ACCUMULATED_BATCHES,
    ENGINES,
    RSO_KEYS,
    SAVE_AT,
    STEPS,
    Tokens,
    accumulated_cases,
    arguments,
    cases,
    deepspeed_json,
    weight_decay,
)
from support import tiny_llama
from torch.utils.data import SequentialSampler
from transformers import AutoModelForCausalLM, Trainer, TrainerCallback, TrainingArguments
from transformers.integrations.deepspeed import unset_hf_deepspeed_config

import rso_ds
from rso_ds.integrations.logs import with_subspace_logs
from rso_ds.integrations.trainer import with_rso

OUT = START = Path()  # of the case that runs


class InOrder(Trainer):
    def _get_train_sampler(self, *_, **__):
        return SequentialSampler(self.train_dataset)


@contextmanager
def fsdp_on_cpu() -> Iterator[None]:
    """Accelerate refuses FSDP on CPU ranks, which torch's FSDP2 runs on: call them by another kind's name."""
    inner = PartialState.__init__

    def init(self, *args, **kwargs):
        inner(self, *args, **kwargs)
        if os.environ.get("ACCELERATE_USE_FSDP") == "true":
            self.distributed_type = DistributedType.MULTI_XPU

    PartialState.__init__ = init
    try:
        yield
    finally:
        PartialState.__init__ = inner


def trainer_of(spec, name, logs=False, **options):
    options = {**spec.get("arguments", {}), "weight_decay": weight_decay(spec), **options}
    micro_batches = options.get("gradient_accumulation_steps", 1) * dist.get_world_size()
    if "fsdp" in options:
        os.environ["ACCELERATE_USE_FSDP"] = "true"
    json = deepspeed_json(spec["stage"], spec.get("rso")) if "stage" in spec else None
    args = TrainingArguments(str(OUT / name), deepspeed=json, **arguments(**options))
    model = AutoModelForCausalLM.from_pretrained(START, attn_implementation="eager")  # zero.Init at stage 3
    kind, more = with_subspace_logs(InOrder) if logs else InOrder, {}
    if json is None:
        kind, more = with_rso(InOrder), {"rso": {**RSO_KEYS, **spec.get("rso", {})}}
    data = Tokens(STEPS, MICRO * micro_batches)
    return kind(model, args, train_dataset=data, eval_dataset=Tokens(2, 4), **more)


def bare_and_boundary(trainer):
    if trainer.is_deepspeed_enabled:
        return trainer.model_wrapped.module, trainer.model_wrapped.rso
    return trainer.accelerator.unwrap_model(trainer.model), trainer.optimizer.optimizer.boundary


def forget(trainer):
    if trainer.is_deepspeed_enabled:
        trainer.model_wrapped.destroy()
    unset_hf_deepspeed_config()
    AcceleratorState._reset_state()
    GradientState._reset_state()
    PartialState._reset_state()
    for name in [n for n in os.environ if n.startswith(("ACCELERATE_", "FSDP_"))]:
        del os.environ[name]
    gc.collect()


def losses(trainer):
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def result_of(trainer, **more):
    bare, boundary = bare_and_boundary(trainer)
    found = {
        "losses": losses(trainer),
        "observed": [entry for entry in trainer.state.log_history if "loss" in entry],
        "evaluations": [entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry],
        "weights": rso_ds.checkpoint.dense_state_dict(bare),
        "draw": boundary.draw,
        "layout": type(boundary.layout).__name__,
        "wrapper": type(trainer.model_wrapped).__name__,
        **more,
    }
    forget(trainer)
    return found


def train(spec):
    trainer = trainer_of(spec, "train", logs=True)
    trainer.train()
    return result_of(trainer)


def resume(spec):
    """A run that goes through, one that ends in the middle, and the rest of that."""
    name = spec["name"]
    straight = trainer_of(spec, name + "s")
    straight.train()
    straight = result_of(straight)
    options = {"save_strategy": "steps", "save_steps": SAVE_AT}
    first = trainer_of(spec, name, **options)

    class Stop(TrainerCallback):
        def on_save(self, args, state, control, **_):
            control.should_training_stop = True

    first.add_callback(Stop())
    first.train()
    saved = result_of(first)["weights"]
    second = trainer_of(spec, name, **options)
    second.train(resume_from_checkpoint=True)
    return {"straight": straight, "saved": saved, "resumed": result_of(second)}


def accumulated(spec):
    """Two epochs whose last accumulation is short, saved at every step; then on from the middle of the second."""
    name, steps = spec["name"], -(-ACCUMULATED_BATCHES // spec["accumulation"])
    options = {"gradient_accumulation_steps": spec["accumulation"], "num_train_epochs": 2, "max_steps": -1}

    def run(name, resume_from=None):
        trainer = trainer_of(spec, name, save_strategy="steps", save_steps=1, **options)
        trainer.train_dataset = Tokens(1, ACCUMULATED_BATCHES * MICRO * dist.get_world_size())
        trainer.train(resume_from_checkpoint=resume_from)
        return result_of(trainer)

    straight = run(name)
    again = run(f"{name}-again", str(OUT / name / f"checkpoint-{steps + steps // 2}"))
    return {"straight": straight, "resumed": again}


def best(spec):
    """The evaluation loss is best in the middle: from there on the learning rate is absurd."""
    options = {"save_strategy": "steps", "save_steps": 3, "eval_strategy": "steps", "eval_steps": 3}
    only_model = spec.get("only_model", False)
    trainer = trainer_of(spec, spec["name"], load_best_model_at_end=True, save_only_model=only_model, **options)

    class Spoil(TrainerCallback):
        def on_step_end(self, args, state, control, model=None, **_):
            if state.global_step > 6:
                for group in trainer.optimizer.param_groups:
                    group["lr"] = 1.0

    trainer.args.lr_scheduler_type = "constant"
    trainer.add_callback(Spoil())
    trainer.train()
    again = trainer.evaluate()["eval_loss"]
    predicted = trainer.predict(Tokens(2, 4))
    trainer.save_model()
    return result_of(trainer, again=again, predicted=predicted.metrics["test_loss"], shape=predicted.predictions.shape)


def dispatch(spec):
    kinds = {"train": train, "resume": resume, "best": best, "accumulated": accumulated}
    return kinds[spec.get("do", "train")](spec)


WORK: dict[str, dict[str, Any]] = dict(cases())
for engine, spec in ENGINES.items():
    resume_rso = {"carry_over": "project"}
    WORK[f"resume-{engine}"] = {**spec, "do": "resume", "rso": resume_rso, "name": f"resume-{engine}"}
for engine in ("zero2", "zero3", "ddp", "fsdp2"):
    WORK[f"best-{engine}"] = {**ENGINES[engine], "do": "best", "name": f"best-{engine}"}
WORK["best-ddp-only-model"] = {**ENGINES["ddp"], "do": "best", "name": "best-ddp-only-model", "only_model": True}
for (engine, accumulation), name in accumulated_cases("trainer").items():
    WORK[name] = {**ENGINES[engine], "do": "accumulated", "accumulation": accumulation, "name": name}


def run(case: str, folder: Path) -> dict[str, Any]:
    global OUT, START
    OUT, START = folder, folder / "start"
    if dist.get_rank() == 0 and not START.exists():
        tiny_llama.build().save_pretrained(START)
    dist.barrier()
    with fsdp_on_cpu():
        return dispatch(WORK[case])
