"""One rank: the bytes of a few steps of an engine and method, counted, beside the closed form."""

import contextlib
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from cases.comm_cases import INTERVAL, STEPS, cases, full_cases
from torch.distributed.algorithms.ddp_comm_hooks import powerSGD_hook
from torch.nn.parallel import DistributedDataParallel

import rso_ds
from rso_ds.comm import install
from rso_ds.comm.rank_context import RankContext
from rso_ds.models import llama_config
from rso_ds.planning.communication.exchange import Deployment, Exchange, powersgd, transfers
from rso_ds.planning.memory.methods import method
from rso_ds.recipes.training.torch_engine import TorchEngine
from rso_ds.solvers.groups import decay_groups


def build(spec):
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    config = llama_config(spec["model"], spec["vocab"])
    config.num_hidden_layers = spec["blocks"] or config.num_hidden_layers
    return AutoModelForCausalLM.from_config(config, dtype=torch.float32)


def ds_json(spec):
    optimizer = {"type": "AdamW", "params": {"lr": 1e-3, "torch_adam": True}}
    if spec["method"] == "rso":
        optimizer = {"type": "RSO", "params": {"interval": INTERVAL, "torch_adam": True, **spec["rso"]}}
    return {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": spec["gas"],
        "gradient_clipping": 0.0,
        "optimizer": optimizer,
        "zero_optimization": {"stage": spec["stage"], **spec["zero"]},
        **spec["json"],
    }


def engine_of(spec, model):
    config = ds_json(spec)
    if spec["engine"] == "zero":
        import deepspeed

        from rso_ds.engines.deepspeed import count_traffic, initialize

        start = initialize if spec["method"] == "rso" else deepspeed.initialize
        engine, *_ = start(model=model, model_parameters=decay_groups(model, 0.0), config=config)
        if spec["method"] != "rso":
            count_traffic(engine)
        return engine
    context = RankContext(dist.get_rank(), dist.get_rank(), dist.get_world_size(), False)
    engine = TorchEngine(model, config, spec["engine"], context, spec["replicas"])
    if spec["method"] == "powersgd":
        # It starts collectives from callbacks, whose order over several buckets gloo does not keep.
        engine._wrapped = DistributedDataParallel(model, bucket_cap_mb=1000)
        state = powerSGD_hook.PowerSGDState(
            None, spec["rank"], start_powerSGD_iter=2, min_compression_rate=1, use_error_feedback=True
        )
        engine._wrapped.register_comm_hook(state, powerSGD_hook.powerSGD_hook)
    if spec["method"] == "galore":
        use_galore(engine, spec["rank"])
    return engine


def use_galore(engine, rank):
    """Its own optimizer, which projects gradients after DDP has averaged them."""
    from galore_torch import GaLoreAdamW

    matrices = [p for n, p in engine.module.named_parameters() if "_proj" in n]
    others = [p for n, p in engine.module.named_parameters() if "_proj" not in n]
    galore = {"params": matrices, "rank": rank, "update_proj_gap": 200, "scale": 0.25, "proj_type": "std"}
    engine.optimizer = GaLoreAdamW([galore, {"params": others}], lr=1e-3)


def predicted(spec, model):
    """Payload bytes a step by kind. ``model`` as it is before training: dense, or RSO's conversion is made here."""
    rso = rso_ds.RSOConfig(interval=INTERVAL, **spec["rso"])
    name = spec["method"] if spec["method"] in ("rso", "lora", "galore") else "adamw"
    method(name, rso).prepare(model)
    exchange = Exchange.of(model, rso)
    kind = spec["engine"]
    deployment = Deployment.from_json(
        ds_json(spec), dist.get_world_size(), kind, spec["replicas"], spec["checkpointing"]
    )
    is_powersgd = spec["method"] == "powersgd"
    found = powersgd(exchange, deployment, spec["rank"]) if is_powersgd else transfers(exchange, deployment)
    totals = dict.fromkeys(("gradient", "weights", "boundary"), 0.0)
    for transfer in found:
        totals[transfer.kind] += transfer.payload
    return totals


@contextlib.contextmanager
def watched(traffic, model):
    """Yields a dict: gradient bytes handed over when backward has reached the input of the first block ("by_then"),
    and when it has ended ("in_all")."""
    found, start = {}, traffic.total("gradient")

    def reached(_):
        found["by_then"] = traffic.total("gradient") - start

    def look(block, args):
        if args[0].requires_grad:  # LoRA's embedding is frozen
            args[0].register_hook(reached)

    handle = model.model.layers[0].register_forward_pre_hook(look)
    yield found
    handle.remove()
    found["in_all"] = traffic.total("gradient") - start


def count(spec):
    model = build(spec)
    expected = predicted(spec, build(spec))
    if spec["method"] == "lora":
        method("lora", rso_ds.RSOConfig(**spec["rso"])).prepare(model)
    engine = engine_of(spec, model)
    engine.train()
    if spec["checkpointing"]:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    traffic = engine.traffic
    generator = torch.Generator().manual_seed(dist.get_rank())

    def step():
        for _ in range(spec["gas"]):
            ids = torch.randint(0, spec["vocab"], (1, 16), generator=generator)
            engine.backward(engine(input_ids=ids, labels=ids, use_cache=False).loss)
            engine.step()

    marks = []
    for _ in range(STEPS + INTERVAL):
        marks.append((traffic.by_kind(), traffic.by_kind("inter-node")))
        step()
    # The first interval warms up: buckets are rebuilt, PowerSGD is dense, ZeRO-3 traces.
    measured = {k: (traffic.total(k) - marks[INTERVAL][0][k]) / STEPS for k in expected}
    crossing = {k: (traffic.total(k, "inter-node") - marks[INTERVAL][1][k]) / STEPS for k in expected}
    with watched(traffic, model) as during:
        step()
    with contextlib.suppress(Exception):
        engine.destroy()
    return {"measured": measured, "predicted": expected, "inter_node": crossing, "during_backward": during}


@contextmanager
def two_nodes() -> Iterator[None]:
    """The first half of the ranks is one node, the second another."""
    os.environ["RSO_DS_NODE"] = f"node{dist.get_rank() * 2 // dist.get_world_size()}"
    install().learn_nodes()
    try:
        yield
    finally:
        del os.environ["RSO_DS_NODE"]


def run(case: str, _: Path) -> dict[str, Any]:
    spec = (cases(dist.get_world_size()) | full_cases(dist.get_world_size()))[case]
    with two_nodes():
        return count(spec)
