"""One rank: RSO in the loops of Accelerate, TRL and Lightning."""

import gc
import os
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from accelerate import Accelerator, DeepSpeedPlugin
from accelerate.state import AcceleratorState, GradientState, PartialState
from accelerate.utils import DummyOptim, DummyScheduler
from cases.deepspeed_cases import MICRO, RSO_DEFAULTS
from cases.trainer_cases import (
    ACCUMULATED_BATCHES,
    LR,
    RSO_KEYS,
    SAVE_AT,
    STEPS,
    Tokens,
    accumulated_cases,
    arguments,
    deepspeed_json,
)
from support import tiny_llama
from torch.utils.data import DataLoader, Subset

import rso_ds
from rso_ds.checkpoint import dense_state_dict

OUT = Path()  # of the case that runs


def forget():
    AcceleratorState._reset_state()
    GradientState._reset_state()
    PartialState._reset_state()
    for name in [n for n in os.environ if n.startswith("ACCELERATE_")]:
        del os.environ[name]
    gc.collect()


def mean_over_ranks(losses):
    total = torch.tensor(losses)
    dist.all_reduce(total)
    return (total / dist.get_world_size()).tolist()


def accelerate_parts(stage, accumulation=1, batches=STEPS):
    """What a program that knows Accelerate, and of RSO only the JSON, prepares."""
    config = deepspeed_json(stage)
    config["gradient_accumulation_steps"] = accumulation
    config["optimizer"]["params"]["eps"] = RSO_DEFAULTS["eps"]
    config["optimizer"]["params"]["betas"] = [0.9, 0.999]
    config["gradient_clipping"] = 0.5
    PartialState(cpu=True, backend="gloo")  # else Accelerate counts one process where there is no GPU
    accelerator = Accelerator(deepspeed_plugin=DeepSpeedPlugin(hf_ds_config=config))
    model = tiny_llama.build()
    loader = DataLoader(Tokens(batches, MICRO * accelerator.num_processes), batch_size=MICRO)
    optimizer = DummyOptim(model.parameters(), lr=LR, weight_decay=0.0)
    schedule = DummyScheduler(optimizer, lr_scheduler_callable=lambda o: torch.optim.lr_scheduler.LambdaLR(o, rate))
    return accelerator, *accelerator.prepare(model, optimizer, loader, schedule)


def rate(step):
    return 1.0 / (1 + step)


def accelerate_steps(accelerator, model, optimizer, loader, schedule, first, last):
    losses = []
    for batch in list(loader)[first:last]:
        with accelerator.accumulate(model):
            loss = model(**batch, use_cache=False).loss
            accelerator.backward(loss)
            if accelerator.distributed_type != "DEEPSPEED":
                accelerator.clip_grad_norm_(model.parameters(), 0.5)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
        losses.append(loss.item())
    return mean_over_ranks(losses)


def accelerate_deepspeed(stage):
    folder = OUT / f"accelerate{stage}"
    parts = accelerate_parts(stage)
    losses = accelerate_steps(*parts, 0, SAVE_AT)
    parts[0].save_state(folder)
    losses += accelerate_steps(*parts, SAVE_AT, STEPS)
    weights = dense_state_dict(parts[1].module)
    accelerator, engine = parts[:2]
    accelerator.unwrap_model(engine).save_pretrained(
        folder / "model",
        is_main_process=accelerator.is_main_process,
        save_function=accelerator.save,
        state_dict=accelerator.get_state_dict(engine),
    )
    engine.destroy()
    forget()
    parts = accelerate_parts(stage)
    parts[0].load_state(folder)
    again = losses[:SAVE_AT] + accelerate_steps(*parts, SAVE_AT, STEPS)
    resumed = dense_state_dict(parts[1].module)
    parts[1].destroy()
    forget()
    return {"losses": losses, "weights": weights, "again": again, "resumed": resumed}


