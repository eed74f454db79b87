"""One rank: the peaks of all phases of a run, measured, beside the account's."""

import gc
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from rso_ds.checkpoint import save_dense
from rso_ds.comm.rank_context import RankContext
from rso_ds.models import find_start
from rso_ds.planning.memory.account import Accountant, model_builder
from rso_ds.planning.memory.phases import PhasePeaks
from rso_ds.planning.memory.profile import phase_comparison
from rso_ds.planning.memory.states import Engine
from rso_ds.recipes.training.arguments import parse_arguments
from rso_ds.recipes.training.engines import build_engine
from rso_ds.recipes.training.held_out import held_out_loss

SEQ, MICRO, VOCAB, SHAPE = 64, 2, 2048, "llama-20m"
ENGINES = {"zero2": ("deepspeed", 2), "zero3": ("deepspeed", 3), "fsdp2": ("fsdp2", 3)}


class HeldOut:
    count, seq_len = 4, SEQ

    def sequences(self, indices: Any) -> torch.Tensor:
        return torch.stack([torch.arange(int(i), int(i) + SEQ) for i in indices])


def json_of(stage: int, precision: str, accumulation: int) -> dict[str, Any]:
    # A model of this size would fit into DeepSpeed's buckets as a whole.
    small = {"stage3_param_persistence_threshold": 0, "stage3_prefetch_bucket_size": 0}
    reuse = {"stage3_max_live_parameters": 0, "stage3_max_reuse_distance": 0}
    rso = {"rank_ratio": 0.25, "interval": 2, "form": "two_path", "torch_adam": True}
    return {
        "train_micro_batch_size_per_gpu": MICRO,
        "gradient_accumulation_steps": accumulation,
        "optimizer": {"type": "RSO", "params": rso},
        "zero_optimization": {"stage": stage, "reduce_bucket_size": 100_000, **small, **reuse},
        "bf16": {"enabled": precision == "bf16"},
    }  # fmt: skip


def run(case: str, folder: Path) -> dict[str, Any]:
    name, precision, *more = case.split("-")
    kind, stage = ENGINES[name]
    accumulation = 2 if "accumulated" in more else 1
    config = json_of(stage, precision, accumulation)
    world, rank = dist.get_world_size(), dist.get_rank()
    context = RankContext(rank, rank, world, False)
    flags = ["--model", SHAPE, "--seq-len", str(SEQ), "--engine", kind, "--init", "random"]
    peaks = PhasePeaks(on_gpu=False)
    gc.collect()
    peaks.begin()
    with peaks("start"):
        engine = build_engine(parse_arguments(flags), config, find_start(SHAPE), VOCAB, context)
    peaks.watch(engine.rso)
    ids = HeldOut().sequences(range(MICRO))
    for step in range(2):
        with peaks("evaluation"):
            held_out_loss(engine, HeldOut(), 4 * SEQ, MICRO, context)
        engine.train()
        with peaks("training"):
            for _ in range(accumulation):
                engine.backward(engine(input_ids=ids + step, labels=ids + step, use_cache=False).loss)
                engine.step()
    with peaks("save"):
        engine.checkpoints.save(folder / "checkpoints", "last", {})
        save_dense(engine.module, folder / "model", rank)
    peaks.end()
    accountant = Accountant(
        model_builder(engine.module.config),
        engine.rso.config,
        Engine.from_json(json_of(stage, precision, accumulation), world, "fsdp2" if kind == "fsdp2" else "zero"),
    )
    account = accountant.account("rso", MICRO, SEQ)
    if kind == "deepspeed":
        engine.destroy()
    return {"missing": account.missing, "phases": phase_comparison(peaks.bytes, account, on_gpu=False)}
