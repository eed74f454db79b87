"""One rank: low precision, overflow, checkpoints and refusals under DeepSpeed, job by job."""

import contextlib
import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from cases.deepspeed_cases import FORCED, MICRO, STEPS, case
from support import tiny_llama
from support.fp16 import fp16_on_any_cpu
from support.resealed_checkpoints import reseal

import rso_ds
from rso_ds.checkpoint import dense_state_dict
from rso_ds.engines.deepspeed.initialize import own_initialize

BF16 = {"bf16": {"enabled": True}}
FP16 = {"fp16": {"enabled": True, "initial_scale_power": 8, "loss_scale_window": 1000, "hysteresis": 1}}
COLUMNS, FOLDED = {"sampler": "coordinate"}, {"form": "folded", "merge_rounding": "stochastic"}
AUTOCAST = {"torch_autocast": {"enabled": True, "dtype": "bfloat16"}}


def engine_of(spec, **model_options):
    config = {**spec["json"], "optimizer": {"type": "RSO", "params": spec["rso"]}}
    model = tiny_llama.build(spec["intermediate"], **model_options)
    engine, *_ = rso_ds.initialize(model=model, model_parameters=model.parameters(), config=config)
    engine.train()
    return engine


def steps(engine, first, last, scale_loss=lambda step: 1.0):
    rank, world = dist.get_rank(), dist.get_world_size()
    losses = []
    for step in range(first, last):
        micro = tiny_llama.tokens(step, MICRO * world).view(world, MICRO, -1)[rank]
        loss = tiny_llama.loss_of(engine, micro)
        engine.backward(loss * scale_loss(step))
        engine.step()
        losses.append(loss.item())
    mean = torch.tensor(losses)
    dist.all_reduce(mean)
    return (mean / world).tolist()


def finish(engine, losses, **more):
    result = {
        "losses": losses,
        "draw": engine.rso.draw,
        "applied": engine.rso.applied_steps,
        "skipped": engine.skipped_steps,
        "optimizer": type(engine.optimizer).__name__,
        "weights": dense_state_dict(engine.module),
        **more,
    }
    with contextlib.suppress(Exception):
        engine.destroy()
    return result


def train(spec):
    engine = engine_of(spec)
    dtypes = {str(x.subspace.P.dtype) for x in engine.rso.layers.values()}
    losses = steps(engine, 0, STEPS)
    masters = engine.rso.layout.weight_masters
    rows = {} if masters is None else {n: tuple(r.shape) for n, r in masters.rows.items()}
    return finish(engine, losses, p_dtypes=sorted(dtypes), master_rows=rows)


def gpt2(stage):
    """Conv1D layers and tied embeddings; built under zero.Init at stage 3."""
    from transformers import GPT2Config, GPT2LMHeadModel

    def build():
        torch.manual_seed(0)
        sizes = {"n_embd": 16, "n_layer": 2, "n_head": 2, "vocab_size": tiny_llama.VOCAB, "n_positions": 32}
        return GPT2LMHeadModel(GPT2Config(**sizes, resid_pdrop=0, embd_pdrop=0, attn_pdrop=0))

    spec = case(stage, {"rank": 4})
    plain = build()
    start = {n: p.clone() for n, p in plain.state_dict().items()}
    model = plain
    if stage == 3:
        batch = {"train_batch_size": MICRO * dist.get_world_size()}
        with deepspeed.zero.Init(config_dict_or_path={**spec["json"], **batch}):
            model = build()
        for name, param in model.named_parameters():
            with deepspeed.zero.GatheredParameters([param], modifier_rank=0):
                param.data.copy_(start[name])
    config = {**spec["json"], "optimizer": {"type": "RSO", "params": spec["rso"]}}
    engine, *_ = rso_ds.initialize(model=model, config=config)
    return {**finish(engine, steps(engine, 0, STEPS)), "start": start, "config": plain.config.to_dict()}