def accelerate_accumulated(stage, accumulation, name):
    """One epoch whose last accumulation is short, saved after every step; then on from the middle of it."""

    def epoch(skip=0):
        parts = accelerate_parts(stage, accumulation, ACCUMULATED_BATCHES)
        accelerator, model, optimizer, loader, schedule = parts
        losses, refused = [], None
        if skip:
            accelerator.load_state(OUT / name / str(skip))
            loader = accelerator.skip_first_batches(loader, skip)
        for i, batch in enumerate(loader, skip + 1):
            with accelerator.accumulate(model):
                loss = model(**batch, use_cache=False).loss
                accelerator.backward(loss)
                optimizer.step()
                schedule.step()
                optimizer.zero_grad()
            losses.append(loss.item())
            if accelerator.sync_gradients:
                accelerator.save_state(OUT / name / str(i))
            elif refused is None:
                try:
                    accelerator.save_state(OUT / name / "refused")
                except rso_ds.RSOUnsupportedError as error:
                    refused = str(error)
        weights, applied = dense_state_dict(model.module), model.rso.applied_steps
        model.destroy()
        forget()
        return {"losses": losses, "weights": weights, "refused": refused, "applied": applied}

    middle = ACCUMULATED_BATCHES // 2 // accumulation * accumulation
    straight, resumed = epoch(), epoch(middle)
    straight["losses"] = straight["losses"][middle:]
    return {"straight": straight, "resumed": resumed}


def accelerate_ddp():
    accelerator = Accelerator(cpu=True)
    config = rso_ds.RSOConfig(lr=LR, eps=RSO_DEFAULTS["eps"], **RSO_KEYS)
    model = tiny_llama.build()
    rso_ds.convert(model, config)
    loader = DataLoader(Tokens(STEPS, MICRO * accelerator.num_processes), batch_size=MICRO)
    model, loader = accelerator.prepare(model, loader)
    optimizer = accelerator.prepare(rso_ds.RSO(model, config))
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer.optimizer, rate)
    losses = accelerate_steps(accelerator, model, optimizer, loader, schedule, 0, STEPS)
    weights = dense_state_dict(accelerator.unwrap_model(model))
    forget()
    return {"losses": losses, "weights": weights}


def sft(engine, name=None, resume_from=None, rows=None, **more_options):
    """TRL's trainer over ready token ids; the same steps as Hugging Face's."""
    import datasets
    from torch.utils.data import SequentialSampler
    from transformers import PreTrainedTokenizerFast
    from transformers.integrations.deepspeed import unset_hf_deepspeed_config
    from trl import SFTConfig, SFTTrainer

    from rso_ds.integrations.trainer import with_rso

    class InOrder(SFTTrainer):
        def _get_train_sampler(self, *_, **__):
            return SequentialSampler(self.train_dataset)

    kind, more = InOrder, {}
    if engine == "ddp":
        kind, more = with_rso(InOrder), {"rso": RSO_KEYS}
    else:
        more["args"] = {"deepspeed": deepspeed_json(int(engine.removeprefix("zero")))}
    extra = {**more.pop("args", {}), **more_options}
    options = arguments(weight_decay=0.0, gradient_checkpointing=False, **extra)
    rows = (Tokens(STEPS, MICRO * dist.get_world_size()) if rows is None else rows).ids.tolist()
    tokenizer = PreTrainedTokenizerFast(tokenizer_file=str(OUT / "tokenizer.json"), eos_token="0", pad_token="1")
    trainer = kind(
        model=tiny_llama.build(),
        args=SFTConfig(str(OUT / (name or f"sft-{engine}")), **options),
        train_dataset=datasets.Dataset.from_dict({"input_ids": rows}),
        processing_class=tokenizer,
        **more,
    )
    trainer.train(resume_from_checkpoint=resume_from)
    trainer.save_model()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    weights = dense_state_dict(trainer.accelerator.unwrap_model(trainer.model))
    if engine != "ddp":
        trainer.model_wrapped.destroy()
    unset_hf_deepspeed_config()
    forget()
    return {"losses": losses, "weights": weights}


