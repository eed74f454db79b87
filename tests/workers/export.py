"""One rank: train under every engine, save a checkpoint in the middle of a subspace, and the weights it stands for."""

import contextlib
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from cases.export_cases import CASES, MICRO, STEPS
from support import tiny_llama
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.nn.parallel import DistributedDataParallel

import rso_ds
from rso_ds.checkpoint import dense_state_dict

VOCAB = 63


def micro_batch(step):
    ids = tiny_llama.tokens(step, MICRO * dist.get_world_size(), VOCAB)
    return ids.chunk(dist.get_world_size())[dist.get_rank()]


def under_deepspeed(spec, model, rso):
    config = {"train_micro_batch_size_per_gpu": MICRO, "zero_optimization": {"stage": spec["stage"]}, **spec["json"]}
    config["optimizer"] = {"type": "RSO", "params": rso}
    engine, *_ = rso_ds.initialize(model=model, model_parameters=model.parameters(), config=config)
    for step in range(STEPS):
        engine.backward(tiny_llama.loss_of(engine, micro_batch(step)))
        engine.step()
    engine.save_checkpoint(spec["folder"])
    weights = dense_state_dict(engine.module)
    with contextlib.suppress(Exception):
        engine.destroy()
    return weights


def under_torch(spec, model, rso):
    config = rso_ds.RSOConfig(**rso)
    rso_ds.convert(model, config)
    bare = model
    if spec["engine"] == "ddp":
        model = DistributedDataParallel(model)
    else:
        options = {"mesh": init_device_mesh("cpu", (dist.get_world_size(),))}
        if spec["precision"] == "bf16":
            options["mp_policy"] = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
        for block in model.model.layers:
            fully_shard(block, **options)
        fully_shard(model, **options)
    optimizer = rso_ds.RSO(model, config)
    for step in range(STEPS):
        optimizer.zero_grad()
        tiny_llama.loss_of(model, micro_batch(step)).backward()
        optimizer.step()
    with torch.no_grad():  # leaves FSDP2's root gathered, in the dtype it computes in
        tiny_llama.loss_of(model, micro_batch(0))
    checkpoints = optimizer.checkpointer()
    checkpoints.save(spec["folder"], "a")
    checkpoints.load(spec["folder"])
    optimizer.meet()
    with torch.no_grad():  # P as the run has it, not as the checkpoint just loaded drew it
        tiny_llama.loss_of(model, micro_batch(0))
    return dense_state_dict(bare)


def run(case: str, folder: Path) -> dict[str, Any]:
    spec = CASES[case]
    rso = {"lr": 1e-2, "rank": 5, "interval": 3, **spec["rso"]}
    model = tiny_llama.build(24 if spec["moe"] else 85, vocab=VOCAB, tie=spec["tie"], moe=spec["moe"])
    under = under_torch if spec["engine"] in ("ddp", "fsdp2") else under_deepspeed
    return {"weights": under({**spec, "folder": folder / case}, model, rso)}