def resume(spec, folder, stop):
    """Losses of an uninterrupted run and of one that saves at ``stop``, is thrown away, and resumes."""
    straight = train(spec)
    engine = engine_of(spec)
    losses = steps(engine, 0, stop)
    engine.save_checkpoint(folder, client_state={"note": "kept"})
    with contextlib.suppress(Exception):
        engine.destroy()
    engine = engine_of(spec)
    _, client = engine.load_checkpoint(folder)
    losses += steps(engine, stop, STEPS)
    return {"straight": straight, "resumed": finish(engine, losses, client=client.get("note"))}


def message_of(call):
    try:
        call()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return None


def foreign_checkpoints(folder):
    """Messages for checkpoints that must not load, and whether the engine was left as it was."""
    engine = engine_of(case(2))
    steps(engine, 0, 2)
    before = {n: p.clone() for n, p in engine.module.state_dict().items()}
    found = {}
    found["no latest"] = message_of(lambda: engine.load_checkpoint(str(folder / "nowhere")))
    engine.save_checkpoint(str(folder), tag="good")
    dist.barrier()
    state = json.loads((folder / "good" / "rso_state.json").read_text())
    rso = state["rso"]

    def altered(**changes):
        return json.dumps({**state, "rso": {**rso, **changes}})

    broken = {
        "missing": None,
        "damaged": "{",
        "other rank": altered(layers={n: [a, b, 4, g] for n, (a, b, _, g) in rso["layers"].items()}),
        "other sampler": altered(sampler="gaussian"),
        "other format": json.dumps({**state, "format": 99}),
        "incomplete": json.dumps({**state, "rso": {k: v for k, v in rso.items() if k != "draw"}}),
        "other solver": json.dumps({**state, "solver": "sgd"}),
        "other dtype": json.dumps(
            {**state, "parameters": {n: [s, "bfloat16", t] for n, (s, _, t) in state["parameters"].items()}}
        ),
        "without RSO": json.dumps({**state, "rso": None}),
    }
    for name, text in broken.items():
        if dist.get_rank() == 0:
            target = folder / name
            target.mkdir()
            if text is not None:
                shutil.copytree(folder / "good", target, dirs_exist_ok=True)
                (target / "rso_state.json").write_text(text)
                reseal(target)
        dist.barrier()
        found[name] = message_of(lambda name=name: engine.load_checkpoint(str(folder), tag=name))
    found["exclude_frozen"] = message_of(lambda: engine.save_checkpoint(str(folder), exclude_frozen_parameters=True))
    after = engine.module.state_dict()
    script = subprocess.run([sys.executable, str(folder / "zero_to_fp32.py"), "a", "b"], capture_output=True, text=True)
    found["zero_to_fp32"] = f"{script.returncode}: {script.stderr}"
    found["save_16bit_model"] = message_of(lambda: engine.save_16bit_model(str(folder), exclude_frozen_parameters=True))
    engine.save_16bit_model(str(folder / "plain"))
    dense, saved = dense_state_dict(engine.module), torch.load(folder / "plain" / "pytorch_model.bin")
    found["saved_16bit"] = saved.keys() == dense.keys() and all(torch.equal(w, saved[n]) for n, w in dense.items())
    found["untouched"] = all(torch.equal(before[n], after[n]) for n in before)
    return found


