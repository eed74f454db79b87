"""One rank: train an fp32 case under DeepSpeed; losses, final dense weights and what the run did."""

import contextlib
from pathlib import Path
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from cases.deepspeed_cases import MICRO, STEPS, fp32_cases
from support import tiny_llama
from support.graphs import compiled_graphs

import rso_ds
from rso_ds.checkpoint import dense_state_dict
from rso_ds.engines.observer import Observer

CASES = fp32_cases()


def run(case: str, _: Path) -> dict[str, Any]:
    spec = CASES[case]
    config = {**spec["json"], "optimizer": {"type": "RSO", "params": spec["rso"]}}
    rank, world = dist.get_rank(), dist.get_world_size()
    if spec["zero_init"]:
        # zero.Init partitions as the modules are made; give it the values of the plain model.
        values = tiny_llama.build(spec["intermediate"], **spec["model"]).state_dict()
        sizes = {"train_batch_size": MICRO * world * spec["gas"]}
        with deepspeed.zero.Init(config_dict_or_path={**spec["json"], **sizes}):
            model = tiny_llama.build(spec["intermediate"], **spec["model"])
        for name, param in model.named_parameters():
            with deepspeed.zero.GatheredParameters([param], modifier_rank=0):
                if rank == 0:
                    param.data.copy_(values[name])
    else:
        model = tiny_llama.build(spec["intermediate"], **spec["model"])
    if spec["checkpointing"]:
        model.gradient_checkpointing_enable({"use_reentrant": spec["checkpointing"] == "reentrant"})
    engine, *_ = rso_ds.initialize(model=model, model_parameters=model.parameters(), config=config)
    if spec["compiled"]:
        torch._dynamo.reset()  # graphs of other cases would do
        engine.compile(backend=spec["compiled"])
    engine.train()
    losses, lrs, observed, observer = [], [], [], Observer(engine.rso)
    graphs, graphs_before = [], compiled_graphs()
    sent_before = engine.traffic.total("gradient")  # the counter is the process's, not the engine's
    for step in range(STEPS):
        ids = tiny_llama.tokens(step, MICRO * world * spec["gas"], spec["model"].get("vocab", tiny_llama.VOCAB))
        lrs.append(engine.rso.layout.solver.param_groups[0]["lr"])
        total = 0.0
        observer.watch_step()
        for micro in ids.view(spec["gas"], world, MICRO, -1)[:, rank]:
            loss = tiny_llama.loss_of(engine, micro)
            engine.backward(loss)
            engine.step()
            total += loss.item() / spec["gas"]
        losses.append(total)
        observed.append(observer.record())
        graphs.append(compiled_graphs() - graphs_before)
    mean = torch.tensor(losses)
    dist.all_reduce(mean)
    result = {
        "losses": (mean / world).tolist(),
        "lrs": lrs,
        "observed": observed,
        "graphs": graphs,
        "form": engine.rso.config.form,
        "draw": engine.rso.draw,
        "applied": engine.rso.applied_steps,
        "solver": type(engine.rso.layout.solver).__name__,
        "optimizer": type(engine.optimizer).__name__,
        "cut_rows": sum(
            any(c % x.subspace.rank for c in engine.rso.layout.shard_boundaries(x)) for x in engine.rso.layers.values()
        ),
        "gradient_bytes": engine.traffic.total("gradient") - sent_before,
        "trainable": sum(getattr(p, "ds_numel", p.numel()) for p in model.parameters() if p.requires_grad),
        "weights": dense_state_dict(engine.module),
    }
    with contextlib.suppress(Exception):
        engine.destroy()
    return result
