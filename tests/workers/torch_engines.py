"""One rank: train a case of tests/cases/torch_cases.py under DDP, FSDP2 or HSDP; what it did."""

from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from cases.torch_cases import MICRO, four_rank_cases, two_rank_cases
from support import tiny_llama
from support.graphs import compiled_graphs
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.nn.parallel import DistributedDataParallel

import rso_ds
from rso_ds.checkpoint import dense_state_dict
from rso_ds.comm import BucketCompression, compress_hook, install
from rso_ds.engines.observer import Observer

CASES = {2: two_rank_cases(), 4: four_rank_cases()}


def wrap(model, spec):
    """(wrapped model, keyword arguments for RSO)."""
    if spec["engine"] == "ddp":
        wrapped = DistributedDataParallel(model)
        if spec["hook"]:
            wrapped.register_comm_hook(BucketCompression(wrapped, spec["hook"]), compress_hook)
        return wrapped, {}
    options = {"reshard_after_forward": spec["reshard"]}
    extra = {}
    if spec["precision"] == "bf16":
        options["mp_policy"] = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    if spec["engine"] == "hsdp":
        mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicas", "shards"))
        options["mesh"] = mesh
        if spec["rso"].get("communicate") == "boundary":
            options["mesh"] = mesh["shards"]
            extra["replicas"] = mesh["replicas"].get_group()
    else:
        options["mesh"] = init_device_mesh("cpu", (dist.get_world_size(),))
    for block in model.model.layers:
        fully_shard(block, **options)
    fully_shard(model, **options)
    return model, extra


def run(case: str, _: Path) -> dict[str, Any]:
    rank, world = dist.get_rank(), dist.get_world_size()
    spec = CASES[world][case]
    config = rso_ds.RSOConfig(**spec["rso"])
    model = tiny_llama.build(spec["intermediate"], **spec["model"])
    if spec["checkpointing"]:
        model.gradient_checkpointing_enable({"use_reentrant": spec["checkpointing"] == "reentrant"})
    if spec["precision"] == "bf16_weights":
        model.bfloat16()
    rso_ds.convert(model, config)
    if spec["compiled"]:
        torch._dynamo.reset()  # graphs of other cases would do
        for block in model.model.layers:
            block.compile(backend="aot_eager")
    bare = model
    model, extra = wrap(model, spec)
    optimizer = rso_ds.RSO(model, config, **extra)
    model.train()
    losses, traffic = [], install()
    graphs, graphs_before = [], compiled_graphs()
    observed, observer = [], Observer(optimizer.boundary)
    before = {kind: traffic.total(kind) for kind in ("gradient", "weights", "boundary")}
    for step in range(spec["steps"]):
        ids = tiny_llama.tokens(step, MICRO * world * spec["gas"], spec["model"].get("vocab", tiny_llama.VOCAB))
        total = 0.0
        observer.watch_step()
        optimizer.zero_grad()
        micros = ids.view(spec["gas"], world, MICRO, -1)[:, rank]
        for i, micro in enumerate(micros):
            last = i == len(micros) - 1
            sync = nullcontext() if last or spec["engine"] != "ddp" else model.no_sync()
            if spec["engine"] != "ddp":
                model.set_requires_gradient_sync(last)
            with sync:
                loss = tiny_llama.loss_of(model, micro) / spec["gas"]
                (loss * (float("inf") if step in spec["poisoned"] and rank == 1 else 1.0)).backward()
            total += loss.item()
        if spec["evaluate"]:  # between backward and step it leaves FSDP2's root gathered
            with torch.no_grad():
                tiny_llama.loss_of(model, ids[:MICRO])
        if spec["clip"]:
            nn.utils.clip_grad_norm_(model.parameters(), spec["clip"])
        optimizer.step()
        losses.append(total)
        observed.append(observer.record())
        graphs.append(compiled_graphs() - graphs_before)
    mean = torch.tensor(losses)
    dist.all_reduce(mean)
    return {
        "losses": (mean / world).tolist(),
        "observed": observed,
        "graphs": graphs,
        "form": optimizer.boundary.config.form,
        "draw": optimizer.boundary.draw,
        "applied": optimizer.boundary.applied_steps,
        "trainable": sum(p.numel() for p in bare.parameters() if p.requires_grad),
        "bytes": {kind: traffic.total(kind) - n for kind, n in before.items()},
        "weights": dense_state_dict(bare),
    }