def refusals():
    base = case(2)["json"]
    rso = {"type": "RSO", "params": {"rank": 4}}

    def start(config, **kwargs):
        model = kwargs.pop("model", None) or tiny_llama.build()
        return lambda: rso_ds.initialize(model=model, config=config, **kwargs)

    def zero(**keys):
        return {**base, "optimizer": rso, "zero_optimization": {"stage": 3, **keys}}

    def params(**keys):
        return {**base, "optimizer": {"type": "RSO", "params": keys}}

    sgd = {"solver": "sgd", "carry_over": "reset", "rank": 4}
    model = tiny_llama.build()
    bare = {**base, "optimizer": rso}
    return {
        "both optimizers": message_of(start(bare, model=model, optimizer=torch.optim.SGD(model.parameters(), lr=1))),
        "adamw": message_of(start({**base, "optimizer": {"type": "AdamW", "params": {"lr": 1e-3}}})),
        "no optimizer": message_of(start(base)),
        "misspelt type": message_of(start({**base, "optimizer": {"type": "rso"}})),
        "misspelt key": message_of(start(params(intervall=3))),
        "auto": message_of(start(params(lr="auto"))),
        "rank": message_of(start(params(rank=33))),
        "interval": message_of(start(params(interval=0))),
        "no layer": message_of(start(params(targets=["nothing"]))),
        "nvme": message_of(start(zero(offload_optimizer={"device": "nvme", "nvme_path": "x"}))),
        "ratio": message_of(start(zero(offload_optimizer={"device": "cpu", "ratio": 0.5}))),
        "universal": message_of(start({**bare, "checkpoint": {"load_universal": True}})),
        "two configs": message_of(
            lambda: rso_ds.initialize(type("A", (), {"deepspeed_config": bare}), model=model, config=bare)
        ),
        "missing json": message_of(start("no/such/file.json")),
        "DeepSpeed's own initialize": message_of(lambda: own_initialize()(model=tiny_llama.build(), config=bare)),
        "sgd offload": message_of(
            start({**zero(offload_optimizer={"device": "cpu"}), "optimizer": {"type": "RSO", "params": sgd}})
        ),
        "super offload": message_of(start(zero(offload_optimizer={"device": "cpu", "super_offload": True}))),
        "ranks disagree on shapes": message_of(start(params(rank=4 + dist.get_rank()))),
        "ranks disagree": message_of(start(params(rank=4, seed=dist.get_rank()))),
    }


def unmodified(folder):
    """An unmodified deepspeed.initialize call, config given by path."""
    spec = case(2)
    path = folder / f"config{dist.get_rank()}.json"
    path.write_text(json.dumps({**spec["json"], "optimizer": {"type": "RSO", "params": spec["rso"]}}))
    model = tiny_llama.build()
    engine, *_ = deepspeed.initialize(model=model, model_parameters=model.parameters(), config=str(path))
    result = finish(engine, steps(engine, 0, STEPS))
    plain_json = {**spec["json"], "optimizer": {"type": "AdamW", "params": {"lr": 1e-3, "torch_adam": True}}}
    engine, *_ = deepspeed.initialize(model=tiny_llama.build(), config=plain_json)
    return {"rso": result, "adamw_untouched": not hasattr(engine, "rso")}


def divergence(stage, change):
    """A replica that drifted must be noticed at the next boundary, on every rank."""
    engine = engine_of(case(stage))
    steps(engine, 0, 1)
    if dist.get_rank() == 1:
        with torch.no_grad():
            change(engine)
    return message_of(lambda: steps(engine, 1, 6))


def drift_w(engine):
    engine.module.model.layers[1].mlp.up_proj.weight[0, 0] += 1e-3


def drift_dense(engine):
    engine.module.model.embed_tokens.weight[-1, 0] += 1e-3


def drift_moment(engine):
    engine.optimizer.state[engine.module.lm_head.weight]["exp_avg_sq"][0, 0] += 1e-3


def lowest_scale(stage):
    """Every step overflows, from a loss scale of 4 on."""
    engine = engine_of(case(stage, fp16={"enabled": True, "initial_scale_power": 2, "hysteresis": 1}))
    return message_of(lambda: steps(engine, 0, STEPS, lambda step: float("inf")))


def nonfinite(stage):
    """In fp32, the loss of one rank is infinite at two steps: both ranks must leave those out."""
    engine = engine_of(case(stage))
    bad = float("inf") if dist.get_rank() == 1 else 1.0
    return finish(engine, steps(engine, 0, STEPS, lambda step: bad if step in FORCED else 1.0))


