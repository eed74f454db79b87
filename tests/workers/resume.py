"""One rank of one set of processes: saves runs, or continues them, as the first word of the case says."""

import contextlib
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from cases.resume_cases import (
    CHAINS,
    CUTS,
    GLOBAL_BATCH,
    SAVE,
    STEPS,
    WORLDS,
    case,
    four_rank_cases,
    two_rank_cases,
)
from deepspeed.runtime.lr_schedules import WarmupLR
from support import tiny_llama
from support.fp16 import fp16_on_any_cpu
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.nn.parallel import DistributedDataParallel

import rso_ds
from rso_ds.checkpoint import dense_state_dict

CASES = two_rank_cases() | four_rank_cases()
SCHEDULE = {"warmup_min_lr": 1e-4, "warmup_max_lr": 1e-3, "warmup_num_steps": 10, "warmup_type": "linear"}
CLIP = 0.5


class Run:
    """A run under any engine: ``steps``, ``checkpoints``, ``weights``."""

    def __init__(self, spec):
        self.spec, self.world = spec, dist.get_world_size()
        self.micro = GLOBAL_BATCH // self.world
        self.model = tiny_llama.build(spec["intermediate"])
        for module in self.model.modules():
            if hasattr(module, "attention_dropout"):
                module.attention_dropout = spec["dropout"]
        torch.manual_seed(100 + dist.get_rank())  # every rank draws its own dropout
        deepspeed_run = spec["engine"].startswith("zero")
        (self._deepspeed if deepspeed_run else self._torch)()
        self.forward.train()

    def _deepspeed(self):
        stage = int(self.spec["engine"][-1])
        zero = {
            "stage": stage,
            **({"stage3_param_persistence_threshold": 40} if stage == 3 else {}),
            **self.spec["zero"],
        }
        config = {
            "train_micro_batch_size_per_gpu": self.micro,
            "gradient_clipping": CLIP,
            "zero_optimization": zero,
            "scheduler": {"type": "WarmupLR", "params": SCHEDULE},
            "optimizer": {"type": "RSO", "params": self.spec["rso"]},
            **self.spec["json"],
        }
        engine, *_ = rso_ds.initialize(model=self.model, model_parameters=self.model.parameters(), config=config)
        self.forward, self.engine, self.boundary, self.checkpoints = engine, engine, engine.rso, engine.checkpoints

    def _torch(self):
        config = rso_ds.RSOConfig(**self.spec["rso"])
        rso_ds.convert(self.model, config)
        self.forward, extra, kind = self.model, {}, self.spec["engine"]
        if kind == "ddp":
            self.forward = DistributedDataParallel(self.model)
        else:
            options = {"mesh": init_device_mesh("cpu", (self.world,))}
            if kind == "hsdp":
                mesh = init_device_mesh("cpu", (2, self.world // 2), mesh_dim_names=("replicas", "shards"))
                options["mesh"] = mesh
                if config.communicate == "boundary":
                    options["mesh"] = mesh["shards"]
                    extra["replicas"] = mesh["replicas"].get_group()
            if self.spec["precision"] == "bf16":
                options["mp_policy"] = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
            for block in self.model.model.layers:
                fully_shard(block, **options)
            fully_shard(self.model, **options)
        self.engine = None
        self.optimizer = rso_ds.RSO(self.forward, config, **extra)
        self.scheduler = WarmupLR(self.optimizer, **SCHEDULE)
        self.boundary = self.optimizer.boundary
        self.checkpoints = self.optimizer.checkpointer(scheduler=self.scheduler)

    def steps(self, first, last):
        losses = []
        for step in range(first, last):
            ids = tiny_llama.tokens(step, GLOBAL_BATCH).view(self.world, self.micro, -1)[dist.get_rank()]
            loss = tiny_llama.loss_of(self.forward, ids)
            if self.engine is not None:
                self.engine.backward(loss)
                self.engine.step()
            else:
                loss.backward()
                torch.nn.utils.clip_grad_norm_(self.model.parameters(), CLIP)
                self.optimizer.step()
                self.optimizer.zero_grad()
                self.scheduler.step()
            losses.append(loss.item())
        mean = torch.tensor(losses)
        dist.all_reduce(mean)
        return (mean / self.world).tolist()

    def finish(self, losses, **more):
        result = {"losses": losses, "weights": dense_state_dict(self.model), "draw": self.boundary.draw, **more}
        if self.engine is not None:
            result["scale"] = getattr(self.engine.optimizer, "cur_scale", None)
            with contextlib.suppress(Exception):
                self.engine.destroy()
        return result


def save(folder, name):
    """Straight through; the checkpoint is taken on the way."""
    spec = CASES[name]
    run = Run(spec)
    losses = run.steps(0, SAVE)
    run.checkpoints.save(folder / "ck" / name, "middle", {"note": [1, "kept"]}, wait=not spec["background"])
    losses += run.steps(SAVE, STEPS)
    run.checkpoints.wait()
    return run.finish(losses)


def resume(folder, source, target):
    run = Run(CASES[target])
    torch.manual_seed(999)  # what the checkpoint must undo
    _, client = run.checkpoints.load(folder / "ck" / source)
    return run.finish(run.steps(SAVE, STEPS), client=client)


def link(folder, chain, index):
    """One part of a chain of runs on different numbers of ranks."""
    run = Run(case(CHAINS[chain][index]))
    folder = folder / "chains" / chain
    if index:
        run.checkpoints.load(folder)
    losses = run.steps(CUTS[index], CUTS[index + 1])
    if index + 1 < len(WORLDS):
        run.checkpoints.save(folder, f"part{index}")
    return run.finish(losses)


def run(case: str, folder: Path) -> dict[str, Any]:
    """``case``: "save NAME", "resume NAME", "resume SAVED -> NAME" or "N of CHAIN", the Nth part of a run."""
    act, _, name = case.partition(" ")
    with fp16_on_any_cpu():
        if act == "save":
            return save(folder, name)
        if act == "resume":
            source, _, target = name.partition(" -> ")
            return resume(folder, source, target or source)
        return link(folder, name.removeprefix("of "), int(act))
