"""One rank: what a live engine holds, beside what the account says it holds."""

import json
from pathlib import Path
from typing import Any

import torch.distributed as dist
from support import tiny_llama

import rso_ds
from rso_ds.planning.memory.account import Accountant, model_builder
from rso_ds.planning.memory.profile import StepProfiler
from rso_ds.planning.memory.states import Engine

BUCKET = 4096


def cases():
    for stage in range(4):
        for precision in ("fp32", "bf16"):
            yield f"zero{stage}-{precision}", stage, precision, {}, {}
    yield "zero1-bf16-sgd", 1, "bf16", {"solver": "sgd", "carry_over": "reset"}, {}
    yield "zero2-bf16-coordinate", 2, "bf16", {"sampler": "coordinate", "share_projection": "shape"}, {}
    offload = {"offload_optimizer": {"device": "cpu"}}
    yield "zero2-bf16-offload", 2, "bf16", {"torch_adam": False}, offload
    yield "zero3-bf16-masters", 3, "bf16", {"master_weights": "device"}, {}
    yield "zero3-bf16-persistent", 3, "bf16", {}, {"stage3_param_persistence_threshold": 100_000}
    yield "checkpointing", 3, "fp32", {}, {}, True
    tokens = {"targets": ["default", "embeddings", "head"]}
    yield "zero2-fp32-embeddings", 2, "fp32", tokens, {}
    yield "zero3-bf16-embeddings", 3, "bf16", tokens, {}
    for stage in range(4):
        yield f"zero{stage}-bf16-tied", stage, "bf16", tokens, {}, False, True
    yield "zero2-bf16-masters", 2, "bf16", {"master_weights": "cpu"}, {}
    # Last: DeepSpeed keeps its groups for later engines. No boundary, which drops the copies, before the measurement.
    yield "zero3-bf16-hpz", 3, "bf16", {"interval": 9}, {"zero_hpz_partition_size": 2}


def measure(stage, precision, rso, zero, checkpointing=False, tie=False):
    config = {
        "train_micro_batch_size_per_gpu": 2,
        "gradient_accumulation_steps": 1,
        "optimizer": {"type": "RSO", "params": {"rank": 5, "interval": 2, "torch_adam": True, **rso}},
        "zero_optimization": {
            "stage": stage, "reduce_bucket_size": BUCKET, "stage3_param_persistence_threshold": 0,
            "stage3_max_live_parameters": 0, "stage3_max_reuse_distance": 0, "stage3_prefetch_bucket_size": 0, **zero,
        },
    }  # fmt: skip
    if precision != "fp32":
        config[precision] = {"enabled": True}
    model = tiny_llama.build(86, tie=tie)
    engine, *_ = rso_ds.initialize(model=model, config=json.loads(json.dumps(config)))
    engine.train()
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    passes = []  # of attention layers: once in forward, once more where backward recomputes
    for step in range(3):
        ids = tiny_llama.tokens(step, 2)
        if step == 2:
            for block in model.model.layers:
                block.self_attn.register_forward_pre_hook(lambda attention, args: passes.append(attention))
            profiler = StepProfiler(engine, checkpointing)
            with profiler:
                loss = profiler.forward(lambda ids=ids: tiny_llama.loss_of(engine, ids))
                passes_before_backward = len(passes)
                engine.backward(loss)
        else:
            loss = tiny_llama.loss_of(engine, ids)
            engine.backward(loss)
        engine.step()
    layout = Engine.from_json(config, dist.get_world_size())
    accountant = Accountant(model_builder(model.config), engine.rso.config, layout)
    account = accountant.account("rso", 2, tiny_llama.SEQ)
    trained = sum(getattr(p, "ds_numel", p.numel()) for p in model.parameters() if p.requires_grad)
    result = {
        "measured": profiler.result.state,
        "kept": profiler.result.kept_total,
        "blocks": len(model.model.layers),
        "passes": [passes_before_backward, len(passes)],
        "device": account.device,
        "host": account.host,
        "missing": account.missing,
        "dropped": layout.itemsize * trained // layout.hpz if layout.hpz > 1 else 0,
        "kept_model": account.trace.kept,
    }
    engine.destroy()
    return result


CASES = {name: options for name, *options in cases()}


def run(case: str, _: Path) -> dict[str, Any]:
    return measure(*CASES[case])