def overflow(stage, **rso):
    """Loss multiplied up at two steps: their gradients overflow fp16 and the steps are skipped."""
    engine = engine_of(case(stage, rso, **FP16))
    return finish(engine, steps(engine, 0, STEPS, lambda step: 1e8 if step in FORCED else 1.0))


JOBS: dict[str, Callable[[Path], Any]] = {}
for stage in range(4):
    JOBS[f"bf16-zero{stage}"] = lambda to, s=stage: train(case(s, **BF16))
    JOBS[f"bf16-zero{stage}-stochastic"] = lambda to, s=stage: train(case(s, {"merge_rounding": "stochastic"}, **BF16))
    JOBS[f"fp16-zero{stage}"] = lambda to, s=stage: overflow(s)
    JOBS[f"nonfinite-zero{stage}"] = lambda to, s=stage: nonfinite(s)
    JOBS[f"resume-zero{stage}"] = lambda to, s=stage: resume(case(s, {"carry_over": "project"}), str(to / f"ck{s}"), 7)
    JOBS[f"autocast-zero{stage}"] = lambda to, s=stage: train(case(s, **AUTOCAST))
    JOBS[f"bf16-zero{stage}-masters"] = lambda to, s=stage: train(
        case(s, {"master_weights": "cpu"}, intermediate=85, **BF16)
    )
    JOBS[f"bf16-zero{stage}-coordinate"] = lambda to, s=stage: train(case(s, COLUMNS, intermediate=85, **BF16))
    JOBS[f"bf16-zero{stage}-coordinate-folded"] = lambda to, s=stage: train(case(s, {**COLUMNS, **FOLDED}, **BF16))
    JOBS[f"bf16-zero{stage}-coordinate-masters"] = lambda to, s=stage: train(
        case(s, {**COLUMNS, "master_weights": "cpu"}, intermediate=85, **BF16)
    )
    JOBS[f"gpt2-zero{stage}"] = lambda to, s=stage: gpt2(s)
JOBS["resume-masters-zero2"] = lambda to: resume(case(2, {"master_weights": "device"}, **BF16), str(to / "ckm2"), 7)
JOBS["resume-masters-zero3"] = lambda to: resume(case(3, {"master_weights": "cpu"}, **BF16), str(to / "ckm3"), 7)
JOBS["bf16-zero3-coordinate-folded-masters"] = lambda to: train(
    case(3, {**COLUMNS, "form": "folded", "master_weights": "device"}, intermediate=85, **BF16)
)
JOBS["fp16-zero0-fused"] = lambda to: overflow(0, torch_adam=False)
JOBS["bf16-zero0-fused"] = lambda to: train(case(0, {"torch_adam": False}, **BF16))
JOBS["bf16-zero1-fp32_accum"] = lambda to: train(case(1, data_types={"grad_accum_dtype": "fp32"}, **BF16))
JOBS["resume-bf16-zero3"] = lambda to: resume(case(3, **BF16), str(to / "ckbf"), 7)
JOBS["foreign"] = lambda to: foreign_checkpoints(to / "foreign")
JOBS["refusals"] = lambda to: refusals()
JOBS["divergence-w"] = lambda to: divergence(1, drift_w)
for stage in (1, 2, 3):
    JOBS[f"lowest scale at zero{stage}"] = lambda to, s=stage: lowest_scale(s)
JOBS["divergence-w2"] = lambda to: divergence(2, drift_w)
JOBS["divergence-dense"] = lambda to: divergence(0, drift_dense)
JOBS["divergence-moment"] = lambda to: divergence(0, drift_moment)
JOBS["unmodified"] = unmodified


def run(case: str, folder: Path) -> Any:
    with fp16_on_any_cpu():
        return JOBS[case](folder)