def sft_accumulated(engine, accumulation, name):
    """Two epochs whose last accumulation is short, saved at every step; then on from the middle of the second."""
    steps = -(-ACCUMULATED_BATCHES // accumulation)
    options = {
        "rows": Tokens(1, ACCUMULATED_BATCHES * MICRO * dist.get_world_size()),
        "gradient_accumulation_steps": accumulation,
        "num_train_epochs": 2,
        "max_steps": -1,
        "save_strategy": "steps",
        "save_steps": 1,
    }
    straight = sft(engine, name, **options)
    again = sft(engine, f"{name}-again", str(OUT / name / f"checkpoint-{steps + steps // 2}"), **options)
    return {"straight": straight, "resumed": again}


def write_tokenizer():
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = Tokenizer(models.WordLevel({str(i): i for i in range(tiny_llama.VOCAB)}, unk_token="0"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    words.save(str(OUT / "tokenizer.json"))


def lightning(stage):
    """Lightning's DeepSpeed strategy, which insists on CUDA and is told here that the CPU will do."""
    import lightning.pytorch as pl
    from lightning.pytorch.plugins.environments import TorchElasticEnvironment
    from lightning.pytorch.strategies import DeepSpeedStrategy

    class Module(pl.LightningModule):
        def __init__(self):
            super().__init__()
            self.model = tiny_llama.build()
            self.losses = []

        def training_step(self, batch, _):
            loss = self.model(**batch, use_cache=False).loss
            self.losses.append(loss.item())
            return loss

        def configure_optimizers(self):
            return None

    class OnCPU(DeepSpeedStrategy):
        def setup_environment(self):
            super(DeepSpeedStrategy, self).setup_environment()

        @property
        def root_device(self):
            return torch.device("cpu", self.local_rank)

        def setup_distributed(self):
            self.set_world_ranks()
            self._init_deepspeed_distributed()

    config = deepspeed_json(stage)
    config["optimizer"]["params"] |= {"lr": LR, "weight_decay": 0.0, "betas": [0.9, 0.999], "eps": RSO_DEFAULTS["eps"]}
    config["train_micro_batch_size_per_gpu"] = MICRO
    del config["gradient_accumulation_steps"], config["gradient_clipping"]  # Lightning sets them
    config["bf16"]["enabled"] = False
    module = Module()
    strategy = OnCPU(config=config, cluster_environment=TorchElasticEnvironment(), process_group_backend="gloo")
    trainer = pl.Trainer(
        accelerator="cpu", devices=2, strategy=strategy, max_steps=STEPS, logger=False, enable_progress_bar=False,
        gradient_clip_val=0.5, use_distributed_sampler=False,
        enable_checkpointing=False, default_root_dir=OUT,
    )  # fmt: skip
    data = Tokens(STEPS, MICRO * dist.get_world_size())
    mine = [i for i in range(len(data)) if i // MICRO % dist.get_world_size() == dist.get_rank()]
    trainer.fit(module, DataLoader(Subset(data, mine), batch_size=MICRO))
    folder = OUT / f"lightning{stage}"
    trainer.save_checkpoint(folder)
    straight = dense_state_dict(module.model)
    for param in module.parameters():
        getattr(param, "ds_tensor", param).data.zero_()
    strategy.deepspeed_engine.load_checkpoint(folder, tag="checkpoint")
    kept = {n: p.clone() for n, p in dense_state_dict(module.model).items()}
    same = all(torch.equal(straight[n], p) for n, p in kept.items())
    return {"losses": mean_over_ranks(module.losses), "weights": straight, "loaded_is_saved": same}


WORK: dict[str, Any] = {f"accelerate-zero{stage}": (accelerate_deepspeed, stage) for stage in range(4)}
WORK["accelerate-ddp"] = (accelerate_ddp,)
WORK["sft-zero2"] = (sft, "zero2")
WORK["sft-ddp"] = (sft, "ddp")
for (engine, accumulation), name in accumulated_cases("accelerate").items():
    WORK[name] = (accelerate_accumulated, int(engine.removeprefix("zero")), accumulation, name)
for (engine, accumulation), name in accumulated_cases("sft").items():
    WORK[name] = (sft_accumulated, engine, accumulation, name)
WORK["lightning-zero2"] = (lightning, 2)
WORK["lightning-zero3"] = (lightning, 3)


def run(case: str, folder: Path) -> dict[str, Any]:
    global OUT
    OUT = folder
    if dist.get_rank() == 0:
        write_tokenizer()
    dist.barrier()
    act, *arguments = WORK[case]
    return act(*arguments)
