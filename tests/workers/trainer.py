"""One rank: Hugging Face's Trainer with RSO from the DeepSpeed JSON; ``import rso_ds`` is the only line for it."""

import gc
import os
import sys
from pathlib import Path

import tiny_llama
import torch.distributed as dist
from accelerate.state import AcceleratorState, GradientState
from case_runner import run_cases
from deepspeed_cases import MICRO
from torch.utils.data import SequentialSampler
from trainer_cases import SAVE_AT, STEPS, Tokens, arguments, cases, deepspeed_json
from transformers import AutoModelForCausalLM, Trainer, TrainerCallback, TrainingArguments
from transformers.integrations.deepspeed import unset_hf_deepspeed_config

import rso_ds

OUT = Path(sys.argv[1])
START = OUT / "start"


class InOrder(Trainer):
    def _get_train_sampler(self, *_, **__):
        return SequentialSampler(self.train_dataset)


def trainer_of(spec, name, steps=STEPS, **options):
    options = {**spec.get("arguments", {}), **options}
    micro_batches = options.get("gradient_accumulation_steps", 1) * dist.get_world_size()
    json = deepspeed_json(spec["stage"], spec.get("rso"), **spec.get("zero", {}))
    args = TrainingArguments(str(OUT / name), deepspeed=json, **arguments(**options))
    model = AutoModelForCausalLM.from_pretrained(START, attn_implementation="eager")  # zero.Init at stage 3
    data = Tokens(steps, MICRO * micro_batches)
    return InOrder(model, args, train_dataset=data, eval_dataset=Tokens(2, 4))


def forget(trainer):
    trainer.model_wrapped.destroy()
    unset_hf_deepspeed_config()
    AcceleratorState._reset_state()
    GradientState._reset_state()
    os.environ.pop("ACCELERATE_MIXED_PRECISION", None)
    gc.collect()


def losses(trainer):
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def result_of(trainer, **more):
    found = {
        "losses": losses(trainer),
        "evaluations": [entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry],
        "weights": rso_ds.checkpoint.dense_state_dict(trainer.model_wrapped.module),
        "draw": trainer.model_wrapped.rso.draw,
        **more,
    }
    forget(trainer)
    return found


def train(spec):
    trainer = trainer_of(spec, f"train{spec['stage']}")
    trainer.train()
    return result_of(trainer)


def resume(spec):
    """A run that goes through, one that ends in the middle, and the rest of that."""
    name = f"resume{spec['stage']}"
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


def best(spec):
    """The evaluation loss is best in the middle: from there on the learning rate is absurd."""
    options = {"save_strategy": "steps", "save_steps": 3, "eval_strategy": "steps", "eval_steps": 3}
    trainer = trainer_of(spec, f"best{spec['stage']}", load_best_model_at_end=True, **options)

    class Spoil(TrainerCallback):
        def on_step_end(self, args, state, control, model=None, **_):
            if state.global_step > 6:
                for group in trainer.model_wrapped.optimizer.param_groups:
                    group["lr"] = 1.0

    trainer.args.lr_scheduler_type = "constant"
    trainer.add_callback(Spoil())
    trainer.train()
    again = trainer.evaluate()["eval_loss"]
    predicted = trainer.predict(Tokens(2, 4))
    trainer.save_model()
    return result_of(trainer, again=again, predicted=predicted.metrics["test_loss"], shape=predicted.predictions.shape)


def dispatch(spec):
    return {"train": train, "resume": resume, "best": best}[spec.get("do", "train")](spec)


dist.init_process_group("gloo")
if dist.get_rank() == 0:
    tiny_llama.build().save_pretrained(START)
dist.barrier()
work = dict(cases())
for stage in range(4):
    work[f"resume-zero{stage}"] = {"stage": stage, "do": "resume", "rso": {"carry_over": "project"}}
for stage in (2, 3):
    work[f"best-zero{stage}"] = {"stage": stage, "do": "best"}
only = sys.argv[2:]
run_cases({n: s for n, s in work.items() if not only or n in only}, dispatch, OUT / "trainer.pt")
dist.destroy_process_group()
